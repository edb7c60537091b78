"""`consilium tune` on a tiny job: measured for real, its advice can be typed, what does not fit is no fault."""

from __future__ import annotations

import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from shared.config import Job, load_job
from shared.errors import UserError
from shared.imaging.dataset import load_dataset
from shared.samples import read_samples
from shared.sitefile import read_site
from simulations import tuning
from simulations.tuning import Speed, measure, tune
from tests.conftest import called


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "SECONDS", 0.05)


def test_what_it_prints_is_a_command_whose_settings_hold(
    three_sites: Path,
    tiny_job: Job,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tuning, "MOST", 4)
    file = tmp_path / "tiny.toml"
    file.write_text(tiny_job.toml())
    code, out, errors = called(capsys, "tune", file, "--data", three_sites)
    assert (code, errors) == (0, "")
    assert "20 training images at the largest site" in out
    assert "images a second" in out
    assert "largest batch that fits: 4" in out
    words = shlex.split(out.strip().splitlines()[-1])
    assert words[:2] == ["consilium", "simulate"]
    settings = [word for before, word in pairwise(words) if before == "--set"]
    job = load_job(file, settings)
    assert job.train.batch_size == tiny_job.train.batch_size
    assert job.train.accumulate == 2  # 8 images, of which at most 4 at once
    assert int(words[words.index("--workers") + 1]) >= 1


def scripted(monkeypatch: pytest.MonkeyPatch, speed: Any) -> None:
    monkeypatch.setattr(tuning, "measure", lambda job, data, workers=1: speed(job, workers))


def test_the_faster_precision_is_taken_and_a_batch_that_does_not_fit_computed_in_parts(
    three_sites: Path, tiny_job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def speed(job: Job, workers: int) -> Speed | None:
        if job.train.batch_size / job.train.accumulate > 2:
            return None
        return Speed((20.0 if job.train.precision == "bfloat16" else 10.0) * min(workers, 2), 10**9)

    scripted(monkeypatch, speed)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.setattr(tuning, "has_bfloat16", lambda _: True)
    advice = tune(tiny_job, three_sites, tmp_path, lambda _: None)
    assert advice.settings == {"train.precision": "bfloat16", "train.accumulate": 4}
    assert (advice.largest, advice.workers) == (2, 2)
    assert advice.line() == "--set train.precision=bfloat16 --set train.accumulate=4 --workers 2"


@pytest.mark.parametrize(
    "settings",
    [{"train__batch_size": 512}, {"privacy__dp": "local", "privacy__noise_multiplier": 1.0, "privacy__epsilon": 8.0}],
    ids=["fewer images than a batch", "private"],
)
def test_a_batch_that_is_never_that_large_or_has_parts_of_its_own_is_not_split(
    settings: dict[str, Any], three_sites: Path, tiny_job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tiny_job.replace(train__class_weights="none", **settings)

    def speed(job: Job, workers: int) -> Speed | None:
        """A private batch of any size is computed in parts; two images at once do not fit."""
        return None if job.privacy.dp == "local" and job.train.batch_size == 2 else Speed(10.0 * workers, 10**9)

    scripted(monkeypatch, speed)
    assert tune(job, three_sites, tmp_path, lambda _: None).settings["train.accumulate"] == 1


def test_where_not_one_image_fits_it_says_so(
    three_sites: Path, tiny_job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, lambda job, workers: None)
    with pytest.raises(UserError, match="not even one image"):
        tune(tiny_job, three_sites, tmp_path, lambda _: None)


def test_a_process_that_runs_out_of_memory_is_a_batch_that_does_not_fit(
    three_sites: Path, tiny_job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 50 MB to spend; the network of 512 channels asks for more."""
    import resource

    def little(_: object) -> None:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * 4096 + 50_000_000
        resource.setrlimit(resource.RLIMIT_AS, (size, size))

    monkeypatch.setattr(tuning, "_stay_within_memory", little)
    data = tuning._most_images(tiny_job, three_sites, tmp_path)
    assert measure(tiny_job.replace(model__width=512), data) is None


def test_a_job_of_several_labels_is_measured_like_any_other(three_sites: Path, tiny_job: Job) -> None:
    job = tiny_job.replace(data__multilabel=True)
    site = read_site(three_sites / "c" / "site.toml")
    assert measure(job, load_dataset(read_samples(site, job), site, job)) is not None


def test_a_network_that_normalises_over_a_batch_is_never_given_one_image(
    three_sites: Path,
    tiny_job: Job,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tuning, "MOST", 4)
    file = tmp_path / "job.toml"
    file.write_text(tiny_job.replace(model__name="resnet18", data__size=32, train__batch_size=4).toml())
    code, out, errors = called(capsys, "tune", file, "--data", three_sites)
    assert (code, errors) == (0, "")
    assert "batch 1:" not in out
    assert "largest batch that fits: 4" in out

"""The model that each hospital fits to its own images in the end: when it is kept, how it is validated and tested."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import client.personal
import shared.training
from consilium.study.collect import _best_own
from server.results import run_scores
from server.rounds import Run
from server.store import read_events
from shared.cases import SiteData
from shared.config import Job
from shared.errors import SiteRefusal
from shared.imaging.dataset import load_dataset
from shared.samples import read_samples
from shared.tasks import load_task
from simulations.engine import LocalGrid
from simulations.pool import WorkerPool
from simulations.sites import node_of


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with WorkerPool("client.app:app", 1) as pool:
        yield pool


def play(pool: WorkerPool, job: Job, sites: Path, out: Path, resume: bool = False) -> Path:
    """Run the job in ``out``."""
    nodes = [node_of(out / "sites", file) for file in sorted(sites.glob("*/site.toml"))]
    Run(LocalGrid(pool, nodes, job.flat()), job, out, resume=resume, store=None).run()
    return out


def own(out: Path, site: str) -> dict[str, torch.Tensor]:
    """The model that a site saved."""
    (file,) = (out / "sites" / site / ".consilium" / "personal").glob("*.safetensors")
    return load_file(file)


def log(out: Path, site: str) -> str:
    return (out / "sites" / site / "site.log").read_text()


def mann_whitney(scores: list[float], labels: list[int]) -> float:
    """The AUROC as a count of pairs."""
    cases = list(zip(scores, labels, strict=True))
    pairs = [(a > b) + (a == b) / 2 for a, x in cases if x for b, y in cases if not y]
    return math.fsum(pairs) / len(pairs)


def test_it_is_validated_and_tested_where_it_was_made_and_made_once(
    pool: WorkerPool, three_sites: Path, tiny_job: Job, tmp_path: Path
) -> None:
    job = tiny_job.replace(federation__finetune_steps=6, federation__finetune_rate=1.0)
    out = play(pool, job, three_sites, tmp_path / "run")
    found = run_scores(out)["personal"]
    task = load_task(job.task)
    for site in "abc":
        assert log(out, site).count("this site's own model of round") == 1, "made anew for the test images"
        model = task.build_model(job)
        model.load_state_dict(own(out, site))
        files = SiteData(site, three_sites / site, format="csv", csv="labels.csv", cache=tmp_path / "cache" / site)
        data = load_dataset(read_samples(files, job), files, job)
        for split, told in (("val", found["validation"]), ("test", found)):
            part = data.subset(split)
            scores = [one.probabilities[1] for one in task.predict(model, part, job, torch.device("cpu"))]
            labels = [sample.target[0] for sample in part.samples]
            assert told["sites"][site]["auroc"] == pytest.approx(mann_whitney(scores, labels), abs=0.02), (site, split)
    within = _best_own(read_events(out), "auroc")
    sites = found["validation"]["sites"].values()
    mean = sum(one["auroc"] * one["images"] for one in sites) / sum(one["images"] for one in sites)
    assert within == pytest.approx({"validation": found["validation"]["auroc"], "at_sites": mean})


def test_the_common_model_stays_where_fine_tuning_is_no_better_on_validation_images(
    pool: WorkerPool, three_sites: Path, tiny_job: Job, tmp_path: Path
) -> None:
    job = tiny_job.replace(federation__finetune_steps=1, federation__finetune_rate=0.0)
    out = play(pool, job, three_sites, tmp_path / "run")
    common = load_file(out / "model.safetensors")
    for site in "abc":
        assert all(torch.equal(own(out, site)[name], value) for name, value in common.items())
        assert "the common model stays" in log(out, site)
    found = run_scores(out)
    assert found["personal"]["sites"]["a"]["auroc"] == found["sites"]["a"]["auroc"]


def test_the_rate_falls_over_the_steps_of_fine_tuning_alone(
    pool: WorkerPool, three_sites: Path, tiny_job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a cosine from the share of the peak that the job asks for, whatever the run before did."""
    real, file = shared.training.learning_rate, tmp_path / "rates"

    def listened(step: int, total: int, job: Job) -> float:
        rate = real(step, total, job)
        with file.open("a") as lines:  # in the worker's process
            lines.write(f"{rate}\n")
        return rate

    job = tiny_job.replace(federation__finetune_steps=8, federation__finetune_rate=0.5, train__warmup=0.5)
    monkeypatch.setattr(shared.training, "learning_rate", listened)
    with WorkerPool("client.app:app", 1) as here:
        play(here, job, three_sites, tmp_path / "run")
    peak = 0.5 * job.train.learning_rate
    expected = [peak * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]
    assert [float(line) for line in file.read_text().split()][-8:] == pytest.approx(expected)


def test_a_site_whose_validation_images_cannot_tell_keeps_the_common_model(
    pool: WorkerPool, three_sites: Path, tiny_job: Job, tmp_path: Path
) -> None:
    """With one class alone there is no AUROC; going on with that class would be overlearning it."""
    rows = (three_sites / "a" / "labels.csv").read_text().splitlines()
    (three_sites / "a" / "labels.csv").write_text(
        "\n".join(row for row in rows if not row.endswith("val") or ",left," in row) + "\n"
    )
    job = tiny_job.replace(federation__finetune_steps=2, federation__finetune_rate=1.0)
    out = play(pool, job, three_sites, tmp_path / "run")
    common = load_file(out / "model.safetensors")
    assert all(torch.equal(own(out, "a")[name], value) for name, value in common.items())
    assert "images give no auroc (none, or of one class alone): the common model stays" in log(out, "a")


def test_a_hospital_whose_own_training_leads_nowhere_keeps_the_common_model(
    three_sites: Path, tiny_job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tiny_job.replace(federation__finetune_steps=2)
    monkeypatch.setattr(client.personal, "train", diverges)
    with WorkerPool("client.app:app", 1) as here:
        out = play(here, job, three_sites, tmp_path / "run")
    common = load_file(out / "model.safetensors")
    for site in "abc":
        assert all(torch.equal(own(out, site)[name], value) for name, value in common.items())
        assert "not fine-tuned, the common model stays: the training loss is inf" in log(out, site)
    assert set(run_scores(out)["personal"]["sites"]) == set("abc")


def diverges(model: torch.nn.Module, *_: object, **__: object) -> None:
    """What ``train`` does where the loss is no longer finite: the model is spoilt by then."""
    with torch.no_grad():
        for value in model.parameters():
            value.fill_(math.inf)
    raise SiteRefusal("diverged", "the training loss is inf; lower train.learning_rate")


def test_a_saved_model_is_used_again_only_for_the_same_common_model_and_the_same_cases(
    pool: WorkerPool, three_sites: Path, tiny_job: Job, tmp_path: Path
) -> None:
    """A run that goes on after its end: the same model is not made twice; once a patient was taken out, it is."""
    job = tiny_job.replace(federation__finetune_steps=4, federation__finetune_rate=1.0, train__learning_rate=1e-4)
    out = play(pool, job, three_sites, tmp_path / "run")
    assert [log(out, site).count("own model of round") for site in "abc"] == [1, 1, 1]
    play(pool, job, three_sites, out, resume=True)
    assert [log(out, site).count("own model of round") for site in "abc"] == [1, 1, 1]
    table = three_sites / "b" / "labels.csv"
    rows = table.read_text().splitlines()
    taken = next(row for row in rows if row.endswith(",train"))
    table.write_text("\n".join(row for row in rows if row != taken) + "\n")
    play(pool, job, three_sites, out, resume=True)
    assert [log(out, site).count("own model of round") for site in "abc"] == [1, 2, 1]
    (file,) = (out / "sites" / "c" / ".consilium" / "personal").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-40])
    play(pool, job, three_sites, out, resume=True)
    assert [log(out, site).count("own model of round") for site in "abc"] == [1, 2, 2]

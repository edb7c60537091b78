"""`consilium audit`: end to end on a small run, refusals of one line, and what may be written to the run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from consilium.audit import audit
from consilium.audit_page import MARK, PAGE, PICTURE, default_folder, page, write_audit, write_for_card
from shared.accounting import job_noise
from shared.config import Job, job_from_flat
from shared.errors import UserError
from shared.files import write_text
from simulations.simulate import run
from tests.conftest import called, examples, save_run, write_site

QUICK: dict[str, Any] = {"shadows": 2, "steps": 4, "inversion_steps": 5}


@pytest.fixture
def site(tmp_path: Path) -> Path:
    return write_site(tmp_path / "data" / "a", "a", 48)


@pytest.fixture
def trained(tiny_job: Job, tmp_path: Path) -> Path:
    return save_run(tmp_path / "run", tiny_job)


def allow(site: Path, **more: Any) -> Path:
    """The site, whose policy lets the figures go into the model's card."""
    lines = [f"{name} = {json.dumps(value)}" for name, value in ({"audit_in_model_card": True} | more).items()]
    site.write_text(site.read_text() + "[privacy]\n" + "\n".join(lines) + "\n")
    return site


def test_a_run_is_audited_from_simulate_to_the_page(
    tiny_job: Job, site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tiny_job, site.parent.parent, tmp_path / "run")
    before = {path.name for path in (tmp_path / "run").iterdir()}
    code, said, errors = called(
        capsys, "audit", tmp_path / "run", "--site", site, "--shadows", 4, "--steps", 6, "--inversion-steps", 5
    )
    assert code == 0, errors
    for words in ("AUC", "TPR at 1 % FPR", "loss threshold", "LiRA", "the run's", "PSNR", "stays at the site"):
        assert words in " ".join(said.split()), words
    folder = site.parent / ".consilium" / "audit" / "run"
    assert {path.name for path in folder.iterdir()} == {PAGE, PICTURE, MARK}
    assert {path.name for path in (tmp_path / "run").iterdir()} == before, "the site did not allow it"
    figures = json.loads((folder / MARK).read_text())
    assert [row["attack"] for row in figures["membership"]] == [
        "loss threshold", "loss threshold", "LiRA online, 4 shadows",
    ]  # fmt: skip
    assert figures["shadow_steps"] == 6
    assert (figures["membership"][0]["members"], figures["membership"][0]["others"]) == (24, 24)
    assert len(figures["inversion"]) == 6
    shown = Image.open(folder / PICTURE)
    assert shown.size[0] > shown.size[1]
    assert "data:image/png" in (folder / PAGE).read_text()
    assert "shows a patient" in (folder / PAGE).read_text()


def test_the_steps_of_the_local_models_are_those_of_one_site_in_the_run(trained: Path, site: Path) -> None:
    found = audit(trained, site, shadows=2, inversion_steps=0)
    assert found.steps == 6  # three rounds of two
    assert not found.rebuilt
    assert found.original is None


def test_an_audit_repeats_itself(trained: Path, site: Path) -> None:
    found = [audit(trained, site, **QUICK) for _ in range(2)]
    assert page(found[0]) == page(found[1])


def test_images_are_measured_against_the_original(trained: Path, site: Path) -> None:
    found = audit(trained, site, shadows=0, inversion_steps=5)
    assert found.original is not None
    names = [item.update for item in found.rebuilt]
    assert len(set(names)) == len(names) == 6
    assert [item.update for item in found.rebuilt if item.sent] == ["raw gradient"]
    for item in found.rebuilt:
        error = np.mean((item.picture.astype(float) - found.original) ** 2)
        assert item.psnr == pytest.approx(-10 * math.log10(error), abs=1e-3)
        assert 0 <= item.picture.min() <= item.picture.max() <= 1
    files = [np.asarray(Image.open(path)) for path in (site.parent / "images").glob("*.png")]
    assert any(np.abs(image / 255 - found.original[0]).max() < 1e-4 for image in files), "one of the site's own images"


def test_a_private_job_is_audited_with_its_own_noise(tiny_job: Job, site: Path, tmp_path: Path) -> None:
    job = tiny_job.replace(
        privacy__dp="local", privacy__noise_multiplier=2.0, privacy__sampling_rate=0.5, train__class_weights="none"
    )
    found = audit(save_run(tmp_path / "private", job), site, **QUICK)
    assert found.noise == 2.0
    assert [(item.noise, item.sent) for item in found.rebuilt[1:]] == [(None, False), (0.0, False), (2.0, True)]


def test_the_noise_is_that_of_the_whole_run_however_few_steps_local_models_take(
    tiny_job: Job, site: Path, tmp_path: Path
) -> None:
    job = tiny_job.replace(
        privacy__dp="local", privacy__epsilon=2.0, privacy__accountant="rdp", train__class_weights="none"
    )
    found = audit(save_run(tmp_path / "private", job), site, **QUICK)
    assert found.noise == job_noise(job) > job_noise(job.replace(federation__rounds=2))


def test_figures_go_to_the_run_only_if_the_site_allows(trained: Path, site: Path) -> None:
    assert write_for_card(audit(trained, site, **QUICK), trained) is None
    assert not list(trained.glob("audit*"))
    file = write_for_card(audit(trained, allow(site), **QUICK), trained)
    assert file == trained / "audit-a.json"
    text = file.read_text()
    figures = json.loads(text)
    assert figures["membership"][0]["auc"]["low"] < figures["membership"][0]["auc"]["high"]
    assert ".png" not in text
    assert str(site.parent) not in text
    assert "image/png" not in text


def test_the_figures_of_one_site_do_not_replace_those_of_another(trained: Path, site: Path, tmp_path: Path) -> None:
    other = write_site(tmp_path / "data" / "b", "b", 48)
    found = [audit(trained, allow(each), shadows=0, inversion_steps=0) for each in (site, other)]
    files = {write_for_card(each, trained) for each in found}
    assert files == {trained / "audit-a.json", trained / "audit-b.json"}
    assert json.loads((trained / "audit-a.json").read_text())["site"] == "a"


def test_a_site_that_hides_its_number_of_images_gives_no_figure_that_tells_it(trained: Path, site: Path) -> None:
    found = audit(trained, allow(site, exact_counts=False, declared_images=400), **QUICK)
    file = write_for_card(found, trained)
    assert file is not None
    for row in json.loads(file.read_text())["membership"]:
        assert set(row) == {"attack", "model", "auc", "tpr_at_1_percent_fpr"}
        assert set(row["auc"]) == {"value"}
        assert round(row["auc"]["value"], 2) == row["auc"]["value"]


def test_one_page_can_be_asked_for_and_an_older_audit_is_moved_aside(trained: Path, site: Path, tmp_path: Path) -> None:
    found = audit(trained, site, **QUICK)
    assert write_audit(found, tmp_path / "o" / "it.html") == [tmp_path / "o" / "it.html"]
    folder = default_folder(trained, site)
    write_audit(found, folder)
    write_audit(found, folder)
    assert len(list(folder.parent.iterdir())) == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.doc").touch()
    with pytest.raises(UserError, match="not an audit of ours"):
        write_audit(found, tmp_path / "mine")


def test_remarks_say_what_the_figures_cannot(trained: Path, site: Path) -> None:
    write_text(trained / "rounds.jsonl", json.dumps({"event": "survey", "time": 0.0, "sites": [{"name": "b"}]}) + "\n")
    text = page(audit(trained, site, **QUICK))
    assert "a is not among the run&#x27;s sites (b)" in text
    assert "at 1 % false alarms none is allowed" in text
    assert "LiRA uses only those without the image" in text


@pytest.mark.parametrize(
    ("task", "model", "words"),
    [
        ("segmentation", "unet", "not for segmentation"),
        ("sequence", "cnn_gru", "not for sequence"),
        ("reconstruction", "autoencoder", "logarithm of each case"),
    ],
)
def test_other_tasks_are_audited_by_their_loss(task: str, model: str, words: str, tmp_path: Path) -> None:
    small = examples(task)
    job = job_from_flat({"task": task, "model.name": model, "train.device": "cpu"} | small.JOBS[model])
    site = small.site(tmp_path / "site", job, "a", 48)
    found = audit(save_run(tmp_path / "run", job), site, **QUICK)
    assert len(found.membership) == 3
    assert not found.rebuilt
    assert all(0 <= row.found.auc.low <= row.found.auc.high <= 1 for row in found.membership)
    assert words in " ".join(found.notes)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("no run", "no job.toml in it"),
        ("detection", "is a run of detection, which cannot be audited"),
        ("generation", "is a run of generation, which cannot be audited"),
        ("other classes", "label 'left'"),
        ("no site", "site.toml"),
        ("few images", "an audit needs 10 of each"),
        ("one shadow", "--shadows 1: must be 0"),
        ("no step", "--steps 0: must be 1 or more"),
        ("less than no step", "--inversion-steps -1: must be 0"),
        ("no place", "cannot write there"),
    ],
)
def test_a_mistake_is_one_line(
    what: str, said: str, tiny_job: Job, trained: Path, site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more: list[object] = []
    match what:
        case "no run":
            trained = tmp_path / "data"
        case "detection" | "generation":
            write_text(trained / "job.toml", f'task = "{what}"\n')
        case "other classes":
            trained = save_run(tmp_path / "other", tiny_job.replace(data__classes="cat,dog"))
        case "no site":
            site = tmp_path / "nowhere" / "site.toml"
        case "few images":
            site = write_site(tmp_path / "few", "few", 16)
        case "one shadow":
            more = ["--shadows", 1]
        case "no step":
            more = ["--steps", 0]
        case "less than no step":
            more = ["--inversion-steps", -1]
        case "no place":
            (tmp_path / "file").touch()
            more = ["--shadows", 0, "--inversion-steps", 0, "--out", tmp_path / "file" / "it.html"]
    code, _, errors = called(capsys, "audit", trained, "--site", site, *more)
    assert code == 2
    assert said in errors
    assert len(errors.strip().splitlines()) == 1

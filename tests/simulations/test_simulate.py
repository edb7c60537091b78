"""Whole simulations: reproducible, judged by an independent reading of the data, baselines at equal steps."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from server.store import read_events
from shared.config import Job
from shared.errors import UserError
from shared.tasks import load_task
from shared.weights import put
from simulations.simulate import run


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_one_worker_and_two_give_the_same_model_to_the_bit(three_sites: Path, tiny_job: Job, tmp_path: Path) -> None:
    job = tiny_job.replace(augment__rotate=20.0, augment__intensity=0.2, augment__flip="vertical")
    run(job, three_sites, tmp_path / "1", workers=1, pages=False)
    run(job, three_sites, tmp_path / "2", devices="cpu", per_device=2, pages=False)
    assert sha(tmp_path / "1" / "model.safetensors") == sha(tmp_path / "2" / "model.safetensors")
    assert sha(tmp_path / "1" / "last.safetensors") == sha(tmp_path / "2" / "last.safetensors")


def test_another_seed_gives_another_model(three_sites: Path, tiny_job: Job, tmp_path: Path) -> None:
    for seed in (0, 1):
        run(tiny_job.replace(seed=seed), three_sites, tmp_path / str(seed), pages=False)
    assert sha(tmp_path / "0" / "last.safetensors") != sha(tmp_path / "1" / "last.safetensors")


def test_figures_equal_those_of_the_pooled_predictions(three_sites: Path, tiny_job: Job, tmp_path: Path) -> None:
    """The oracle reads the PNGs with Pillow, runs the saved model and asks scikit-learn."""
    job = tiny_job.replace(federation__rounds=6)
    result = run(job, three_sites, tmp_path / "o", pages=False)
    model = load_task(job.task).build_model(job)
    put(model, load_file(tmp_path / "o" / "model.safetensors"), job)
    model.eval()
    truth: list[int] = []
    scores: list[float] = []
    for site in sorted(three_sites.iterdir()):
        for line in (site / "labels.csv").read_text().splitlines()[1:]:
            path, label, _, split = line.split(",")
            if split == "test":
                pixels = torch.from_numpy(np.asarray(Image.open(site / path), np.float32) / 255)
                with torch.no_grad():
                    scores.append(model((pixels[None, None] - 0.5) / 0.25).softmax(1)[0, 1].item())
                truth.append(int(label == "right"))
    federated = result.scores["federated"]
    assert federated["n"]["accuracy"] == len(truth)
    assert federated["auroc"] == pytest.approx(roc_auc_score(truth, scores), abs=1e-3)
    predicted = [score > 0.5 for score in scores]
    assert federated["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(truth, predicted))
    low, high = federated["intervals"]["auroc"]
    assert low <= federated["auroc"] <= high


def test_baselines_take_as_many_gradient_steps_and_meet_the_same_test_images(
    three_sites: Path, tiny_job: Job, tmp_path: Path
) -> None:
    result = run(tiny_job, three_sites, tmp_path / "o", baselines=True)
    scores = result.scores
    assert set(scores["local"]) == {"a", "b", "c"}
    everyone = [scores["federated"], scores["pooled"], *scores["local"].values()]
    assert {row["gradient_steps"] for row in everyone} == {3 * 2 * 3}
    assert {row["n"]["accuracy"] for row in everyone} == {scores["federated"]["n"]["accuracy"]}
    assert all(set(row["sites"]) == {"a", "b", "c"} for row in everyone)
    assert result.report.exists()
    rows = result.rows()
    assert {row["model"] for row in rows} == {"federated", "pooled", "local a", "local b", "local c"}


@pytest.mark.parametrize("secure", [False, True])
def test_the_bound_on_a_sites_change_is_not_for_baselines(
    secure: bool, three_sites: Path, tiny_job: Job, tmp_path: Path
) -> None:
    """In a round a baseline takes the steps of all sites, so it goes further than any of them may."""
    run(tiny_job, three_sites, tmp_path / "wide", baselines=True, pages=False)
    job = tiny_job.replace(federation__max_update_norm=0.4, privacy__secure_aggregation=secure)
    run(job, three_sites, tmp_path / "bound", baselines=True, pages=False)
    for model in ("pooled", "local-a", "local-b", "local-c"):
        wide, bound = (tmp_path / folder / "baselines" / model for folder in ("wide", "bound"))
        assert [event["dropped"] for event in read_events(bound) if event["event"] == "round"] == [[]] * 3
        assert sha(bound / "last.safetensors") == sha(wide / "last.safetensors")


def test_the_pooled_model_is_plain_training_on_all_images(three_sites: Path, tiny_job: Job, tmp_path: Path) -> None:
    """One site that holds everything, one federation of one: the same weights as the pooled baseline's steps."""
    run(tiny_job, three_sites, tmp_path / "o", baselines=True, pages=False)
    events = read_events(tmp_path / "o" / "baselines" / "pooled")
    (survey,) = [event for event in events if event["event"] == "survey"]
    assert [site["name"] for site in survey["sites"]] == ["pooled"]
    federated = next(event for event in read_events(tmp_path / "o") if event["event"] == "survey")
    together = {split: sum(site["images"][split] for site in federated["sites"]) for split in ("train", "val", "test")}
    assert survey["sites"][0]["images"] == together


def test_optimiser_moments_are_kept_per_site_and_dropped_by_a_new_run(
    three_sites: Path, tiny_job: Job, tmp_path: Path
) -> None:
    run(tiny_job, three_sites, tmp_path / "kept", pages=False)
    run(tiny_job.replace(train__keep_optimizer=False), three_sites, tmp_path / "fresh", pages=False)
    assert sha(tmp_path / "kept" / "last.safetensors") != sha(tmp_path / "fresh" / "last.safetensors")
    assert sorted(
        path.stem for path in (tmp_path / "kept" / "sites" / "a" / ".consilium" / "state").rglob("*.safetensors")
    ) == [
        "2",
        "3",
    ]
    assert not list((tmp_path / "fresh" / "sites").rglob("*.safetensors"))


def test_a_federation_begins_with_the_weights_of_a_file(three_sites: Path, tiny_job: Job, tmp_path: Path) -> None:
    """With hardly a rate it ends where it began; from its own start it does not come near."""
    run(tiny_job.replace(seed=5), three_sites, tmp_path / "before", pages=False)
    file = tmp_path / "before" / "last.safetensors"
    still = tiny_job.replace(train__learning_rate=1e-9)
    for name, job in {"from": still.replace(model__weights=str(file)), "own": still}.items():
        run(job, three_sites, tmp_path / name, pages=False)
    began, ended, other = (load_file(tmp_path / name / "last.safetensors") for name in ("before", "from", "own"))
    assert all(torch.allclose(ended[name], began[name], atol=1e-6) for name in began)
    assert not all(torch.allclose(other[name], began[name], atol=1e-3) for name in began)


def test_an_earlier_run_is_moved_aside_and_foreign_files_are_refused(
    three_sites: Path, tiny_job: Job, tmp_path: Path
) -> None:
    out = tmp_path / "o"
    run(tiny_job, three_sites, out, pages=False)
    before = sha(out / "model.safetensors")
    run(tiny_job.replace(seed=1), three_sites, out, pages=False)
    (kept,) = tmp_path.glob("o.before-*")
    assert sha(kept / "model.safetensors") == before
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("do not touch")
    with pytest.raises(UserError, match="not a run of ours"):
        run(tiny_job, three_sites, foreign)
    assert (foreign / "thesis.txt").read_text() == "do not touch"


def test_the_servers_own_images_are_evaluated_beside_the_sites(
    three_sites: Path, tiny_job: Job, tmp_path: Path
) -> None:
    result = run(tiny_job, three_sites, tmp_path / "o", heldout=three_sites / "c" / "site.toml", pages=False)
    assert result.scores["federated"]["server"]["n"]["accuracy"] == 40
    assert result.scores["federated"]["n"]["accuracy"] < 40


def test_every_event_is_stored_as_it_is_heard(three_sites: Path, tiny_job: Job, tmp_path: Path) -> None:
    heard: list[dict[str, object]] = []
    run(tiny_job, three_sites, tmp_path / "o", observe=lambda name, event: heard.append(event), pages=False)
    assert json.loads(json.dumps(heard)) == read_events(tmp_path / "o")


def test_sites_may_be_called_like_the_models_and_live_under_odd_paths(
    three_sites: Path, tiny_job: Job, tmp_path: Path
) -> None:
    """Names the program itself uses, and paths with a colon, a blank and a bracket."""
    data = tmp_path / "Küste: [x] daten"
    three_sites.rename(data)
    for old, new in {"a": "federated", "b": "pooled"}.items():
        file = data / old / "site.toml"
        file.write_text(file.read_text().replace(f'name = "{old}"', f'name = "{new}"'))
    scores = run(tiny_job, data, tmp_path / "o [bold]", baselines=True, pages=False).scores
    assert scores["federated"]["rounds"] == 3
    assert set(scores["local"]) == {"federated", "pooled", "c"}
    assert {row["gradient_steps"] for row in [scores["pooled"], *scores["local"].values()]} == {18}
    assert scores["local"]["pooled"] != scores["pooled"]


def test_sites_that_share_a_cache_folder_do_not_share_pixels(three_sites: Path, tiny_job: Job, tmp_path: Path) -> None:

    shutil.rmtree(three_sites / "b")
    shutil.copytree(three_sites / "a", three_sites / "b")
    for number, name in enumerate("ab"):
        file = three_sites / name / "site.toml"
        file.write_text(file.read_text().replace('name = "a"', f'name = "{name}"') + '[cache]\ndir = "../one-cache"\n')
        for image in (three_sites / name / "images").iterdir():
            Image.fromarray(np.full((16, 16), number * 200, np.uint8)).save(image, compress_level=0)
            os.utime(image, (1, 1))
    run(tiny_job, three_sites, tmp_path / "o")
    entries = [np.fromfile(file, np.uint16).max() for file in (three_sites / "one-cache").glob("*/image.raw")]
    assert sorted(entries) == sorted([0, round(200 / 255 * 65535)])


def test_a_fault_of_the_servers_own_images_shows_before_the_training(
    three_sites: Path, tiny_job: Job, tmp_path: Path
) -> None:
    table = three_sites / "c" / "labels.csv"
    held = tmp_path / "held"
    three_sites.joinpath("c").rename(held)
    table = held / "labels.csv"
    table.write_text(table.read_text().replace(",left,", ",links,", 1))
    with pytest.raises(UserError, match="label 'links'"):
        run(tiny_job, three_sites, tmp_path / "o", heldout=held / "site.toml")
    assert read_events(tmp_path / "o") == []


def test_baselines_below_the_quorum_fail_like_the_federation_with_a_report(
    three_sites: Path, tiny_job: Job, tmp_path: Path
) -> None:
    from server.rounds import RunFailed

    for image in (three_sites / "b" / "images").iterdir():
        image.write_bytes(b"not a picture")
    with pytest.raises(RunFailed, match="b: site-declined: too-many-unreadable"):
        run(tiny_job.replace(federation__min_sites=3), three_sites, tmp_path / "o", baselines=True)
    assert (tmp_path / "o" / "report.html").exists()
    assert json.loads((tmp_path / "o" / "result.json").read_text())["federated"]["rounds"] == 0

"""What a site answers to a survey: against a count and a reading of its files by another route."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from PIL import Image

from client.app import app
from shared.config import Job, job_from_flat
from shared.statistics import GREY_BINS, PATIENT_BINS, split_of, template
from shared.tasks import add_sums

SPLITS = ("train", "val", "test")


@pytest.fixture(autouse=True)
def _sender() -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


def ask(site: Path, job: Job) -> RecordDict:
    context = Context(7, 2, {"site": str(site / "site.toml")}, RecordDict(), dict(job.flat()))
    content = RecordDict({"config": ConfigRecord({"round": 0, "survey": True})})
    return app(Message(content, 2, "query"), context).content


def rules(site: Path, text: str) -> None:
    file = site / "site.toml"
    file.write_text(f"{file.read_text()}\n[privacy]\n{text}\n")


def by_hand(site: Path, split: str) -> tuple[list[dict[str, str]], np.ndarray]:
    """The rows of a split in the table, and the pixels uint8 (n, 16, 16) of its pictures, read with Pillow."""
    rows = [row for row in csv.DictReader((site / "labels.csv").open()) if row["split"] == split]
    return rows, np.stack([np.asarray(Image.open(site / row["path"])) for row in rows])


@pytest.mark.parametrize("split", SPLITS)
def test_the_sums_are_those_of_the_files(split: str, three_sites: Path, tiny_job: Job) -> None:
    site = three_sites / "c"
    reply = ask(site, tiny_job)
    assert reply["status"]["ok"]
    found = reply["metrics"]
    rows, pixels = by_hand(site, split)
    assert found[f"images-{split}"] == len(rows)
    assert found[f"classes-{split}"] == [sum(row["label"] == name for row in rows) for name in ("left", "right")]
    place = max(k for k, edge in enumerate(PATIENT_BINS) if edge <= len({row["patient"] for row in rows}))
    assert found[f"patients-{split}"] == [int(k == place) for k in range(len(PATIENT_BINS))]
    values = pixels.astype(np.float64) / 255
    assert found[f"values-{split}"] == values.size
    assert found[f"sum-{split}"] == pytest.approx(values.sum(), rel=1e-6)
    assert found[f"squares-{split}"] == pytest.approx(np.square(values).sum(), rel=1e-6)
    histogram = np.histogram(values * 255 / 256, bins=GREY_BINS, range=(0, 1))[0]  # eight of 256 levels a bin
    assert found[f"grey-{split}"] == histogram.tolist()
    part = split_of(found, split)
    assert (part.mean, part.sd) == (pytest.approx(values.mean(), rel=1e-5), pytest.approx(values.std(), rel=1e-5))


def test_sites_add_up_to_the_images_of_all(three_sites: Path, tiny_job: Job) -> None:
    whole = add_sums([dict(ask(three_sites / name, tiny_job)["metrics"]) for name in "abc"])
    values = np.concatenate([by_hand(three_sites / name, "train")[1].ravel() for name in "abc"]) / 255
    part = split_of(whole, "train")
    assert part.images == sum(len(by_hand(three_sites / name, "train")[0]) for name in "abc")
    assert (part.mean, part.sd) == (pytest.approx(values.mean(), rel=1e-5), pytest.approx(values.std(), rel=1e-5))
    assert part.patients == "40–87"  # 12, 16 and 20 patients: told as 10–19 twice, and 20–49


def test_small_cells_are_left_out_of_every_figure(three_sites: Path, tiny_job: Job) -> None:
    site = three_sites / "a"
    table = (site / "labels.csv").read_text().splitlines()
    # Of 6 validation images 4 are left, 2 right; of the test images 3 and 3; of the training images 6 and 6.
    lines = [line.replace("right", "left") if line.startswith("images/5.png") else line for line in table]
    (site / "labels.csv").write_text("\n".join(lines) + "\n")
    rules(site, "min_cell = 3")
    found = ask(site, tiny_job)["metrics"]
    rows, pixels = by_hand(site, "val")
    kept = [k for k, row in enumerate(rows) if row["label"] == "left"]
    assert 0 < len(rows) - len(kept) < 3
    assert found["classes-val"] == [len(kept), 0]
    assert found["images-val"] == len(kept)
    assert found["values-val"] == pixels[kept].size
    assert found["sum-val"] == pytest.approx(pixels[kept].sum() / 255, rel=1e-6)
    assert found["classes-test"] == [3, 3]
    assert not [count for split in SPLITS for count in found[f"grey-{split}"] if 0 < count < 3]


def test_a_split_of_very_few_images_is_not_told_of(three_sites: Path, tiny_job: Job) -> None:
    rules(three_sites / "a", "min_cell = 7")
    found = ask(three_sites / "a", tiny_job)["metrics"]
    empty = template(tiny_job)
    for key in empty:
        if key.endswith(("val", "test")):
            assert found[key] == empty[key], key


def test_of_declared_training_images_nothing_else_is_told(three_sites: Path, tiny_job: Job) -> None:
    rules(three_sites / "a", "exact_counts = false\ndeclared_images = 300")
    found = ask(three_sites / "a", tiny_job)["metrics"]
    empty = template(tiny_job)
    assert found["images-train"] == 300
    assert all(found[key] == empty[key] for key in empty if key.endswith("train") and key != "images-train")
    assert found["images-test"] > 0


@pytest.mark.parametrize("private", [False, True])
def test_a_site_that_asks_for_dp_gives_no_exact_statistics(private: bool, three_sites: Path, tiny_job: Job) -> None:
    """Whether the job has DP or not: a survey has no noise."""
    rules(three_sites / "a", "require_dp = true\nmax_epsilon = 8.0")
    job = tiny_job.replace(privacy__dp="local", privacy__epsilon=1.0, train__class_weights="none")
    reply = ask(three_sites / "a", job if private else tiny_job)
    assert set(reply) == {"status"}
    assert reply["status"]["code"] == "dp-required"


def test_the_reply_of_a_site_without_images_of_a_split_is_the_template(tiny_job: Job) -> None:
    part = split_of(template(tiny_job), "val")
    assert (part.images, part.patients) == (0, "–")
    assert np.isnan(part.mean)


def test_films_have_grey_values_and_signals_have_none(tmp_path: Path) -> None:
    flat = {"task": "sequence", "data.classes": "falling,rising"}
    signal = job_from_flat(flat | {"model.name": "gru", "data.channels": 2})
    film = job_from_flat(flat | {"model.name": "cnn_gru", "data.size": 8})
    for folder, job in (("signal", signal), ("film", film)):
        (tmp_path / folder).mkdir()
        rows = ["path,label,split"]
        for number in range(4):
            place = tmp_path / folder / f"case-{number}{'.csv' if job is signal else ''}"
            if job is signal:
                np.savetxt(place, np.random.default_rng(number).normal(size=(5, 2)), delimiter=",")
            else:
                place.mkdir()
                for step in range(3):
                    Image.fromarray(np.full((8, 8), 100 + step, np.uint8)).save(place / f"{step}.png")
            rows.append(f"{place.name},{('falling', 'rising')[number % 2]},train")
        (tmp_path / folder / "labels.csv").write_text("\n".join(rows) + "\n")
        (tmp_path / folder / "site.toml").write_text('name = "a"\n')
    found = ask(tmp_path / "signal", signal)["metrics"]
    assert (found["images-train"], found["values-train"], sum(found["grey-train"])) == (4, 0, 0)
    found = ask(tmp_path / "film", film)["metrics"]
    assert (found["images-train"], found["values-train"]) == (4, 4 * 3 * 64)
    assert found["sum-train"] == pytest.approx(4 * 64 * (100 + 101 + 102) / 255, rel=1e-5)

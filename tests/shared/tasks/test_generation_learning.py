"""A generator at work: it learns, its sheet of samples, the images it writes, and a federation of it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import shared.tasks.generation as task
from consilium.generate import generate_images
from server.store import write_model
from shared.cases import Sample, SiteData
from shared.config import Job, job_from_flat
from shared.errors import UserError
from shared.files import write_text
from shared.imaging.dataset import Dataset, load_dataset, to_uint16
from shared.samples import read_samples
from shared.tasks import load_task
from shared.tasks.generation.models import Gan, build_model
from shared.training import train
from shared.weights import exchanged

CPU = torch.device("cpu")


def job_of(**more: Any) -> Job:
    flat = {
        "task": "generation",
        "model.name": "dcgan",
        "model.width": 4,
        "model.latent": 8,
        "model.conditional": True,
        "data.classes": "left,right",
        "data.size": 12,
        "train.device": "cpu",
        "evaluation.samples": 100,
    }
    return job_from_flat(flat | {key.replace("__", "."): value for key, value in more.items()})


def data_of(n: int, split: str = "train", seed: int = 0) -> Dataset:
    """Even ones are bright on the left, by more or less; odd ones on the right."""
    generator = np.random.default_rng(seed)
    found = 0.1 * generator.random((n, 1, 12, 12))
    found[::2, :, :, :6] += generator.uniform(0.5, 0.9, (len(found[::2]), 1, 1, 1))
    found[1::2, :, :, 6:] += generator.uniform(0.5, 0.9, (len(found[1::2]), 1, 1, 1))
    return Dataset.of([Sample(str(k), (k % 2,), str(k), split) for k in range(n)], image=to_uint16(found))


def test_a_small_gan_learns_which_half_is_bright() -> None:
    job = job_of(
        model__width=8, train__learning_rate=0.004, train__batch_size=32, federation__rounds=120, train__local_steps=1
    )
    model = build_model(job)
    data, held = data_of(200), data_of(100, "test", 1)
    before = task.summarise(task.collect(model, held, job, CPU), job)
    train(model, task, data, job, site="a", first_step=0, steps=120, class_weights=[1.0])
    after = task.summarise(task.collect(model, held, job, CPU), job)
    assert after["frechet"].value < 0.5 * before["frechet"].value
    assert after["synthetic_accuracy"].value > 0.9
    pictures = model(torch.randn(40, 8), torch.arange(40) % 2)
    halves = pictures.mean((1, 2))[:, :6].mean(1) - pictures.mean((1, 2))[:, 6:].mean(1)
    assert (halves[::2] > 0).float().mean() > 0.9
    assert (halves[1::2] < 0).float().mean() > 0.9


# --- the sheet of samples ---------------------------------------------------------------------------------------------


class Shade(nn.Module):
    """A generator of plain pictures: class k has grey value (k + 1) / 5, in colour with a red tint."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.tint, self.size = torch.tensor([1.0, 0.5, 0.5])[:channels].view(1, -1, 1, 1), size

    def forward(self, noise: Tensor, classes: Tensor) -> Tensor:
        return ((classes.view(-1, 1, 1, 1) + 1) / 5 * self.tint).expand(-1, -1, self.size, self.size)


@pytest.mark.parametrize(("channels", "size", "cell"), [(1, 12, 62), (3, 12, 62), (1, 100, 102)])
@pytest.mark.parametrize("classes", ["left,right", "a,b,c"])
def test_the_sheet_has_rows_of_each_class(channels: int, size: int, cell: int, classes: str) -> None:
    job = job_of(data__channels=channels, data__size=size, data__classes=classes)
    model = build_model(job)
    model.average = Shade(channels, size)
    sheet = task.show(model, job)["samples"]
    assert sheet.dtype == np.uint8
    assert sheet.shape == (8 * cell, 8 * cell) + ((3,) if channels == 3 else ())
    assert (sheet[0] == 255).all()
    middle = sheet[cell // 2 :: cell, cell // 2 :: cell]
    count = len(job.classes)
    expected = [round((row * count // 8 + 1) / 5 * 255) for row in range(8)]
    grey = middle[..., 0] if channels == 3 else middle
    assert np.abs(grey.astype(int) - np.array(expected)[:, None]).max() <= 1
    if channels == 3:
        assert (middle[..., 1] < middle[..., 0]).all()


def test_the_sheet_shows_the_same_noise_each_time_and_leaves_the_global_generator_alone() -> None:
    job = job_of()
    model = build_model(job)
    before = torch.get_rng_state()
    first = task.show(model, job)["samples"]
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(first, task.show(model, job)["samples"])
    with torch.no_grad():
        model.average.get_buffer("last.bias").add_(1.0)
    assert not np.array_equal(first, task.show(model, job)["samples"])
    many = job_of(data__classes=",".join("abcdefghijkl"))
    assert task.show(build_model(many), many)["samples"].shape == (12 * 62, 8 * 62)


# --- images for others ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_few_images_are_the_first_of_many_and_the_classes_come_in_turn(channels: int) -> None:
    job = job_of(data__channels=channels, evaluation__batch_size=7)
    model = build_model(job)
    many, few = list(task.generate(model, job, 20, 3)), list(task.generate(model, job, 5, 3))
    assert [name for name, _ in many] == ["left", "right"] * 10
    assert all(picture.dtype == np.uint8 for _, picture in many)
    assert many[0][1].shape == ((12, 12) if channels == 1 else (12, 12, 3))
    assert all(np.array_equal(a[1], b[1]) for a, b in zip(few, many, strict=False))
    assert not np.array_equal(many[0][1], next(iter(task.generate(model, job, 1, 4)))[1])
    assert len({picture.tobytes() for _, picture in many}) == 20


def run_folder(folder: Path, job: Job) -> Path:
    """A run that ended with the weights it started from."""
    write_text(folder / "job.toml", job.toml())
    model = load_task(job.task).build_model(job)
    write_model(folder / "model.safetensors", exchanged(model, job), {"job": job.sha256, "round": "3"})
    return folder


def test_generated_images_are_a_folder_that_reads_as_a_site(tmp_path: Path) -> None:
    job = job_of()
    run = run_folder(tmp_path / "run", job)
    files = generate_images(run, 6, tmp_path / "out", seed=2)
    assert [file.name for file in files] == [f"{k:06d}-{('right', 'left')[k % 2]}.png" for k in range(1, 7)]
    expected = [picture for _, picture in task.generate(build_model(job), job, 6, 2)]
    for file, picture in zip(files, expected, strict=True):
        with Image.open(file) as image:
            assert np.array_equal(np.asarray(image), picture)
            assert "synthetic" in image.info["Comment"]
    facts = json.loads((tmp_path / "out" / "generation.json").read_text())
    assert facts["synthetic"] is True
    assert (facts["round"], facts["seed"], facts["images"], facts["job_sha256"]) == (3, 2, 6, job.sha256)
    site = SiteData("made", tmp_path / "out", format="csv", cache=tmp_path / "cache")
    samples = read_samples(site, job)
    assert sorted(sample.target for sample in samples) == [(0,)] * 3 + [(1,)] * 3
    data = load_dataset(samples, site, job)
    assert np.array_equal(data.columns["image"][0][0] // 257, expected[0])


def test_a_generator_that_is_not_told_the_class_writes_no_table(tmp_path: Path) -> None:
    files = generate_images(run_folder(tmp_path / "run", job_of(model__conditional=False)), 2, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["000001.png", "000002.png", "generation.json"]
    assert len(files) == 2


def test_class_names_that_are_no_file_names(tmp_path: Path) -> None:
    job = job_of(data__classes="no finding/ok,ö é")
    generate_images(run_folder(tmp_path / "run", job), 2, tmp_path / "out")
    with (tmp_path / "out" / "labels.csv").open(encoding="utf-8") as table:
        rows = list(csv.DictReader(table))
    assert [row["label"] for row in rows] == ["no finding/ok", "ö é"]
    assert all((tmp_path / "out" / row["path"]).is_file() for row in rows)


def test_a_run_of_another_task_makes_no_images(tmp_path: Path) -> None:
    job = job_from_flat({"data.size": 8, "model.width": 4, "train.device": "cpu"})
    with pytest.raises(UserError, match="consilium predict"):
        generate_images(run_folder(tmp_path / "run", job), 2, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_generator_predicts_nothing_and_says_what_to_do(tmp_path: Path) -> None:
    job = job_of()
    model: Gan = build_model(job)
    with pytest.raises(UserError, match="consilium generate"):
        task.predict(model, data_of(2), job, CPU)
    with pytest.raises(UserError, match="consilium generate"):
        task.write([], SiteData("a", tmp_path), job, tmp_path)

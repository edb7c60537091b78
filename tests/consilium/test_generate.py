"""`consilium generate`: as many images as asked, the same for the same seed, marked as invented."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from consilium.generate import generate_images
from shared.config import Job, job_from_flat
from tests.conftest import called, examples, save_run


def job_of(**more: object) -> Job:
    name, settings = next(iter(examples("generation").JOBS.items()))
    flat = {"task": "generation", "model.name": name} | settings | {"data.classes": "a,b,c"}
    return job_from_flat(flat | {key.replace("__", "."): value for key, value in more.items()})


def pixels(files: list[Path]) -> list[np.ndarray]:
    return [np.asarray(Image.open(file)) for file in files]


@pytest.mark.parametrize("channels", [1, 3])
def test_as_many_images_as_asked_the_same_for_the_same_seed(channels: int, tmp_path: Path) -> None:
    job = job_of(data__channels=channels, model__conditional=False)
    run = save_run(tmp_path / "run", job)
    first, again = (pixels(generate_images(run, 12, tmp_path / name, seed=5)) for name in ("a", "b"))
    other = pixels(generate_images(run, 12, tmp_path / "c", seed=6))
    assert len(first) == 12
    size = (job.data.size, job.data.size)
    assert {picture.shape for picture in first} == {size if channels == 1 else (*size, 3)}
    assert all(np.array_equal(one, two) for one, two in zip(first, again, strict=True))
    assert not any(np.array_equal(one, two) for one, two in zip(first, other, strict=True))
    assert not np.array_equal(first[0], first[1])
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        *(f"{k:06}.png" for k in range(1, 13)),
        "generation.json",
    }


def test_a_generator_that_is_told_the_class_says_which_is_which(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = job_of(model__conditional=True)
    run = save_run(tmp_path / "run", job)
    code, said, _ = called(capsys, "generate", run, "--count", 7, "--out", tmp_path / "out", "--seed", 3)
    assert code == 0
    assert f"7 invented images in {tmp_path / 'out'}" in said
    with (tmp_path / "out" / "labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [f"00000{k}-{'cab'[k % 3]}.png" for k in range(1, 8)]
    assert [row["label"] for row in rows] == ["a", "b", "c", "a", "b", "c", "a"]
    with Image.open(tmp_path / "out" / rows[0]["path"]) as picture:
        assert "synthetic" in picture.info["Comment"]
    facts = json.loads((tmp_path / "out" / "generation.json").read_text())
    assert facts["synthetic"] is True
    assert (facts["job_sha256"], facts["seed"], facts["images"]) == (job.sha256, 3, 7)


def test_of_another_task_it_says_what_to_use(tmp_path: Path, tiny_job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    run = save_run(tmp_path / "run", tiny_job)
    code, _, errors = called(capsys, "generate", run, "--count", 2, "--out", tmp_path / "out")
    assert (code, errors.count("\n")) == (2, 1)
    assert "consilium predict" in errors
    assert not (tmp_path / "out").exists()

"""Small classification jobs, data and sites: which half of the picture is bright."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from shared.cases import Sample
from shared.config import Job
from shared.imaging.dataset import Dataset

COMMON = {"data.classes": "left,right", "train.batch_size": 4, "train.local_steps": 1, "data.size": 16}
JOBS: dict[str, dict[str, object]] = {
    "cnn": COMMON | {"model.width": 4},
    "resnet18": COMMON,
    "resnet50": COMMON | {"data.size": 32},
    "densenet121": COMMON | {"data.size": 32},
    "vgg16": COMMON | {"data.size": 32},
}


def pictures(size: int, n: int, seed: int) -> np.ndarray:
    """uint8 (n, size, size): noise, brighter in the left half of even ones and the right half of odd ones."""
    found = np.random.default_rng(seed).integers(0, 120, (n, size, size)).astype(np.uint8)
    found[0::2, :, : size // 2] += 100
    found[1::2, :, size // 2 :] += 100
    return found


def split(number: int) -> str:
    """Two train, one val, one test, by turns of two."""
    return ("train", "train", "val", "test")[number // 2 % 4]


def make(job: Job, n: int, seed: int = 0) -> Dataset:
    """``n`` cases in memory."""
    images = pictures(job.data.size, n, seed).astype(np.uint16)[:, None] * 257
    images = np.repeat(images, job.data.channels, 1)
    return Dataset.of([Sample(str(k), (k % 2,), str(k), split(k)) for k in range(n)], image=images)


def site(folder: Path, job: Job, name: str, n: int, seed: int = 0) -> Path:
    """``n`` PNG files with a labels.csv; gives the site.toml."""
    folder.mkdir(parents=True)
    with (folder / "labels.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label", "split"])
        for number, picture in enumerate(pictures(job.data.size, n, seed)):
            Image.fromarray(picture).save(folder / f"{number}.png")
            rows.writerow([f"{number}.png", ("left", "right")[number % 2], split(number)])
    (folder / "site.toml").write_text(f'name = "{name}"\n')
    return folder / "site.toml"

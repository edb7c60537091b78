"""Small generation jobs, data and sites: grey pictures whose left or right half is bright."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from shared.cases import Sample
from shared.config import Job
from shared.imaging.dataset import Dataset, to_uint16

JOBS: dict[str, dict[str, object]] = {
    "dcgan": {
        "data.classes": "left,right",
        "data.size": 12,
        "model.width": 4,
        "model.latent": 8,
        "model.conditional": True,
        "train.batch_size": 4,
        "train.local_steps": 1,
        "train.learning_rate": 0.001,
        "evaluation.samples": 20,
        "evaluation.reference_rounds": 2,
    },
}


def pictures(job: Job, n: int, seed: int) -> np.ndarray:
    """(n, channels, size, size) in [0, 1]: even ones are bright on the left."""
    side = job.data.size
    found = np.random.default_rng(seed).random((n, job.data.channels, side, side)) * 0.5
    found[::2, :, :, : side // 2] += 0.5
    found[1::2, :, :, side // 2 :] += 0.5
    return found


def split(number: int) -> str:
    """Two train, one val, one test, by turns of two."""
    return ("train", "train", "val", "test")[number // 2 % 4]


def make(job: Job, n: int, seed: int = 0) -> Dataset:
    """``n`` cases in memory."""
    samples = [Sample(str(k), (k % 2,), str(k), split(k)) for k in range(n)]
    return Dataset.of(samples, image=to_uint16(pictures(job, n, seed)))


def site(folder: Path, job: Job, name: str, n: int, seed: int = 0) -> Path:
    """``n`` PNG files with a labels.csv; gives the site.toml."""
    folder.mkdir(parents=True)
    with (folder / "labels.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label", "split"])
        for number, picture in enumerate(pictures(job, n, seed)):
            values = np.rint(picture * 255).astype(np.uint8)
            grey = values[0] if len(values) == 1 else np.moveaxis(values, 0, -1)
            Image.fromarray(grey).save(folder / f"{number}.png")
            rows.writerow([f"{number}.png", ("left", "right")[number % 2], split(number)])
    (folder / "site.toml").write_text(f'name = "{name}"\n')
    return folder / "site.toml"

"""Small jobs of every reconstruction model, with data made up on the spot: normal images are smooth, anomalies not."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from shared.cases import Sample
from shared.config import Job, Scalar
from shared.imaging.dataset import Dataset, to_uint16

_TINY: dict[str, Scalar] = {
    "task": "reconstruction",
    "data.classes": "spot,plain,stripes",
    "data.normal": "plain",
    "data.size": 16,
    "model.width": 8,
    "model.latent": 8,
    "train.batch_size": 8,
    "train.learning_rate": 0.01,
    "federation.rounds": 3,
    "evaluation.every": 1,
}

JOBS: dict[str, dict[str, Scalar]] = {
    "autoencoder": _TINY | {"model.name": "autoencoder"},
    "vae": _TINY | {"model.name": "vae"},
}

_SPLITS = ("train", "train", "val", "test")


def picture(kind: str, channels: int, size: int, generator: np.random.Generator) -> np.ndarray:
    """A slope of random direction, perhaps with a bright spot or stripes; float (size, size, channels) in [0, 1]."""
    y, x = np.mgrid[0:size, 0:size] / size
    a, b = generator.uniform(-0.4, 0.4, 2)
    grey = 0.4 + a * (x - 0.5) + b * (y - 0.5)
    if kind == "spot":
        u, v = generator.uniform(0.2, 0.8, 2)
        grey = grey + 0.5 * np.exp(-((x - u) ** 2 + (y - v) ** 2) / 0.01)
    elif kind == "stripes":
        grey = grey + 0.3 * np.sign(np.sin(2 * np.pi * (x * size / 4 + generator.random())))
    tint = generator.uniform(0.8, 1.0, channels)
    clipped: np.ndarray = np.clip(grey[..., None] * tint, 0, 1)
    return clipped


def _cases(job: Job, n: int) -> list[tuple[str, str]]:
    """Kind and split of n images; two thirds are normal, anomalies come in every split."""
    kinds = ("plain", "plain", "spot", "plain", "plain", "stripes")
    return [(kinds[k % 6], _SPLITS[(k + k // 12) % 4]) for k in range(n)]


def make(job: Job, n: int, seed: int = 0) -> Dataset:
    """n images in memory as ``read_samples`` would give them: no anomaly is in the training split."""
    generator = np.random.default_rng(seed)
    samples, images = [], []
    for number, (kind, split) in enumerate(_cases(job, n)):
        if split == "train" and kind != "plain":
            kind = "plain"
        pixels = picture(kind, job.data.channels, job.data.size, generator)
        images.append(to_uint16(np.moveaxis(pixels, -1, 0)))
        samples.append(Sample(f"{number}.png", (job.classes.index(kind),), f"p{number}", split))
    return Dataset.of(samples, image=images)


def site(folder: Path, job: Job, name: str, n: int, seed: int = 0) -> Path:
    """A site of n PNG images with a labels.csv; returns its site.toml."""
    generator = np.random.default_rng([seed, *name.encode()])
    (folder / "images").mkdir(parents=True)
    with (folder / "labels.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label", "patient", "split"])
        for number, (kind, split) in enumerate(_cases(job, n)):
            pixels = np.rint(picture(kind, job.data.channels, job.data.size, generator) * 255).astype(np.uint8)
            Image.fromarray(pixels[..., 0] if job.data.channels == 1 else pixels).save(
                folder / "images" / f"{number}.png"
            )
            rows.writerow([f"images/{number}.png", kind, f"{name}-{number}", split])
    (folder / "site.toml").write_text(f'name = "{name}"\n[data]\nformat = "csv"\ncsv = "labels.csv"\n')
    return folder / "site.toml"

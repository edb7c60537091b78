"""Small segmentation jobs, data and sites: bright discs, and in some a brighter square, on noise."""

from __future__ import annotations

import csv
from pathlib import Path

import nibabel
import numpy as np
from PIL import Image

from shared.cases import Sample
from shared.config import Job
from shared.imaging.dataset import Dataset, to_uint16
from shared.tasks.segmentation.data import assemble
from shared.tasks.segmentation.models import dimensions

COMMON = {
    "data.classes": "disc,square",
    "data.size": 16,
    "data.depth": 8,
    "model.width": 4,
    "model.depth": 3,
    "train.batch_size": 4,
    "train.local_steps": 1,
}
JOBS: dict[str, dict[str, object]] = {
    "unet": COMMON | {"data.labels": "round,angular"},
    "fcn_resnet50": COMMON | {"data.size": 32},
    "unet3d": COMMON,
}


def case(job: Job, number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """An image float32 (*size) in [0, 1] and its mask uint8: a disc in all, a square in odd ones; sizes differ."""
    generator = np.random.default_rng([seed, number])
    side = job.data.size + 2 * (number % 4)
    size = (side, side + 3) if dimensions(job) == 2 else (6 + number % 4, side, side + 3)
    mask = np.zeros(size, np.uint8)
    y, x = np.mgrid[: size[-2], : size[-1]]
    cy, cx = generator.integers(4, side - 4, 2)
    mask[..., (y - cy) ** 2 + (x - cx) ** 2 <= 9] = 1
    if number % 2:
        mask[..., 1:5, 1:5] = 2
    image = generator.normal(0.3, 0.05, size) + np.array([0, 0.3, 0.5])[mask]
    return image.clip(0, 1).astype(np.float32), mask


def split(number: int) -> str:
    """Two train, one val, one test, by turns of two."""
    return ("train", "train", "val", "test")[number // 2 % 4]


def make(job: Job, n: int, seed: int = 0) -> Dataset:
    """``n`` cases in memory, as ``decode`` would give them."""
    rows = []
    for number in range(n):
        image, mask = case(job, number, seed)
        planes = np.repeat(image[None], job.data.channels, 0)
        rows.append(assemble(planes, mask, np.ones(mask.ndim), mask.shape, job))
    target = [(number % 2,) if job.labels else () for number in range(n)]
    samples = [Sample(str(k), target[k], str(k), split(k)) for k in range(n)]
    return Dataset.of(samples, **{name: [row[name] for row in rows] for name in (rows[0] if rows else {})})


def site(folder: Path, job: Job, name: str, n: int, seed: int = 0) -> Path:
    """``n`` PNG or NIfTI files in images/ with their masks in labels/, and a splits.csv; gives the site.toml."""
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
    with (folder / "splits.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "split", "patient", "label"])
        for number in range(n):
            image, mask = case(job, number, seed)
            for part, values in (("images", to_uint16(image)), ("labels", mask)):
                _save(folder / part / f"case-{number}", values)
            label = ("round", "angular")[number % 2] if job.labels else ""
            rows.writerow([f"case-{number}", split(number), f"{name}-{number}", label])
    (folder / "site.toml").write_text(f'name = "{name}"\n[data]\nformat = "masks"\n')
    return folder / "site.toml"


def _save(path: Path, values: np.ndarray) -> None:
    if values.ndim == 2:
        Image.fromarray(values).save(f"{path}.png")
    else:
        nibabel.save(nibabel.Nifti1Image(values.transpose(2, 1, 0), np.diag([1.0, 1.0, 2.0, 1.0])), f"{path}.nii.gz")

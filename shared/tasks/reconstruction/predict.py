"""A trained model on new images: how unlike the normal ones each is, and the image as the model rebuilds it."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from shared.cases import Sample, SiteData
from shared.config import Job
from shared.imaging.dataset import Dataset
from shared.tasks.reconstruction.learning import rebuild
from shared.tasks.reconstruction.metrics import psnr, squared_error, ssim


class Prediction(NamedTuple):
    """The anomaly score of an image (its mean squared error), PSNR in dB, SSIM, and the image beside what the model
    makes of it: two pictures float32 (channels, size, size) in [0, 1]."""

    score: float
    psnr: float
    ssim: float
    image: np.ndarray
    rebuilt: np.ndarray


def predict(model: nn.Module, data: Dataset, job: Job, device: torch.device) -> Iterator[Prediction]:
    """One prediction per sample, in order; a larger score is more unlike what the model was trained on."""
    for images, rebuilt in rebuild(model, data, job, device):
        errors = squared_error(images, rebuilt)
        figures = (errors.tolist(), psnr(errors).tolist(), ssim(images, rebuilt).tolist())
        pictures = (images.float().numpy(), rebuilt.float().numpy())
        for row in zip(*figures, *pictures, strict=True):
            yield Prediction(*row)


def write(predictions: Iterable[tuple[Sample, Prediction]], site: SiteData, job: Job, out: Path) -> list[Path]:
    """``scores.csv`` (path, frame, key, box, score, psnr, ssim, picture) and per image a PNG, the image on the left and
    as rebuilt on the right; returns all files, the table first."""
    folder = out / "reconstructions"
    folder.mkdir(parents=True, exist_ok=True)
    table = out / "scores.csv"
    files = [table]
    with table.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["path", "frame", "key", "box", "score", "psnr", "ssim", "picture"])
        for number, (sample, found) in enumerate(predictions, start=1):
            stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(sample.path).stem)[:80]
            picture = folder / f"{number:06d}-{stem}.png"
            _save(np.concatenate([found.image, found.rebuilt], 2), picture)
            files.append(picture)
            box = " ".join(f"{value:g}" for value in sample.box) if sample.box else ""
            figures = f"{found.score:.6g}", f"{found.psnr:.4g}", f"{found.ssim:.4f}"
            rows.writerow([sample.path, sample.frame, sample.key, box, *figures, picture.relative_to(out).as_posix()])
    return files


def _save(picture: np.ndarray, path: Path) -> None:
    """(1 or 3, height, width) in [0, 1] as an 8-bit PNG."""
    values = np.rint(picture * 255).astype(np.uint8)
    Image.fromarray(values[0] if len(values) == 1 else np.moveaxis(values, 0, -1)).save(path)

"""A trained generator makes images; there is nothing it could predict of one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from shared.cases import Sample, SiteData
from shared.config import Job
from shared.errors import UserError
from shared.imaging.dataset import Dataset
from shared.tasks.generation.learning import make_pictures, to_bytes
from shared.tasks.generation.metrics import groups
from shared.tasks.generation.models import Gan

_INSTEAD = "a generator makes images and predicts nothing; use `consilium generate RUN --count N --out DIR`"


def predict(model: Gan, data: Dataset, job: Job, device: torch.device) -> Iterator[None]:
    """Raises UserError, which names the command that is meant."""
    raise UserError(_INSTEAD)


def write(predictions: Iterable[tuple[Sample, None]], site: SiteData, job: Job, out: Path) -> list[Path]:
    """Raises UserError, which names the command that is meant."""
    raise UserError(_INSTEAD)


@torch.inference_mode()
def generate(model: Gan, job: Job, count: int, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """``count`` pictures uint8 (size, size) or (size, size, 3), each with its class, in turn; "" if it has none.

    Equal seeds give equal pictures, and the first of many are those of few.
    """
    model.eval()
    kinds = groups(job)
    classes = [number % kinds for number in range(count)]
    names = iter(job.classes[kind] if job.model.conditional else "" for kind in classes)
    for pictures in make_pictures(model, job, classes, seed, model.updates.device):
        for picture in to_bytes(pictures.permute(0, 2, 3, 1)):
            yield next(names), picture[..., 0] if job.data.channels == 1 else picture

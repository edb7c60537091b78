"""Images with one class each, read as classification reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from shared.cases import Sample, SiteData
from shared.config import Job
from shared.imaging.dataset import Dataset
from shared.tasks.classification import data as classification


class Batch(NamedTuple):
    """Normalised images float32 (b, channels, size, size) and their classes int64 (b,), on the device."""

    images: Tensor
    classes: Tensor


def read_samples(site: SiteData, job: Job) -> Iterator[Sample]:
    """All labelled images of a site; see ``shared.samples.read_samples``."""
    return classification.read_samples(site, job)


def decode(sample: Sample, site: SiteData, job: Job) -> dict[str, np.ndarray]:
    """``image``: uint16 (channels, size, size).

    Raises:
        UnreadableImage: with a code that says why.
    """
    return classification.decode(sample, site, job)


def decoded_by(job: Job) -> str:
    """What ``decode`` depends on."""
    return classification.decoded_by(job)


def batch(data: Dataset, indices: Sequence[int], job: Job, device: torch.device, train: bool) -> Batch:
    """Some images, augmented if they are to be trained on (what is varied here the generator learns to vary)."""
    images, targets, _ = classification.batch(data, indices, job, device, train)
    return Batch(images, torch.tensor([target[0] for target in targets], dtype=torch.int64, device=device))


def blank(count: int, job: Job, device: torch.device) -> Batch:
    """Random classes, as many of each on average, and no images: all that a generator's own step needs."""
    return Batch(torch.empty(count, 0, device=device), torch.randint(len(job.classes), (count,), device=device))

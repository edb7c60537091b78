"""Images of one normal class to learn from; images of all classes to be judged on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from shared.cases import Sample, SiteData
from shared.config import Job
from shared.devices import to_device
from shared.imaging.augment import augmentation, shift_and_scale
from shared.imaging.dataset import Dataset, to_float, to_uint16
from shared.imaging.prepare import fitted, harmonised, prepared_by, spacing_kept
from shared.imaging.read import Box, crop
from shared.tasks.classification.data import read_picture
from shared.tasks.classification.data import read_samples as read_labelled
from shared.tasks.reconstruction.metrics import normal_class


class Batch(NamedTuple):
    """Normalised images float32 (b, channels, size, size), and what turns them back: ``images * scale + shift``."""

    images: Tensor
    shift: Tensor | float
    scale: Tensor | float

    def pixels(self, images: Tensor) -> Tensor:
        """Normalised images as grey values 0..1."""
        return (images * self.scale + self.shift).clamp(0, 1)


def read_samples(site: SiteData, job: Job) -> Iterator[Sample]:
    """All labelled images of a site but the anomalies of its training split: nothing may be learnt from them."""
    normal = (normal_class(job),)
    return (sample for sample in read_labelled(site, job) if sample.split != "train" or sample.target == normal)


def decode(sample: Sample, site: SiteData, job: Job) -> dict[str, np.ndarray]:
    """``image``: uint16 (channels, size, size). A box is widened to a square, so that no black bars are to be rebuilt.

    ``spacing``: float64 (2,), mm per pixel of it, 0 where unknown.

    Raises:
        UnreadableImage: with a code that says why.
    """
    picture = harmonised(read_picture(sample, site), site, job)
    if sample.box:
        picture = crop(picture, square(sample.box, picture.shape[0], picture.shape[1]))
    path = site.root / sample.path
    return {"image": to_uint16(fitted(picture, path, job)), "spacing": spacing_kept(picture, path, job)}


def square(box: Box, height: int, width: int) -> Box:
    """The square about the middle of a box, as wide as its longer side, moved and cut so that it lies in the picture.

    A box without an area, or outside of the picture, stays as it is: ``crop`` refuses it.
    """
    x, y, w, h = box
    if not (w > 0 and h > 0 and -w < x < width and -h < y < height):
        return box
    side = min(max(w, h), height, width)
    left = min(max(x + w / 2 - side / 2, 0), width - side)
    top = min(max(y + h / 2 - side / 2, 0), height - side)
    return left, top, side, side


def decoded_by(job: Job) -> str:
    """What ``decode`` depends on."""
    return prepared_by(job)


def batch(data: Dataset, indices: Sequence[int], job: Job, device: torch.device, train: bool) -> Batch:
    """Some images, augmented if they are to be trained on, on the device, normalised."""
    images = to_float(data.columns["image"].take(indices))
    if train:
        images = augmentation(job)(images)
    images = to_device(images, device, torch.channels_last)
    shift, scale = shift_and_scale(images, job)
    return Batch((images - shift) / scale, shift, scale)

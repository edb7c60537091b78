"""From files to batches: images fitted to the network's input, their boxes moved and changed with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from shared.cases import Sample, SiteData
from shared.config import Job
from shared.devices import to_device
from shared.imaging.augment import changes, normalise
from shared.imaging.dataset import Dataset, to_float, to_uint16
from shared.imaging.errors import UnreadableImage
from shared.imaging.prepare import fitted, harmonised, prepared_by, spacing_kept
from shared.imaging.read import read_image
from shared.tasks.detection.boxes import LEAST_SIDE, Objects, objects_of, require_inside
from shared.tasks.detection.formats import read_samples

__all__ = ["Batch", "batch", "decode", "decoded_by", "read_samples", "shape_of", "truth"]


class Batch(NamedTuple):
    """Normalised images float32 (b, channels, size, size) on the device, and their objects as torchvision wants them.

    Each target has ``boxes`` float32 (n, 4) as x1, y1, x2, y2 and ``labels`` int64 (n,), 1 + class.
    """

    images: Tensor
    targets: list[dict[str, Tensor]]


def decode(sample: Sample, site: SiteData, job: Job) -> dict[str, np.ndarray]:
    """An image fitted to the network's input.

    Returns:
        ``image`` uint16 (channels, size, size); ``shape`` int64 (2,), height and width of the image as it was read, in
        whose pixels the sample's boxes are; ``dropped`` int64 (1,), its degenerate boxes; ``spacing`` float64 (2,), mm
        per pixel of ``image``, 0 where unknown.

    Raises:
        UnreadableImage: with a code that says why: the image or its annotation is of no use, or a box lies outside.
    """
    if sample.fault:
        raise UnreadableImage(*sample.fault)
    picture = read_image(site.root / sample.path, sample.frame, sample.box, sample.key or None)
    shape = (picture.shape[0], picture.shape[1])
    if sample.size and sample.size != shape[::-1]:
        drawn, found = ("x".join(map(str, size)) for size in (sample.size, shape[::-1]))
        raise UnreadableImage("annotated-size", f"{sample.path} is {found}, its boxes are said to lie in {drawn}")
    require_inside(sample, shape)
    return {
        "image": to_uint16(fitted(harmonised(picture, site, job), site.root / sample.path, job)),
        "spacing": spacing_kept(picture, site.root / sample.path, job),
        "shape": np.array(shape, np.int64),
        "dropped": np.array([objects_of(sample, shape, job.data.size).dropped], np.int64),
    }


def decoded_by(job: Job) -> str:
    """What ``decode`` depends on."""
    return prepared_by(job)


def shape_of(data: Dataset, i: int) -> tuple[int, int]:
    """Height and width of image i as it was read."""
    height, width = data.columns["shape"][i].tolist()
    return height, width


def truth(data: Dataset, i: int, job: Job) -> Objects:
    """The boxes of image i in pixels of the network's input."""
    return objects_of(data.samples[i], shape_of(data, i), job.data.size)


def batch(data: Dataset, indices: Sequence[int], job: Job, device: torch.device, train: bool) -> Batch:
    """Some images with their boxes, changed at random alike if they are to be trained on, on the device, normalised."""
    images = list(to_float(data.columns["image"].take(indices)))
    targets = []
    for place, index in enumerate(indices):
        found = truth(data, index, job)
        boxes, labels = torch.from_numpy(found.boxes).float(), torch.from_numpy(found.classes) + 1
        if train:
            images[place], boxes, labels = changed(images[place], boxes, labels, job)
        targets.append({"boxes": to_device(boxes, device), "labels": to_device(labels, device)})
    stacked = to_device(torch.stack(images), device, torch.channels_last)
    return Batch(normalise(stacked, job), targets)


def changed(image: Tensor, boxes: Tensor, labels: Tensor, job: Job) -> tuple[Tensor, Tensor, Tensor]:
    """An image with its boxes and labels, changed at random as ``job.augment`` says.

    Boxes are cut at the edge, and those left degenerate are dropped. A turned box is enlarged to hold its corners.
    """
    change = changes(job)
    if change is None:
        return image, boxes, labels
    from torchvision import tv_tensors

    size = (image.shape[-2], image.shape[-1])
    its_boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size)
    new, moved = change(tv_tensors.Image(image), its_boxes)
    moved = moved.as_subclass(Tensor)
    limits = torch.tensor([size[1], size[0]] * 2)
    moved = torch.minimum(moved.clamp(min=0), limits)
    kept = (moved[:, 2:] - moved[:, :2] >= LEAST_SIDE).all(1)
    return new.as_subclass(Tensor), moved[kept], labels[kept]

"""From files to patches: images and masks decoded to one grid, cut, changed at random, normalised."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from shared.cases import Sample, SiteData
from shared.composed import flagged
from shared.config import Job
from shared.devices import to_device
from shared.imaging.augment import normalise
from shared.imaging.dataset import Dataset, to_float, to_uint16
from shared.imaging.errors import UnreadableImage
from shared.imaging.grid import same_place
from shared.imaging.harmonise import grey, harmonise_volume
from shared.imaging.masks import read_mask
from shared.imaging.prepare import harmonised
from shared.imaging.read import Picture, read_image
from shared.imaging.spacing import pixel_spacing, resample
from shared.imaging.volumes import Volume, read_volume
from shared.tasks.segmentation.layouts import read_samples
from shared.tasks.segmentation.models import dimensions, patch_size
from shared.tasks.segmentation.patches import change, cut, margin, middle_start, random_start

__all__ = [
    "Batch",
    "assemble",
    "batch",
    "decode",
    "decoded_by",
    "memory_format",
    "read_samples",
    "resample",
    "whole_image",
]

_PLACES = 256  # pixels of each class remembered, so that patches can be cut where it is


class Batch(NamedTuple):
    """What a gradient step takes, on the device.

    Normalised images float32 (b, channels, *patch), their masks int64 (b, *patch) of 0 (background) to classes, and the
    class indices of the whole images.
    """

    images: Tensor
    masks: Tensor
    targets: list[tuple[int, ...]]


def decode(sample: Sample, site: SiteData, job: Job) -> dict[str, np.ndarray]:
    """An image with its mask on the job's grid.

    Returns:
        ``image`` uint16 (channels, *size), of a case of several images the channels of all, 0 where one is missing;
        ``mask`` (*size), uint8 of 0 to classes or int32 of object numbers, all 0 where the sample has none; ``pixels``
        int64 (1 + classes), how many the mask has of each; ``places`` int32 (m, 1 + axes), class and position of some
        foreground pixels; ``statistics`` float32 (2 x images,), mean and sd of each image; ``spacing`` float64 (axes,)
        in mm on the job's grid, 0 where unknown; ``size`` int64 (axes,) of the file.

    Raises:
        UnreadableImage: with a code that says why: an image or the mask cannot be read, or they differ in size.
    """
    first, *others = (_read(site.root / name, sample, site, job) for name in sample.paths or (sample.path,) if name)
    planes, spacing, volume = _stacked(first, others, sample, job), first.spacing, first.volume
    size = planes.shape[1:]
    instances = job.data.masks == "instances"
    mask = np.zeros(size, np.int32)
    if sample.mask:
        mask = read_mask(site.root / sample.mask, size, job.classes, site.label_map, instances, volume, first.path)
    mask = mask.astype(np.int32 if instances else np.uint8)
    if job.data.spacing:
        planes, mask, spacing = resample(planes, mask, spacing, job.data.spacing)
    return assemble(planes, mask, spacing, size, job)


class _Read(NamedTuple):
    """One image of a case: its values (channels, *size) in [0, 1] and where they lie."""

    path: Path
    planes: np.ndarray
    spacing: np.ndarray
    volume: Volume | None


def _read(path: Path, sample: Sample, site: SiteData, job: Job) -> _Read:
    if dimensions(job) == 3:
        volume = read_volume(path, job.data.window)
        values = harmonise_volume(volume.values, job.data.harmonise, job.data.landmarks, site.scale)
        return _Read(path, values[None], np.array(volume.spacing or (0.0, 0.0, 0.0)), volume)
    picture = harmonised(read_image(path, sample.frame, sample.box, sample.key or None), site, job)
    return _Read(path, _planes(picture, job.data.channels), pixel_spacing(path), None)


def _stacked(first: _Read, others: Sequence[_Read], sample: Sample, job: Job) -> np.ndarray:
    """The channels of all images of a case, in the order of the job; zeros for those that are missing.

    Raises:
        UnreadableImage: "images-differ", as one mask cannot lie on both.
    """
    for other in others:
        if other.planes.shape != first.planes.shape:
            sizes = " and ".join("x".join(map(str, one.planes.shape[1:])) for one in (first, other))
            raise UnreadableImage("images-differ", f"{first.path} and {other.path}: {sizes}")
        if first.volume and other.volume and not _same_place(first.volume, other.volume):
            raise UnreadableImage("images-differ", f"{first.path} and {other.path} lie elsewhere in space")
    if not job.modalities:
        return first.planes
    given = iter((first, *others))
    missing = np.zeros_like(first.planes)
    return np.concatenate([next(given).planes if name else missing for name in sample.paths])


def _same_place(a: Volume, b: Volume) -> bool:
    """Whether two volumes of one shape lie on one grid; a file that does not say where it lies is believed."""
    return a.spacing is None or b.spacing is None or same_place(a.affine, b.affine, a.values.shape)


def assemble(
    planes: np.ndarray, mask: np.ndarray, spacing: np.ndarray, size: Sequence[int], job: Job
) -> dict[str, np.ndarray]:
    """The columns of one case (see ``decode``) from its image in [0, 1], its mask, and the size of its file."""
    classes = np.minimum(mask, 1) if job.data.masks == "instances" else mask
    return {
        "image": to_uint16(planes),
        "mask": mask,
        "pixels": np.bincount(classes.reshape(-1), minlength=1 + len(job.classes)),
        "places": _places(classes, len(job.classes)),
        "statistics": np.array(
            [value(dtype=np.float64) for part in _images(planes, job) for value in (part.mean, part.std)], np.float32
        ),
        "spacing": spacing,
        "size": np.array(size, np.int64),
    }


def _images(planes: np.ndarray, job: Job) -> list[np.ndarray]:
    """The images of a case from its channels."""
    return np.split(planes, max(1, len(job.modalities)))


def decoded_by(job: Job) -> str:
    """What ``decode`` depends on."""
    data = job.data
    own = f"{dimensions(job)} {data.channels} {data.window} {data.spacing} {data.masks} {job.classes} {data.harmonise}"
    return f"{own} {data.landmarks} {len(job.modalities)}"


def _planes(picture: Picture, channels: int) -> np.ndarray:
    """(channels, H, W) of (H, W) or (H, W, 3): colour becomes grey, or grey is repeated."""
    if channels == 1:
        return grey(picture)[None]
    return np.moveaxis(picture, -1, 0) if picture.ndim == 3 else np.repeat(picture[None], channels, 0)


def _places(classes: np.ndarray, count: int) -> np.ndarray:
    """Up to ``_PLACES`` pixels of each class, evenly picked in the order of the array: int32 (m, 1 + axes)."""
    found = []
    for number in range(1, count + 1):
        flat = np.flatnonzero(classes == number)
        flat = flat[np.linspace(0, len(flat) - 1, min(len(flat), _PLACES)).astype(np.int64)]
        where = np.unravel_index(flat, classes.shape)
        found.append(np.stack([np.full(len(flat), number), *where], 1))
    return np.concatenate(found).astype(np.int32)


def memory_format(images: Tensor) -> torch.memory_format:
    """Channels last, as the weights lie."""
    return torch.channels_last if images.ndim == 4 else torch.channels_last_3d


def batch(data: Dataset, indices: Sequence[int], job: Job, device: torch.device, train: bool) -> Batch:
    """One patch of each image: changed at random to train on, else the middle as it is."""
    images, masks = zip(*(_patch(data, index, job, train) for index in indices), strict=True)
    stacked = torch.stack(images)
    return Batch(
        to_device(stacked, device, memory_format(stacked)),
        to_device(torch.stack(masks), device),
        [data.samples[index].target for index in indices],
    )


def _patch(data: Dataset, index: int, job: Job, train: bool) -> tuple[Tensor, Tensor]:
    """A patch as the network takes it, float32 (channels, *patch), and its mask int64 (*patch)."""
    image, mask = data.columns["image"][index], data.columns["mask"][index]
    patch = patch_size(job)
    start = random_start(mask.shape, patch, data.columns["places"][index]) if train else middle_start(mask.shape, patch)
    extra = margin(job, patch) if train else [0] * len(patch)
    start = [first - more for first, more in zip(start, extra, strict=True)]
    sides = [side + 2 * more for side, more in zip(patch, extra, strict=True)]
    pixels = to_float(cut(image, start, sides))
    wanted = torch.from_numpy(cut(mask, start, sides).astype(np.int64))
    if job.data.masks == "instances":
        wanted = wanted.clamp(max=1)
    if train:
        pixels, wanted = change(pixels, wanted, job)
    inner = tuple(slice(more, more + side) for more, side in zip(extra, patch, strict=True))
    return _as_input(pixels[(slice(None), *inner)], data, index, job), wanted[inner]


def whole_image(data: Dataset, index: int, job: Job) -> Tensor:
    """A whole case as the network takes it: float32 (channels, *size)."""
    return _as_input(to_float(data.columns["image"][index]), data, index, job)


def _as_input(pixels: Tensor, data: Dataset, index: int, job: Job) -> Tensor:
    """A case or a part of it, each of its images normalised, by the mean and sd of the whole one if the job says so.

    Images that are missing are 0. If the job lets images be missing, a plane per modality follows, 1 where there is
    none and 0 where there is one.
    """
    images = pixels.chunk(max(1, len(job.modalities)))
    statistics = data.columns["statistics"][index].reshape(-1, 2).tolist()
    parts = [_normalised(image, mean, sd, job) for image, (mean, sd) in zip(images, statistics, strict=True)]
    if flagged(job):
        absent = [not name for name in data.samples[index].paths]
        parts = [torch.zeros_like(part) if lacks else part for part, lacks in zip(parts, absent, strict=True)]
        parts += [torch.full_like(parts[0][:1], float(lacks)) for lacks in absent]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _normalised(image: Tensor, mean: float, sd: float, job: Job) -> Tensor:
    return (image - mean) / (sd + 1e-3) if job.data.normalise == "image" else normalise(image[None], job)[0]

"""Patches of images and masks for training: where they are cut, and how both are changed together at random."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from shared.config import Job

NEAR = 0.5  # share of the patches that are sure to hold foreground, where the image has some


def random_start(size: Sequence[int], patch: Sequence[int], places: np.ndarray) -> list[int]:
    """Where a random patch begins along each axis; below 0 where the image is smaller than the patch.

    Half of the patches hold one of ``places``, int (m, 1 + axes) of a class and a pixel of it, picked so that all
    classes come equally often; the others lie anywhere. Draws from torch's global generator.
    """
    inside: Sequence[int | None] = [None] * len(size)
    if len(places) and torch.rand(()) < NEAR:
        classes = np.unique(places[:, 0])
        chosen = places[places[:, 0] == classes[_draw(len(classes))]]
        inside = chosen[_draw(len(chosen)), 1:].tolist()
    start = []
    for length, side, place in zip(size, patch, inside, strict=True):
        low, high = min(0, length - side), max(0, length - side)
        if place is not None and length > side:
            low, high = max(low, place - side + 1), min(high, place)
        start.append(low + _draw(high - low + 1))
    return start


def _draw(n: int) -> int:
    return int(torch.randint(n, ()))


def middle_start(size: Sequence[int], patch: Sequence[int]) -> list[int]:
    """Where the patch in the middle of an image begins."""
    return [(length - side) // 2 for length, side in zip(size, patch, strict=True)]


def cut(array: np.ndarray, start: Sequence[int], patch: Sequence[int]) -> np.ndarray:
    """The patch (…, *patch) of an array (…, *size); beyond its edge the array goes on as its mirror image."""
    lead = array.ndim - len(patch)
    for axis, (first, side) in enumerate(zip(start, patch, strict=True), start=lead):
        array = array.take(mirrored(first, side, array.shape[axis]), axis)
    return array


def mirrored(first: int, count: int, length: int) -> np.ndarray:
    """Indices ``first``, … of ``count`` pixels in a row of ``length`` that repeats as its own mirror image."""
    place = np.arange(first, first + count) % (2 * length)
    return np.minimum(place, 2 * length - 1 - place)


def margin(job: Job, patch: Sequence[int]) -> list[int]:
    """Pixels to cut beyond a patch on each side, so that turning, shifting or shrinking brings in no black corners."""
    settings = job.augment
    if len(patch) == 3 or not (settings.rotate or settings.shift or settings.zoom):
        return [0] * len(patch)
    angle = math.radians(min(settings.rotate, 45.0))
    reach = (math.cos(angle) + math.sin(angle)) / (1 - settings.zoom)
    return [math.ceil(side * ((reach - 1) / 2 + settings.shift * reach)) + 1 for side in patch]


def change(image: Tensor, mask: Tensor, job: Job) -> tuple[Tensor, Tensor]:
    """Change an image (channels, *size) in [0, 1] and its mask (*size) alike at random, as ``job.augment`` says.

    Volumes are mirrored and change in intensity; they are not turned or scaled, which would blur across thick slices.
    """
    return _change_volume(image, mask, job) if mask.ndim == 3 else _change_picture(image, mask, job)


def _change_picture(image: Tensor, mask: Tensor, job: Job) -> tuple[Tensor, Tensor]:
    places, values = _picture_changes(job)
    if places is not None:
        from torchvision import tv_tensors

        changed, its_mask = places(tv_tensors.Image(image), tv_tensors.Mask(mask[None]))
        image, mask = changed.as_subclass(Tensor), its_mask.as_subclass(Tensor)[0]
    return (image if values is None else _each_alike(image, values, job)), mask


def _each_alike(image: Tensor, change: Callable[[Tensor], Tensor], job: Job) -> Tensor:
    """Change each image of a case by the same random numbers."""
    state = torch.get_rng_state()
    changed: list[Tensor] = []
    for part in image.chunk(max(1, len(job.modalities))):
        torch.set_rng_state(state)
        changed.append(change(part))
    return torch.cat(changed) if len(changed) > 1 else changed[0]


@lru_cache(maxsize=16)
def _picture_changes(job: Job) -> tuple[torch.nn.Module | None, torch.nn.Module | None]:
    """What moves pixels, of images and mask, and what changes their values, of one image; None where nothing does."""
    from torchvision.transforms import InterpolationMode, v2

    settings = job.augment
    steps: list[torch.nn.Module] = []
    if settings.flip in ("horizontal", "both"):
        steps.append(v2.RandomHorizontalFlip())
    if settings.flip in ("vertical", "both"):
        steps.append(v2.RandomVerticalFlip())
    if settings.rotate or settings.shift or settings.zoom:
        zoom = (1 - settings.zoom, 1 + settings.zoom)
        # torchvision takes shares of what it is given, which is the patch with its margin.
        size = job.data.size
        shift = settings.shift * size / (size + 2 * margin(job, (size, size))[0])
        steps.append(v2.RandomAffine(settings.rotate, (shift, shift), zoom, interpolation=InterpolationMode.BILINEAR))
    values = None
    if settings.intensity or settings.colour:
        saturation, hue = (settings.colour, settings.colour / 5) if job.data.channels == 3 else (0.0, 0.0)
        values = v2.ColorJitter(settings.intensity, settings.intensity, saturation, hue)
    return (v2.Compose(steps) if steps else None), values


def _change_volume(image: Tensor, mask: Tensor, job: Job) -> tuple[Tensor, Tensor]:
    for axis in {"horizontal": (-1,), "vertical": (-2,), "both": (-1, -2), "none": ()}[job.augment.flip]:
        if torch.rand(()) < 0.5:
            image, mask = image.flip(axis), mask.flip(axis)
    if job.augment.intensity:
        brightness, contrast = 1 + job.augment.intensity * (2 * torch.rand(2) - 1)

        def lit(part: Tensor) -> Tensor:
            part = part * brightness
            middle = part.mean()
            return torch.clamp(middle + (part - middle) * contrast, 0, 1)

        image = _each_alike(image, lit, job)
    return image, mask

"""Random changes of training images (torchvision v2), and the normalisation every network sees."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from shared.config import Job

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def normalise(images: Tensor, job: Job) -> Tensor:
    """Images (b, channels, height, width) in [0, 1] as the network takes them, about mean 0 and sd 1.

    ``fixed`` uses constants, so nothing of a site's data enters; ``image`` uses each image's own mean and sd;
    ``imagenet`` uses the constants torchvision's published weights were trained with.
    """
    shift, scale = shift_and_scale(images, job)
    return (images - shift) / scale


def shift_and_scale(images: Tensor, job: Job) -> tuple[Tensor | float, Tensor | float]:
    """What ``normalise`` takes off each image, and then divides it by; broadcastable to the images."""
    if job.data.normalise == "image":
        mean = images.mean((1, 2, 3), keepdim=True)
        return mean, images.std((1, 2, 3), keepdim=True) + 1e-3
    if job.data.normalise == "imagenet":
        mean, sd = (torch.tensor(values, device=images.device).view(1, 3, 1, 1) for values in _IMAGENET)
        if images.shape[1] == 1:
            mean, sd = mean.mean(1, keepdim=True), sd.mean(1, keepdim=True)
        return mean, sd
    return 0.5, 0.25


def augmentation(job: Job) -> Callable[[Tensor], Tensor]:
    """A function that changes each image of a batch at random, drawing from torch's global generator."""
    change = changes(job)
    return lambda images: images if change is None else torch.stack([change(image) for image in images])


@lru_cache(maxsize=16)
def changes(job: Job) -> torch.nn.Module | None:
    """``job.augment`` for one image and what belongs to it (tv_tensors: masks, boxes); None where nothing changes."""
    from torchvision.transforms import InterpolationMode, v2

    settings = job.augment
    steps: list[torch.nn.Module] = []
    if settings.flip in ("horizontal", "both"):
        steps.append(v2.RandomHorizontalFlip())
    if settings.flip in ("vertical", "both"):
        steps.append(v2.RandomVerticalFlip())
    if settings.rotate or settings.shift or settings.zoom:
        zoom, shift = (1 - settings.zoom, 1 + settings.zoom), (settings.shift, settings.shift)
        steps.append(v2.RandomAffine(settings.rotate, shift, zoom, interpolation=InterpolationMode.BILINEAR))
    if settings.intensity or settings.colour:
        saturation, hue = (settings.colour, settings.colour / 5) if job.data.channels == 3 else (0.0, 0.0)
        steps.append(v2.ColorJitter(settings.intensity, settings.intensity, saturation, hue))
    return v2.Compose(steps) if steps else None

"""Random changes of training images (torchvision v2), and the normalisation every network sees."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from shared.config import Job

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def normalise(images: Tensor, job: Job) -> Tensor:
    """Images (b, channels, height, width) in [0, 1] as the network takes them, about mean 0 and sd 1.

    ``fixed`` uses constants, so nothing of a site's data enters; ``image`` uses each image's own mean and sd;
    ``imagenet`` uses the constants torchvision's published weights were trained with.
    """
    if job.data.normalise == "image":
        mean = images.mean((1, 2, 3), keepdim=True)
        return (images - mean) / (images.std((1, 2, 3), keepdim=True) + 1e-3)
    if job.data.normalise == "imagenet":
        mean, sd = (torch.tensor(values, device=images.device).view(1, 3, 1, 1) for values in _IMAGENET)
        if images.shape[1] == 1:
            mean, sd = mean.mean(1, keepdim=True), sd.mean(1, keepdim=True)
        return (images - mean) / sd
    return (images - 0.5) / 0.25


def augmentation(job: Job) -> Callable[[Tensor], Tensor]:
    """A function that changes each image of a batch at random, drawing from torch's global generator."""
    settings = job.augment
    if not any(
        (settings.rotate, settings.shift, settings.zoom, settings.intensity, settings.colour, settings.flip != "none")
    ):
        return lambda images: images
    from torchvision.transforms import InterpolationMode, v2

    steps: list[torch.nn.Module] = []
    if settings.flip in ("horizontal", "both"):
        steps.append(v2.RandomHorizontalFlip())
    if settings.flip in ("vertical", "both"):
        steps.append(v2.RandomVerticalFlip())
    if settings.rotate or settings.shift or settings.zoom:
        zoom = (1 - settings.zoom, 1 + settings.zoom)
        steps.append(
            v2.RandomAffine(
                settings.rotate, (settings.shift, settings.shift), zoom, interpolation=InterpolationMode.BILINEAR
            )
        )
    if settings.intensity or settings.colour:
        saturation, hue = (settings.colour, settings.colour / 5) if job.data.channels == 3 else (0.0, 0.0)
        steps.append(v2.ColorJitter(settings.intensity, settings.intensity, saturation, hue))
    change = v2.Compose(steps)
    return lambda images: torch.stack([change(image) for image in images])

"""A segmenter's prediction for one case, ready to be explained: why it sees a class where it sees it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.ndimage import uniform_filter  # type: ignore[import-untyped,unused-ignore]
from torch import Tensor, nn

from shared.config import Job
from shared.explaining import Explainable, as_picture, class_number, log_odds_of_softmax, window_of
from shared.imaging.dataset import Dataset, to_float
from shared.tasks.segmentation.data import memory_format, whole_image
from shared.tasks.segmentation.learning import AT_ONCE, outcomes
from shared.tasks.segmentation.models import head_prefix, patch_size

Score = Callable[[Tensor], Tensor]


def explainable(model: nn.Module, data: Dataset, job: Job, device: torch.device, name: str = "") -> Explainable:
    """The score of class ``name``, or of the one with most pixels, for the first case of ``data``.

    It is the mean over the pixels predicted to be of that class, or over all if there are none. ``name`` may be a class
    of the whole image, too. Of an image too large to pass in one piece it is the patch with most of these pixels.

    Raises:
        UserError: the job has no class of that name.
    """
    mask = next(outcomes(model, data, job, device))[0].argmax(0).numpy()
    pixels = np.bincount(mask.reshape(-1), minlength=1 + len(job.classes))[1:]
    number = class_number(name, (*job.classes, *job.labels)) if name else int(pixels.argmax())
    region = mask == 1 + number
    place = _part(region, job)
    region = region[place]
    image = whole_image(data, 0, job)[(slice(None), *place)][None]
    image = image.to(device, memory_format=memory_format(image))
    if number < len(job.classes):
        label, where = job.classes[number], _where(region)
        score = _of_pixels(model, 1 + number, torch.from_numpy(region if region.any() else ~region).to(device))
    else:
        label, where, region = job.labels[number - len(job.classes)], "", np.zeros_like(region)
        score = _of_image(model, number - len(job.classes))
    with torch.no_grad():
        value = score(image).sigmoid().item()  # of log-odds
    pictures = _pictures(to_float(data.columns["image"][0])[(slice(None), *place)])
    return Explainable(
        image, score, label, value, pictures, tuple(f"slice {k + 1}" for k in range(len(pictures))),
        lambda values: values[0].sum(0).reshape(pictures.shape[:3]), (image.shape[1], *window_of(image.shape[2:])),
        head_prefix(job), where, region.reshape(pictures.shape[:3]),
    )  # fmt: skip


def _part(region: np.ndarray, job: Job) -> tuple[slice, ...]:
    """The whole image, or of one too large for one pass the patch with most of the region."""
    patch = patch_size(job)
    if region.size <= AT_ONCE * int(np.prod(patch)):
        return tuple(slice(0, side) for side in region.shape)
    share = uniform_filter(region.astype(np.float32), patch, mode="constant")
    centre = np.unravel_index(int(share.argmax()), share.shape)
    starts = [
        int(np.clip(middle - side // 2, 0, max(0, length - side)))
        for middle, side, length in zip(centre, patch, region.shape, strict=True)
    ]
    return tuple(slice(start, start + side) for start, side in zip(starts, patch, strict=True))


def _where(region: np.ndarray) -> str:
    count, what = int(region.sum()), "pixels" if region.ndim == 2 else "voxels"
    return f", over the {count:,} {what} it is found in (yellow edge)" if count else f"; found nowhere, so over all {what}"


def _of_pixels(model: nn.Module, channel: int, region: Tensor) -> Score:
    """The mean log-odds of a channel over a region (*size)."""

    def score(images: Tensor) -> Tensor:
        output = model(images)
        logits = output[0] if isinstance(output, tuple) else output
        return log_odds_of_softmax(logits.float())[:, channel][:, region].mean(1)

    return score


def _of_image(model: nn.Module, number: int) -> Score:
    """The log-odds of a class of the whole image."""

    def score(images: Tensor) -> Tensor:
        return log_odds_of_softmax(model(images)[1].float())[:, number]

    return score


def _pictures(image: Tensor) -> np.ndarray:
    """A picture (channels, height, width) as (1, height, width[, 3]); a volume (1, depth, …) as (depth, …)."""
    return as_picture(image)[None] if image.ndim == 3 else image[0].numpy()

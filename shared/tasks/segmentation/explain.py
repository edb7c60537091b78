"""A segmenter's prediction for one image, ready to be explained."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.ndimage import uniform_filter
from torch import Tensor, nn

from shared.config import Job
from shared.explaining import Explainable, as_picture, class_number, log_odds_of_softmax, window_of
from shared.imaging.dataset import Dataset, to_float
from shared.tasks.segmentation.data import memory_format, whole_image
from shared.tasks.segmentation.learning import both_outputs, in_one_piece, likeliest, outcomes
from shared.tasks.segmentation.models import Fcn, UNet, head_prefix, patch_size

Window = tuple[slice, ...]


def explainable(model: nn.Module, data: Dataset, job: Job, device: torch.device, name: str = "") -> Explainable:
    """The score of class ``name`` for the first case of ``data``: a class of the mask, or one of the whole image.

    A class of the mask is asked about where it was found: its log-odds are averaged over the pixels held to be it, or
    over all if there are none; ``value`` is its mean probability there. Left out, it is the class found most. Of an
    image too large to go through the network in one piece, the patch with most of the class is explained.

    Raises:
        UserError: the job has no class of that name.
    """
    chosen = class_number(name, (*job.classes, *job.labels)) if name else None
    logits, of_image = next(outcomes(model, data, job, device))
    label = -1 if chosen is None else chosen - len(job.classes)
    if label >= 0 and of_image is not None:
        nowhere = torch.zeros(logits.shape[1:], dtype=torch.bool)

        def score_of_image(images: Tensor) -> Tensor:
            return log_odds_of_softmax(model(images)[1])[:, label]

        window = _window(nowhere, job)
        where = "" if nowhere[window].shape == nowhere.shape else " of the whole image, of which the middle is shown"
        return _explainable(
            model,
            data,
            job,
            device,
            window,
            score_of_image,
            job.labels[label],
            float(of_image.softmax(0)[label]),
            where,
        )
    found = likeliest(logits)
    if chosen is None:
        chosen = int(torch.bincount(found.flatten(), minlength=1 + len(job.classes))[1:].argmax())
    number = chosen + 1
    window = _window(found == number, job)
    region = (found == number)[window]
    inside = region if region.any() else torch.ones_like(region)
    weights = (inside / inside.sum()).to(device)

    def score(images: Tensor) -> Tensor:
        odds = log_odds_of_softmax(both_outputs(model(images))[0])[:, number]
        return (odds * weights).flatten(1).sum(1)

    value = float(logits.softmax(0)[number][window][inside].mean())
    held = (
        f"the {int(region.sum()):,} {_unit(region)} held to be it" if region.any() else "all, none being held to be it"
    )
    part = "" if region.shape == found.shape else ", in the part of the image with most of it"
    return _explainable(
        model, data, job, device, window, score, job.classes[chosen], value, f" over {held}{part}", region.numpy()
    )


def _unit(region: Tensor) -> str:
    return "pixels" if region.ndim == 2 else "voxels"


def _window(place: Tensor, job: Job) -> Window:
    """The whole image if it goes through the network in one piece, else the patch that holds most of ``place``."""
    if in_one_piece(place.shape, job):
        return tuple(slice(0, length) for length in place.shape)
    patch = [min(side, length) for side, length in zip(patch_size(job), place.shape, strict=True)]
    share = uniform_filter(place.numpy().astype(np.float64), patch, mode="constant")
    best = np.argwhere(share >= share.max() - 1e-9)
    centre = best[np.abs(best - np.median(best, axis=0)).sum(1).argmin()]
    starts = [
        int(np.clip(middle - side // 2, 0, length - side))
        for middle, side, length in zip(centre, patch, place.shape, strict=True)
    ]
    return tuple(slice(start, start + side) for start, side in zip(starts, patch, strict=True))


def _explainable(
    model: nn.Module,
    data: Dataset,
    job: Job,
    device: torch.device,
    window: Window,
    score: Callable[[Tensor], Tensor],
    label: str,
    value: float,
    where: str = "",
    region: np.ndarray | None = None,
) -> Explainable:
    """What is seen through ``window`` of the first image, with its score."""
    inputs = whole_image(data, 0, job)[(slice(None), *window)][None]
    inputs = inputs.to(device, memory_format=memory_format(inputs))
    count, channels = max(1, len(job.modalities)), job.data.channels
    images = to_float(data.columns["image"][0])[(slice(None), *window)].chunk(count)
    size = images[0].shape[1:]
    there = zip(job.modalities, data.samples[0].paths, strict=True)
    named = tuple(name if path else f"{name} (missing)" for name, path in there) or ("",)
    flat = len(size) == 2
    slices = [""] if flat else [f"slice {window[0].start + index + 1}" for index in range(size[0])]

    pictures = [as_picture(image)[None] if flat else image[0].numpy() for image in images]

    def planes(values: Tensor) -> Tensor:  # the planes behind the images flag those that are missing
        return values[0, : count * channels].reshape(count, channels, *size).sum(1).reshape(-1, *size[-2:])

    return Explainable(
        inputs,
        score,
        label,
        value,
        np.concatenate(pictures),
        tuple(f"{name} {place}".strip() for name in named for place in slices),
        planes,
        (channels, *window_of(size)),
        head_prefix(job),
        where,
        None if region is None else np.tile(region.reshape(-1, *size[-2:]), (count, 1, 1)),
        extent=model.extent(size) if isinstance(model, (UNet, Fcn)) else (),
    )

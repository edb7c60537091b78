"""A classifier's prediction for one case, ready to be explained."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from shared.config import Job
from shared.explaining import Explainable, as_picture, class_number, log_odds, window_of
from shared.imaging.dataset import Dataset, to_float
from shared.tasks.classification.data import batch
from shared.tasks.classification.models import head_prefix


def explainable(model: nn.Module, data: Dataset, job: Job, device: torch.device, name: str = "") -> Explainable:
    """The score of class ``name``, or of the likeliest, for the first case of ``data``; its numbers stay as they are.

    Raises:
        UserError: the job has no class of that name.
    """
    model.eval()
    case = batch(data, [0], job, device, train=False)
    with torch.no_grad():
        number, value = likeliest(model(*case.inputs), job, name)

    def score(images: Tensor) -> Tensor:
        numbers = [part.expand(len(images), -1) for part in case.inputs[1:]]
        return log_odds(model(images, *numbers), job)[:, number]

    count, size = max(1, len(job.modalities)), case.images.shape[2:]
    pictures = to_float(data.columns["image"][0]).chunk(count)

    def planes(values: Tensor) -> Tensor:  # the planes behind the images flag those that are missing
        return values[0, : count * job.data.channels].reshape(count, job.data.channels, *size).sum(1)

    there = zip(job.modalities, data.samples[0].paths, strict=True)
    names = tuple(name if path else f"{name} (missing)" for name, path in there) or ("",)
    # Of late fusion each network's maps tell of its own image only: no layer is that of the case.
    head = "" if job.model.fusion == "late" else head_prefix(job)
    return Explainable(
        case.images, score, job.classes[number], value, np.stack([as_picture(part) for part in pictures]),
        names, planes, (job.data.channels, *window_of(size)), head,
    )  # fmt: skip


def likeliest(logits: Tensor, job: Job, name: str = "") -> tuple[int, float]:
    """The class ``name``, or the likeliest, of the first case of logits (b, classes), and its probability."""
    number = class_number(name, job.classes) if name else int(logits[0].argmax())
    shares = logits.sigmoid() if job.data.multilabel else logits.softmax(1)
    return number, float(shares[0, number])

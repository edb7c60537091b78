"""A classifier's prediction for one case, ready to be explained."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shared.config import Job
from shared.explaining import Explainable, as_picture, class_number, log_odds, window_of
from shared.imaging.dataset import Dataset, to_float
from shared.tasks.classification.data import batch
from shared.tasks.classification.models import head_prefix


def explainable(model: nn.Module, data: Dataset, job: Job, device: torch.device, name: str = "") -> Explainable:
    """The score of class ``name``, or of the likeliest, for the first case of ``data``.

    Raises:
        UserError: the job has no class of that name.
    """
    model.eval()
    images = batch(data, [0], job, device, train=False).images
    with torch.no_grad():
        logits = model(images)
    number = class_number(name, job.classes) if name else int(logits[0].argmax())
    shares = logits.sigmoid() if job.data.multilabel else logits.softmax(1)

    def score(inputs: Tensor) -> Tensor:
        return log_odds(model(inputs), job)[:, number]

    picture = as_picture(to_float(data.columns["image"][0]))
    channels, *size = images.shape[1:]
    return Explainable(
        images, score, job.classes[number], float(shares[0, number]), picture[None], ("",),
        lambda values: values.sum(1), (channels, *window_of(size)), head_prefix(job),
    )  # fmt: skip

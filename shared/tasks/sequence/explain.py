"""A sequence model's prediction for one case, ready to be explained: which frames, and where in them; which moments."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from shared.config import Job
from shared.explaining import Explainable, as_picture, log_odds, window_of
from shared.imaging.dataset import Dataset, to_float
from shared.tasks.classification.explain import likeliest
from shared.tasks.sequence.data import FRAMES, batch
from shared.tasks.sequence.models import head_prefix, reads_frames

_TALL, _WIDE = 128, 384  # pixels of the picture of a lead, at least


def explainable(model: nn.Module, data: Dataset, job: Job, device: torch.device, name: str = "") -> Explainable:
    """The score of class ``name``, or of the likeliest, for the first case of ``data``.

    Raises:
        UserError: the job has no class of that name.
    """
    model.eval()
    series, lengths, _ = batch(data, [0], job, device, train=False)
    with torch.no_grad():
        number, value = likeliest(model(series, lengths), job, name)

    def score(inputs: Tensor) -> Tensor:
        return log_odds(model(inputs, lengths.expand(len(inputs))), job)[:, number]

    label, steps, head = job.classes[number], series.shape[1], head_prefix(job)
    if reads_frames(job):
        frames = to_float(data.columns[FRAMES][0])
        pictures, names = np.stack([as_picture(frame) for frame in frames]), [f"frame {t + 1}" for t in range(steps)]
        time, *sides = window_of((steps, *series.shape[3:]))
        window = (time, series.shape[2], *sides)
        return Explainable(
            series, score, label, value, pictures, tuple(names), lambda values: values[0].sum(1), window, head
        )
    wide = math.ceil(_WIDE / steps)
    pictures = np.stack([_line(lead, wide) for lead in series[0].T.cpu().numpy()])

    def bands(values: Tensor) -> Tensor:
        return values[0].T[:, None].repeat_interleave(wide, 2).expand(-1, _TALL, -1)

    return Explainable(
        series, score, label, value, pictures, tuple(f"lead {k + 1}" for k in range(len(pictures))), bands,
        (max(1, steps // 16), 1), head, blank=series.median(1, keepdim=True).values.expand_as(series),
    )  # fmt: skip


def _line(lead: np.ndarray, wide: int) -> np.ndarray:
    """A curve (t,) as a picture float32 (_TALL, t * wide), white on grey."""
    span = max(float(np.ptp(lead)), 1e-6)
    heights = 8 + (_TALL - 16) * (lead.max() - lead) / span
    sheet = Image.new("L", (len(lead) * wide, _TALL), 90)
    points = [((t + 0.5) * wide, float(height)) for t, height in enumerate(heights)]
    ImageDraw.Draw(sheet).line(points, fill=255, width=2)
    return np.asarray(sheet, np.float32) / 255

"""The loss of one batch, and the sums by which a detector is judged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from shared.config import Job
from shared.imaging.dataset import Dataset
from shared.tasks import Sums
from shared.tasks.detection.boxes import Floats, place
from shared.tasks.detection.data import Batch, batch, shape_of, truth
from shared.tasks.detection.metrics import Tally
from shared.tasks.detection.models import entry_of


def step(model: nn.Module, batch: Batch, job: Job, class_weights: Sequence[float], part: str = "") -> Tensor:
    """The mean over the images of the sum of a detector's losses.

    Every image's loss is its own: it does not depend on the other images of the batch. So the gradient of one image is
    that of a batch of this image alone. torchvision draws the anchors and proposals that count from torch's global
    generator.
    """
    return entry_of(job).losses(model, batch.images, batch.targets).mean()


def class_weights(counts: Sequence[int], job: Job) -> list[float]:
    """Ones: a detector draws what it learns from by itself."""
    return [1.0] * len(counts)


def count_classes(data: Dataset, job: Job) -> list[int]:
    """Boxes of each class."""
    counts = np.zeros(len(job.classes), np.int64)
    for i in range(len(data)):
        counts += np.bincount(truth(data, i, job).classes, minlength=len(counts))
    return [int(count) for count in counts]


class Detections(NamedTuple):
    """What is found in one image: boxes (n, 4) as x1, y1, x2, y2 in the network's input, classes, scores."""

    boxes: Floats
    classes: npt.NDArray[np.int64]
    scores: Floats


def detect(model: nn.Module, data: Dataset, job: Job, device: torch.device) -> Iterator[Detections]:
    """What is found in each image, best first, cut at the edge of the image; what lies in the black beside is left."""
    model.eval()
    size = job.evaluation.batch_size
    for start in range(0, len(data), size):
        indices = range(start, min(start + size, len(data)))
        with torch.inference_mode():
            found = model(list(batch(data, indices, job, device, train=False).images))
        for index, outcome in zip(indices, found, strict=True):
            yield _within(outcome, shape_of(data, index), job)


def _within(outcome: dict[str, Tensor], shape: tuple[int, int], job: Job) -> Detections:
    where = place(shape, job.data.size)
    boxes = outcome["boxes"].cpu().double().numpy()
    boxes = np.clip(boxes, np.tile(where.corner, 2), np.tile(where.corner + where.sides, 2))
    classes = outcome["labels"].cpu().numpy().astype(np.int64) - 1
    kept = (boxes[:, 2:] > boxes[:, :2]).all(1) & (classes >= 0)  # label 0 is the background
    return Detections(boxes[kept], classes[kept], outcome["scores"].cpu().double().numpy()[kept])


def collect(model: nn.Module, data: Dataset, job: Job, device: torch.device) -> Sums:
    """What a model finds in a data set, as sums that add up over sites; see ``metrics.Tally.sums``."""
    tally = Tally(len(job.classes))
    for i, found in enumerate(detect(model, data, job, device)):
        own = truth(data, i, job)
        tally.add(data.samples[i].id, own.boxes, own.classes, found.boxes, found.classes, found.scores)
        tally.dropped += own.dropped
    return tally.sums()

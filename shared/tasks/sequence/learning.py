"""The loss of one batch, and the sums by which a model is judged: those of classification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from shared.config import Job
from shared.imaging.dataset import Dataset
from shared.tasks import Sums
from shared.tasks.classification.learning import class_weights, count_classes, loss_of_logits, sums_of_logits
from shared.tasks.sequence.data import Batch, batch

__all__ = ["class_weights", "collect", "count_classes", "step"]


def step(model: nn.Module, batch: Batch, job: Job, class_weights: Sequence[float], part: str = "") -> Tensor:
    """The mean over the cases of their weighted loss; no case's share depends on another."""
    return loss_of_logits(model(batch.series, batch.lengths), batch.targets, job, class_weights)


@torch.inference_mode()
def collect(model: nn.Module, data: Dataset, job: Job, device: torch.device) -> Sums:
    """What a model does on a data set, as sums that add up over sites; see ``sums_of_logits``."""
    model.eval()
    size = job.evaluation.batch_size
    batches = (
        batch(data, range(start, min(start + size, len(data))), job, device, train=False)
        for start in range(0, len(data), size)
    )
    return sums_of_logits(
        ((model(series, lengths).cpu().double(), targets) for series, lengths, targets in batches), job
    )

"""What a sequence model says of new films or signals, and the table it is written to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from shared.cases import Sample
from shared.config import Job
from shared.imaging.dataset import Dataset
from shared.samples import make_sample
from shared.tasks.classification.predict import Prediction, predictions_of_logits, write
from shared.tasks.sequence.data import batch, find_cases

__all__ = ["find", "predict", "write"]


@torch.inference_mode()
def predict(model: nn.Module, data: Dataset, job: Job, device: torch.device) -> Iterator[Prediction]:
    """One prediction for each case, in order."""
    model.eval()
    size = job.evaluation.batch_size
    for start in range(0, len(data), size):
        series, lengths, _ = batch(data, range(start, min(start + size, len(data))), job, device, train=False)
        yield from predictions_of_logits(model(series, lengths), job)


def find(path: Path, job: Job) -> list[Sample]:
    """The unlabelled films or signals in a file or folder; see ``find_cases``.

    Paths are relative to the folder, or to that of the file.
    """
    names = [case.relative_to(path).as_posix() for case in find_cases(path, job)] if path.is_dir() else [path.name]
    return [make_sample(job, name, (), name, "test", frame="middle") for name in names]

"""What a classifier says of new images, and the table it is written to."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from shared.cases import Sample, SiteData
from shared.config import Job
from shared.imaging.dataset import Dataset
from shared.tasks.classification.data import batch


class Prediction(NamedTuple):
    """``classes``: index of the likeliest class; multi-label: of every class likelier than not, perhaps none.

    ``probabilities``: of each class, in the order of the job; they add up to 1 unless multi-label.
    """

    classes: tuple[int, ...]
    probabilities: tuple[float, ...]


@torch.inference_mode()
def predict(model: nn.Module, data: Dataset, job: Job, device: torch.device) -> Iterator[Prediction]:
    """One prediction for each case, in order."""
    model.eval()
    size = job.evaluation.batch_size
    for start in range(0, len(data), size):
        found = batch(data, range(start, min(start + size, len(data))), job, device, train=False)
        yield from predictions_of_logits(model(*found.inputs), job)


def predictions_of_logits(logits: torch.Tensor, job: Job) -> Iterator[Prediction]:
    """The predictions of any classifier from its logits (b, classes)."""
    logits = logits.cpu().double()  # as in ``sums_of_logits``, so that both see the same class in front
    shares = logits.sigmoid() if job.data.multilabel else logits.softmax(1)
    for row, share in zip(logits, shares, strict=True):
        chosen = (row > 0).nonzero().flatten() if job.data.multilabel else row.argmax()[None]
        yield Prediction(tuple(chosen.tolist()), tuple(share.tolist()))


def write(predictions: Iterable[tuple[Sample, Prediction]], site: SiteData, job: Job, out: Path) -> list[Path]:
    """Write ``predictions.csv``: path, label (several written a|b), ``probability:NAME`` for each class."""
    file = out / "predictions.csv"
    # A file name may hold bytes that are no UTF-8: they go out as they came in.
    with file.open("w", newline="", encoding="utf-8", errors="surrogateescape") as table:
        rows = csv.writer(table, lineterminator="\n")
        rows.writerow(["path", "label", *(f"probability:{name}" for name in job.classes)])
        for sample, prediction in predictions:
            label = "|".join(job.classes[k] for k in prediction.classes)
            rows.writerow([sample.path, label, *(f"{share:.6f}" for share in prediction.probabilities)])
    return [file]

"""Classification metrics from sums: no score of a single image is needed, so federated equals pooled."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from shared.config import Job
from shared.intervals import Estimate, area_under_roc, mean_dependent, mean_independent, mean_of_values, proportion
from shared.tasks import Sums

# Bins of the log-odds from -LIMIT to LIMIT, narrow around 0 and ever wider outwards (equal steps of asinh), so that
# both a hardly trained and a very sure model keep their order: AUROC from them is within 1e-3 of the exact one.
BINS = 2000
LIMIT = 60.0
_FINE = 0.5


def score_bins(log_odds: Tensor) -> Tensor:
    """The bin, 0..BINS-1, of each log-odds; what lies beyond the limits (or is NaN) goes to an end."""
    bent = torch.asinh(log_odds.nan_to_num(nan=-LIMIT).clamp(-LIMIT, LIMIT) / _FINE) / math.asinh(LIMIT / _FINE)
    place = (bent + 1) / 2 * BINS
    return place.long().clamp(0, BINS - 1)


def histograms(sums: Sums, job: Job) -> tuple[np.ndarray, np.ndarray]:
    """Score histograms of images with and without each class, both int64 (classes, BINS)."""
    shape = (len(job.classes), BINS)
    return tuple(np.asarray(sums[key], dtype=np.int64).reshape(shape) for key in ("positives", "negatives"))  # type: ignore[return-value]


def area_from_histograms(positives: np.ndarray, negatives: np.ndarray) -> Estimate:
    """AUROC of one class: the chance that an image with it scores above one without, ties counting half."""
    pos, neg = int(positives.sum()), int(negatives.sum())
    if not pos or not neg:
        return area_under_roc(0.5, 0, 0)
    below = np.cumsum(negatives) - negatives
    area = float((positives * (below + negatives / 2)).sum() / (pos * neg))
    return area_under_roc(area, pos, neg)


def roc_points(positives: np.ndarray, negatives: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False- and true-positive rates of one class over all thresholds, from (0, 0) to (1, 1)."""
    rates = [np.concatenate([[0.0], np.cumsum(h[::-1]) / max(h.sum(), 1)]) for h in (negatives, positives)]
    corner = np.unique(np.stack(rates, 1), axis=0)
    return corner[:, 0], corner[:, 1]


def confusion_matrix(sums: Sums, job: Job) -> np.ndarray:
    """int64 (classes, classes), row = truth; multi-label: (labels, 2, 2), [truth, prediction]."""
    counts = np.asarray(sums["confusion"], dtype=np.int64)
    classes = len(job.classes)
    return counts.reshape((classes, 2, 2) if job.data.multilabel else (classes, classes))


def consistent(sums: Sums, job: Job) -> bool:
    """Whether the counts of one site agree: every image once in the confusion counts and in each class's histograms."""
    n, labels = sums["n"], len(job.classes) if job.data.multilabel else 1
    counts = [int(value) for value in sums["confusion"]]  # type: ignore[union-attr]
    both = np.asarray(sums["positives"], dtype=np.int64) + np.asarray(sums["negatives"], dtype=np.int64)
    per_class = both.reshape(len(job.classes), BINS).sum(1).tolist()
    missing = [int(value) for value in sums.get("missing", [])]  # type: ignore[union-attr]
    return sum(counts) == n * labels and all(total == n for total in per_class) and all(m <= n for m in missing)  # type: ignore[operator]


def summarise(sums: Sums, job: Job) -> dict[str, Estimate]:
    """Metrics with 95 % intervals: auroc (macro, one against rest), balanced_accuracy, accuracy, loss, auroc:<class>.

    Classes of which the data hold no image (or nothing else) are left out of the means.
    """
    n = int(sums["n"])  # type: ignore[arg-type]
    areas = [area_from_histograms(pos, neg) for pos, neg in zip(*histograms(sums, job), strict=True)]
    matrix = confusion_matrix(sums, job)
    if job.data.multilabel:
        per_label = [
            mean_independent([proportion(m[1, 1], m[1].sum()), proportion(m[0, 0], m[0].sum())]) for m in matrix
        ]
        balanced = mean_dependent(per_label)
        right, of = int(sum(m.trace() for m in matrix)), n * len(job.classes)
    else:
        balanced = mean_independent([proportion(row[k], row.sum()) for k, row in enumerate(matrix)])
        right, of = int(matrix.trace()), n
    found = {
        "auroc": mean_dependent(areas),
        "balanced_accuracy": balanced,
        "accuracy": proportion(right, of),
        "loss": mean_of_values(float(sums["loss"]), float(sums["loss_squares"]), n),  # type: ignore[arg-type]
    }
    if len(job.classes) > 2 or job.data.multilabel:
        found |= {f"auroc:{name}": area for name, area in zip(job.classes, areas, strict=True)}
    return found

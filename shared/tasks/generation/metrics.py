"""How good a generator is, from sums: what leaves a site is moments, counts and histograms, never a single image's."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from shared.config import Job
from shared.intervals import NOTHING, Estimate, mean_independent, proportion
from shared.tasks import Sums
from shared.tasks.generation.frechet import Moments, estimate, moments

BINS = 2000  # of the distance to the nearest training image, which lies in [0, 1]
NEAR = 0.05  # a sample counts as near if this share of held-out images is nearer to a training image


def groups(job: Job) -> int:
    """How many kinds of samples are made: one per class if the generator is told the class."""
    return len(job.classes) if job.model.conditional else 1


def made_per_group(job: Job) -> int:
    """Samples of each kind in an evaluation."""
    return math.ceil(job.evaluation.samples / groups(job))


def distance_bins(distances: Tensor) -> Tensor:
    """The bin, 0..BINS-1, of each distance in [0, 1]."""
    return (distances * BINS).long().clamp(0, BINS - 1)


def _table(sums: Sums, key: str) -> np.ndarray:
    return np.asarray(sums[key], dtype=np.float64)


def _moments(sums: Sums, kind: str) -> Moments:
    return moments(_table(sums, f"{kind}_features"), _table(sums, f"{kind}_pairs"), float(sums["n"]))  # type: ignore[arg-type]


def consistent(sums: Sums, job: Job) -> bool:
    """Whether the sums of one site agree: every image counted once, no variance negative, as many samples as asked."""
    n = int(sums["n"])  # type: ignore[arg-type]
    held, made = int(_table(sums, "held_distances").sum()), int(_table(sums, "made_distances").sum())
    counted = held in (0, n) and made == held * made_per_group(job)
    if job.model.conditional:
        counted = counted and int(_table(sums, "confusion").sum()) == n
    return counted and all(_no_negative_variance(sums, kind, n) for kind in ("real", "made"))


def _no_negative_variance(sums: Sums, kind: str, n: int) -> bool:
    """The sum of squares of each feature is at least its sum squared over n; rounding is allowed for."""
    total, pairs = _table(sums, f"{kind}_features"), _table(sums, f"{kind}_pairs")
    rows, columns = np.triu_indices(len(total))
    squares = pairs[rows == columns]
    return bool(np.all(np.square(total) <= n * squares * (1 + 1e-6)))


def summarise(sums: Sums, job: Job) -> dict[str, Estimate]:
    """Metrics with 95 % intervals.

    frechet: see ``frechet.estimate``. synthetic_accuracy: balanced accuracy on real images of a classifier that saw
    only samples; nothing where the generator is not told the class. memorised: see ``_memorised``.
    """
    n = int(sums["n"])  # type: ignore[arg-type]
    samples = made_per_group(job) * groups(job)
    distance = estimate(_moments(sums, "real"), n, _moments(sums, "made"), samples) if n else NOTHING
    accuracy = NOTHING
    if job.model.conditional:
        matrix = _table(sums, "confusion").reshape(len(job.classes), -1)
        accuracy = mean_independent([proportion(row[k], row.sum()) for k, row in enumerate(matrix)])
    copies = _memorised(_table(sums, "held_distances"), _table(sums, "made_distances"), samples)
    return {"frechet": distance, "synthetic_accuracy": accuracy, "memorised": copies}


def _memorised(held: np.ndarray, made: np.ndarray, samples: int) -> Estimate:
    """The share of samples nearer to a training image than all but 5 % of held-out real images are.

    Near .05 where the generator copies nothing, 1 where all it gives is training images (after Meehan et al. 2020). The
    interval covers both the samples and, by the same held-out share at the ends of its own interval, the limit.
    """
    if not held.sum() or not made.sum():
        return NOTHING
    shares = [proportion(_share_below(made, _place(held, NEAR)) * samples, samples)]
    limit = proportion(NEAR * held.sum(), held.sum())
    low, high = (_share_below(made, _place(held, share)) for share in (limit.low, limit.high))
    found = shares[0]
    below = math.hypot(found.value - found.low, found.value - low)
    above = math.hypot(found.high - found.value, high - found.value)
    return Estimate(found.value, max(found.value - below, 0.0), min(found.value + above, 1.0), samples)


def _place(histogram: np.ndarray, share: float) -> float:
    """Where, in bins from the left, the histogram has so much of its mass below; even within a bin."""
    mass = np.concatenate([[0.0], np.cumsum(histogram)]) / histogram.sum()
    upper = int(np.searchsorted(mass, share))
    lower = max(upper - 1, 0)
    step = mass[upper] - mass[lower]
    return lower + (share - mass[lower]) / step if step > 0 else float(upper)


def _share_below(histogram: np.ndarray, place: float) -> float:
    """The share of the histogram's mass left of ``place``; even within a bin."""
    mass = np.concatenate([[0.0], np.cumsum(histogram)]) / histogram.sum()
    return float(np.interp(place, np.arange(len(mass)), mass))

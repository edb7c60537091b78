"""Do probabilities mean what they say? From the same score histograms as AUROC, so nothing more leaves a site.

A histogram's bin stands for the probability in its middle. No bin is wider than 0.0013, so what is computed here agrees
with the exact figures to about as much.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from shared.intervals import NOTHING, Estimate, mean_of_values, proportion
from shared.tasks.classification.metrics import _FINE, BINS, LIMIT

GROUPS = 10  # of equal width in probability
_DRAWS = 400


class Group(NamedTuple):
    """Cases of similar predicted probability: the mean of it, the share that has the class, the number of cases."""

    predicted: float
    observed: Estimate
    n: int


def bin_probabilities() -> np.ndarray:
    """The probability in the middle of each score bin, float64 (BINS,), ascending from 0 to 1."""
    bent = (np.arange(BINS) + 0.5) / BINS * 2 - 1
    log_odds = _FINE * np.sinh(bent * math.asinh(LIMIT / _FINE))
    return np.asarray(1 / (1 + np.exp(-log_odds)))


def reliability(positives: np.ndarray, negatives: np.ndarray, groups: int = GROUPS) -> list[Group]:
    """The reliability curve of one class: groups of equal width in predicted probability that hold any case.

    Args:
        positives, negatives: score histograms, int (BINS,), of cases with and without the class.
    """
    p = bin_probabilities()
    place = np.minimum((p * groups).astype(int), groups - 1)
    found = []
    for group in range(groups):
        here = place == group
        with_it, n = int(positives[here].sum()), int((positives + negatives)[here].sum())
        if n:
            mean = float((p * (positives + negatives))[here].sum() / n)
            found.append(Group(mean, proportion(with_it, n), n))
    return found


def calibration_error(positives: np.ndarray, negatives: np.ndarray, groups: int = GROUPS) -> Estimate:
    """Expected calibration error of one class (Naeini et al. 2015), equal-width groups: 0 is calibrated.

    The interval is that of a parametric bootstrap over the histograms (Poisson counts, 400 draws, always the same).
    Chance alone makes the figure positive: it is about √(groups / n) / 3 of a calibrated model.
    """
    n = int(positives.sum() + negatives.sum())
    if not n:
        return NOTHING
    value = float(_errors(positives[None], negatives[None], groups)[0])
    generator = np.random.default_rng(0)
    drawn = [generator.poisson(histogram, (_DRAWS, BINS)) for histogram in (positives, negatives)]
    low, high = np.quantile(_errors(drawn[0], drawn[1], groups), [0.025, 0.975])
    return Estimate(value, min(float(low), value), max(float(high), value), n)


def _errors(positives: np.ndarray, negatives: np.ndarray, groups: int) -> np.ndarray:
    """The error of each row of histograms (rows, BINS)."""
    p = bin_probabilities()
    place = np.minimum((p * groups).astype(int), groups - 1)
    member = np.eye(groups)[place]  # (BINS, groups)
    gap = np.abs((positives * (1 - p) - negatives * p) @ member)  # Σ (y - p) of each group
    whole = np.maximum((positives + negatives).sum(1), 1)
    return np.asarray(gap.sum(1) / whole)


def brier(positives: np.ndarray, negatives: np.ndarray) -> Estimate:
    """Brier score of one class against the rest: the mean of (probability - truth)²; 0 is best, 0.25 a coin's."""
    p = bin_probabilities()
    n = int(positives.sum() + negatives.sum())
    squares = positives * (1 - p) ** 2 + negatives * p**2
    fourths = positives * (1 - p) ** 4 + negatives * p**4
    return mean_of_values(float(squares.sum()), float(fourths.sum()), n)


def threshold(positives: np.ndarray, negatives: np.ndarray) -> float:
    """The probability above which to say *yes*, that makes sensitivity + specificity largest (Youden 1950).

    Of equally good ones the nearest to one half; NaN where there are not both kinds of cases.
    """
    if not positives.sum() or not negatives.sum():
        return math.nan
    # Saying yes from bin k on: what is at or above k. The edge below bin k is the threshold.
    sensitivity = np.cumsum(positives[::-1])[::-1] / positives.sum()
    specificity = 1 - np.cumsum(negatives[::-1])[::-1] / negatives.sum()
    gain = sensitivity + specificity
    edges = bin_edges()[:-1]
    best = np.flatnonzero(gain >= gain.max() - 1e-12)
    return float(edges[best[np.abs(edges[best] - 0.5).argmin()]])


def at_threshold(positives: np.ndarray, negatives: np.ndarray, probability: float) -> tuple[Estimate, Estimate]:
    """Sensitivity and specificity when *yes* is said from this probability on, which is the edge of a bin."""
    yes = bin_edges()[:-1] >= probability - 1e-12
    hit, passed = int(positives[yes].sum()), int(negatives[~yes].sum())
    return proportion(hit, int(positives.sum())), proportion(passed, int(negatives.sum()))


def bin_edges() -> np.ndarray:
    """The probabilities between which the score bins lie, float64 (BINS + 1,), ascending from 0 to 1."""
    bent = np.arange(BINS + 1) / BINS * 2 - 1
    return np.asarray(1 / (1 + np.exp(-_FINE * np.sinh(bent * math.asinh(LIMIT / _FINE)))))


def figures(named: Sequence[tuple[str, np.ndarray, np.ndarray]]) -> dict[str, dict[str, list[float] | int]]:
    """For result.json: by class, ``calibration_error`` and ``brier`` as [value, low, high] and ``n``."""
    found: dict[str, dict[str, list[float] | int]] = {}
    for name, positives, negatives in named:
        error, score = calibration_error(positives, negatives), brier(positives, negatives)
        if error.n:
            found[name] = {
                "calibration_error": [error.value, error.low, error.high],
                "brier": [score.value, score.low, score.high],
                "n": error.n,
            }
    return found

"""95 % confidence intervals from sums alone, so that a federation can report them without seeing a single case."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z = 1.959963984540054  # two-sided 95 % of the standard normal


@dataclass(frozen=True)
class Estimate:
    """A metric with its 95 % interval and the number of cases behind it. All NaN where nothing could be computed."""

    value: float
    low: float
    high: float
    n: int


NOTHING = Estimate(math.nan, math.nan, math.nan, 0)


def proportion(successes: float, n: float) -> Estimate:
    """A share with Wilson's score interval (Wilson 1927), which behaves at 0, at 1 and for small n."""
    if n <= 0:
        return NOTHING
    p = successes / n
    middle = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    # At the ends the score interval touches 0 or 1; rounding must not leave the estimate outside.
    return Estimate(p, min(max(middle - half, 0.0), p), max(min(middle + half, 1.0), p), int(n))


def area_under_roc(area: float, positives: int, negatives: int) -> Estimate:
    """AUROC with Newcombe's score-type interval (Statistics in Medicine 2006;25:559, method 5).

    It needs only the area and the two counts and keeps a sensible width where the area is 1 (the variance of
    Hanley and McNeil at the limit instead of at the estimate).
    """
    if positives <= 0 or negatives <= 0:
        return NOTHING

    def gap(theta: float) -> float:
        star = (positives + negatives) / 2 - 1
        spread = theta * (1 - theta) * (1 + star * (1 - theta) / (2 - theta) + star * theta / (1 + theta))
        return (theta - area) ** 2 - Z * Z * spread / (positives * negatives)

    return Estimate(area, _root(gap, 0.0, area), _root(gap, 1.0, area), positives + negatives)


def _root(gap: object, outside: float, inside: float) -> float:
    """Where ``gap`` turns from positive (at ``outside``) to negative (next to ``inside``), by bisection."""
    for _ in range(100):
        middle = (outside + inside) / 2
        outside, inside = (middle, inside) if gap(middle) > 0 else (outside, middle)  # type: ignore[operator]
    return (outside + inside) / 2


def mean_independent(parts: Sequence[Estimate]) -> Estimate:
    """The plain mean of estimates from disjoint cases; interval by squaring and adding (MOVER, Zou & Donner 2008)."""
    parts = [part for part in parts if part.n]
    if not parts:
        return NOTHING
    value = sum(part.value for part in parts) / len(parts)
    below = math.sqrt(sum((part.value - part.low) ** 2 for part in parts)) / len(parts)
    above = math.sqrt(sum((part.high - part.value) ** 2 for part in parts)) / len(parts)
    return Estimate(value, value - below, value + above, sum(part.n for part in parts))


def mean_dependent(parts: Sequence[Estimate]) -> Estimate:
    """The plain mean of estimates from the same cases; the mean of the bounds, wide enough for any correlation."""
    parts = [part for part in parts if part.n]
    if not parts:
        return NOTHING
    low, value, high = (sum(getattr(part, name) for part in parts) / len(parts) for name in ("low", "value", "high"))
    return Estimate(value, low, high, max(part.n for part in parts))


def mean_of_values(total: float, squares: float, n: int) -> Estimate:
    """The mean of n values from their sum and sum of squares, with the normal interval."""
    if n <= 0:
        return NOTHING
    mean = total / n
    variance = max(squares / n - mean * mean, 0.0) * n / max(n - 1, 1)
    half = Z * math.sqrt(variance / n)
    return Estimate(mean, mean - half, mean + half, n)

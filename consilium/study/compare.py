"""Honest statistics of few repetitions: means over seeds with their intervals, differences paired by seed.

Intervals are Student's, two-sided: value ± t(n - 1) · sd / √n (Student 1908). They say how much training varies from
seed to seed; the sampling of the test images is another matter, which the interval of each single run tells. Several
comparisons at once are widened after Bonferroni, so that all of them hold together with 95 %.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from scipy.stats import t as student

LEVEL = 0.95


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation of n values with the interval of the mean; NaN where there are too few."""

    mean: float
    sd: float
    low: float
    high: float
    n: int

    def within(self, least: float, most: float) -> Spread:
        """With its interval cut at what the value can be: Student's knows no limits, and of two seeds it is wide."""
        return replace(self, low=max(self.low, least), high=min(self.high, most)) if self.n > 1 else self

    @property
    def above(self) -> bool:
        """The whole interval lies above zero."""
        return self.low > 0

    @property
    def below(self) -> bool:
        """The whole interval lies below zero."""
        return self.high < 0


NONE = Spread(math.nan, math.nan, math.nan, math.nan, 0)


def spread(values: Sequence[float], comparisons: int = 1) -> Spread:
    """Mean, sd (n - 1) and the 95 % interval of the mean, widened for so many ``comparisons`` at once.

    Values that are not finite are left out, and do not count in n; one value has neither sd nor interval.
    """
    values = [value for value in values if math.isfinite(value)]
    n = len(values)
    if not n:
        return NONE
    mean = math.fsum(values) / n
    if n == 1:
        return Spread(mean, math.nan, math.nan, math.nan, 1)
    sd = statistics.stdev(values)
    half = float(student.ppf(1 - (1 - LEVEL) / 2 / comparisons, n - 1)) * sd / math.sqrt(n)
    return Spread(mean, sd, mean - half, mean + half, n)


def paired(ours: Mapping[int, float], theirs: Mapping[int, float], sign: int, comparisons: int = 1) -> Spread:
    """Ours minus theirs over the seeds that both have; times ``sign``, so that above zero is better for us."""
    return spread([sign * (ours[seed] - theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())], comparisons)


def front(points: Mapping[str, tuple[float, ...]]) -> set[str]:
    """Names of the points that no other dominates: as good in every coordinate, better in one; less is better.

    A point with a coordinate that is NaN is on no front.
    """
    known = {name: point for name, point in points.items() if not any(map(math.isnan, point))}
    return {
        name
        for name, point in known.items()
        if not any(
            other != point and all(theirs <= own for theirs, own in zip(other, point, strict=True))
            for other in known.values()
        )
    }

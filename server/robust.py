"""Robust aggregators: what becomes of the model when some sites send anything at all, by mistake or by intent.

Each is a pure function like those of ``server.aggregation``. All are deterministic, do not depend on the order of the
replies but for rounding, and give identical replies back to the bit. What a site says its weight is cannot be checked,
so only those named "weighted" use it. Integer buffers get the same rule, rounded; distances are between the floating
numbers, the running statistics of BatchNorm included: they can be poisoned as weights can.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from torch import Tensor

from server.aggregation import Arrays, weighted_mean
from server.gathered import Gathered
from shared.config import Job
from shared.pairs import fewest

Replies = Iterable[tuple[float, Arrays]]
_STEPS, _CLOSE, _SMOOTH = 1000, 1e-12, 1e-9  # of the geometric median


def median(replies: Replies, before: Arrays, job: Job) -> dict[str, Tensor]:
    """The median of every number (Yin et al. 2018); of an even count the mean of the two in the middle."""

    def middle(numbers: np.ndarray) -> np.ndarray:
        low, high = (len(numbers) - 1) // 2, len(numbers) // 2
        ordered = np.partition(numbers, (low, high), axis=0)
        return _mean(ordered[low : high + 1])

    with Gathered(replies, job) as gathered:
        return gathered.by_number(middle)


def trimmed_mean(replies: Replies, before: Arrays, job: Job) -> dict[str, Tensor]:
    """The mean of every number without the ``federation.trim`` smallest and largest (Yin et al. 2018), rounded down."""

    def inner(numbers: np.ndarray) -> np.ndarray:
        cut = int(job.federation.trim * len(numbers))
        return _mean(np.sort(numbers, axis=0)[cut : len(numbers) - cut])

    with Gathered(replies, job) as gathered:
        return gathered.by_number(inner)


def krum(replies: Replies, before: Arrays, job: Job) -> dict[str, Tensor]:
    """The one reply with the least sum of squared distances to its n - f - 2 nearest (Blanchard et al. 2017).

    n are the replies, f = ``federation.byzantine``.

    Raises:
        TooFew: n is less than 2 f + 3.
    """
    with Gathered(replies, job, fewest(job)) as gathered:
        best = _ranked(gathered, before, job)[0]
        return {name: array.clone() for name, array in gathered.arrays[best].items()}


def multikrum(replies: Replies, before: Arrays, job: Job) -> dict[str, Tensor]:
    """The weighted mean of the ``federation.selected`` replies that Krum ranks first (Blanchard et al. 2017).

    0 selects n - f - 2, the most for which El Mhamdi et al. 2018 prove something.

    Raises:
        TooFew: n is less than 2 f + 3.
    """
    with Gathered(replies, job, fewest(job)) as gathered:
        most = job.federation.selected or len(gathered) - job.federation.byzantine - 2
        chosen = sorted(_ranked(gathered, before, job)[:most])
        return weighted_mean((gathered.weights[i], gathered.arrays[i]) for i in chosen)


def bulyan(replies: Replies, before: Arrays, job: Job) -> dict[str, Tensor]:
    """Of the n - 2 f replies that Krum ranks first, the mean of every number's n - 4 f nearest to their median.

    El Mhamdi et al. 2018; replies are ranked once, as in Flower, not again after each that is taken.

    Raises:
        TooFew: n is less than 4 f + 3.
    """
    with Gathered(replies, job, fewest(job)) as gathered:
        bad = job.federation.byzantine
        chosen = sorted(_ranked(gathered, before, job)[: len(gathered) - 2 * bad])
        keep = len(chosen) - 2 * bad

        def nearest(numbers: np.ndarray) -> np.ndarray:
            # Sorted, the nearest to the median stand side by side: the window of least width around it.
            ordered = np.sort(numbers[chosen], axis=0).astype(np.float64)
            away = np.abs(ordered - np.median(ordered, axis=0))
            picked = np.argpartition(away, keep - 1, axis=0)[:keep]
            return _mean(np.take_along_axis(ordered, picked, axis=0))

        return gathered.by_number(nearest)


def geometric_median(replies: Replies, before: Arrays, job: Job) -> dict[str, Tensor]:
    """The point with the least weighted sum of distances to the replies (RFA, Pillutla et al. 2022), by Weiszfeld.

    It is a weighted mean of the replies, so the iterations need their inner products only: the replies are read twice,
    however many there are.
    """
    with Gathered(replies, job) as gathered:
        shares = _weiszfeld(gathered.products(before), np.array(gathered.weights))

        return gathered.by_number(lambda numbers: shares @ numbers.astype(np.float64))


def _weiszfeld(products: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Shares (n,) of points with these inner products (n, n) in their geometric median; the shares add up to 1."""
    own = np.diag(products)
    shares: np.ndarray = weights / weights.sum()
    smooth = _SMOOTH * np.sqrt(np.median(own)) + 1e-300
    for _ in range(_STEPS):
        squared = own - 2 * products @ shares + shares @ products @ shares
        new = weights / np.maximum(np.sqrt(np.maximum(squared, 0.0)), smooth)
        new /= new.sum()
        done = np.abs(new - shares).max() <= _CLOSE
        shares = new
        if done:
            break
    return shares


def _ranked(gathered: Gathered, before: Arrays, job: Job) -> list[int]:
    """The replies by Krum's score, best first; of equals the smaller change, so that their order does not matter."""
    products = gathered.products(before)
    own = np.diag(products)
    distances = np.maximum(own[:, None] + own - 2 * products, 0.0)
    np.fill_diagonal(distances, np.inf)
    closest = len(gathered) - job.federation.byzantine - 2
    scores = np.sort(distances, axis=1)[:, :closest].sum(axis=1)
    return sorted(range(len(gathered)), key=lambda i: (scores[i], own[i]))


def _mean(numbers: np.ndarray) -> np.ndarray:
    """The mean over the first axis, in float64."""
    mean: np.ndarray = numbers.mean(axis=0, dtype=np.float64)
    return mean

"""Aggregators: pure functions of a stream of (weight, arrays), the model they answer and the job, to one set of arrays.

No Flower is needed. Those here read the stream once, in the order it comes, and hold one reply at a time, so memory
does not grow with the number of sites; those of ``server.robust`` must see all of a round's replies. To add one: write
such a function, and one line of its name in ``shared.strategies.AGGREGATORS``; docs/strategies.md shows it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from server.gathered import Gathered, TooFew, norm_of
from shared.config import Job

Arrays = Mapping[str, Tensor]
Aggregator = Callable[[Iterable[tuple[float, Arrays]], Arrays, Job], dict[str, Tensor]]
_BLOCK = 1 << 15  # numbers that are widened to float64 at once: they stay in the processor's cache
_THREADED = 1 << 20  # arrays from this size are added up by several threads


def mean(replies: Iterable[tuple[float, Arrays]], before: Arrays, job: Job) -> dict[str, Tensor]:
    """The weighted mean (FedAvg)."""
    return weighted_mean(replies)


def clipped_mean(replies: Iterable[tuple[float, Arrays]], before: Arrays, job: Job) -> dict[str, Tensor]:
    """The weighted mean of changes cut to an L2 norm (Sun et al. 2019): no site moves the model further than others.

    The norm is ``federation.clip_norm``, or where that is 0 the median of the round's, for which all replies are kept.
    """
    if job.federation.clip_norm:
        return weighted_mean(_clipped(replies, before, job.federation.clip_norm))
    with Gathered(replies, job) as gathered:
        return weighted_mean(_clipped(gathered, before, float(np.median(gathered.norms(before)))))


def _clipped(replies: Iterable[tuple[float, Arrays]], before: Arrays, bound: float) -> Iterator[tuple[float, Arrays]]:
    for weight, arrays in replies:
        norm = math.sqrt(norm_of(arrays, before))
        yield weight, arrays if norm <= bound else _scaled(arrays, before, bound / norm)


def _scaled(arrays: Arrays, before: Arrays, factor: float) -> dict[str, Tensor]:
    """``before`` and ``factor`` of the change, integers of it rounded."""
    scaled = {}
    for name, array in arrays.items():
        old = before[name].double()
        scaled[name] = _as(array.dtype, old + (array.double() - old) * factor)
    return scaled


def weighted_mean(replies: Iterable[tuple[float, Arrays]]) -> dict[str, Tensor]:
    """The mean of the arrays weighted by ``weight`` (FedAvg, McMahan et al. 2017), each in its own dtype.

    Sums are kept in float64: for whole-number weights the mean of identical models is that model to the bit. Integer
    counters are averaged and rounded. A BatchNorm ``running_var`` becomes the variance of all sites' activations
    together, the mean of the variances plus the variance of the means, which its plain average would leave out.

    Raises:
        TooFew: the stream was empty.
    """
    total = 0.0
    sums: dict[str, Tensor] = {}
    between: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    with ThreadPoolExecutor(_threads()) as pool:
        for weight, arrays in replies:
            for name, array in arrays.items():
                if name.endswith("running_mean"):
                    _spread(between, sums, name, array, weight, total)
                if name not in sums:
                    sums[name], dtypes[name] = torch.zeros(array.shape, dtype=torch.float64), array.dtype
                _add(sums[name], array, weight, pool)
            total += weight
            arrays = array = None  # type: ignore[assignment]  # the next reply needs the room
    if not total:
        raise TooFew("no reply to aggregate")
    for name, spread in between.items():
        partner = name.removesuffix("running_mean") + "running_var"
        if partner in sums:
            sums[partner].add_(spread)
    return {name: _as(dtypes[name], sums.pop(name).div_(total)) for name in list(sums)}


def _threads() -> int:
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 8)


def _add(total: Tensor, array: Tensor, weight: float, pool: ThreadPoolExecutor) -> None:
    """``total`` += ``weight`` × ``array`` in float64, every number on its own: blocks and threads change nothing."""
    sums, numbers = total.numpy().reshape(-1), array.detach().contiguous().numpy().reshape(-1)
    if numbers.size < _THREADED:
        _add_part(sums, numbers, weight)
        return
    part = -(-numbers.size // _threads())
    places = [slice(start, start + part) for start in range(0, numbers.size, part)]
    for done in [pool.submit(_add_part, sums[place], numbers[place], weight) for place in places]:
        done.result()


def _add_part(sums: np.ndarray, numbers: np.ndarray, weight: float) -> None:
    wide = np.empty(min(_BLOCK, numbers.size))
    for start in range(0, numbers.size, _BLOCK):
        place = sums[start : start + _BLOCK]
        block = wide[: place.size]
        block[:] = numbers[start : start + _BLOCK]
        if weight != 1.0:
            block *= weight
        place += block


def _spread(
    between: dict[str, Tensor], sums: Mapping[str, Tensor], name: str, mean: Tensor, weight: float, total: float
) -> None:
    """Add a site's part of the weighted squared deviation of the means (Welford; exactly 0 for equal means)."""
    if name not in sums:
        between[name] = torch.zeros(mean.shape, dtype=torch.float64)
        return
    gap = mean.double() - sums[name] / total
    between[name].add_(gap.square_(), alpha=weight * total / (total + weight))


def _as(dtype: torch.dtype, values: Tensor) -> Tensor:
    return values.to(dtype) if dtype.is_floating_point else values.round_().to(dtype)

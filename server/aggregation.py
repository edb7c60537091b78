"""Aggregators: pure functions from a stream of (weight, arrays) to one set of arrays, no Flower needed.

The stream is read once, in the order it comes, and one reply is held at a time, so memory does not grow with the
number of sites. To add one: write such a function and one line in ``AGGREGATORS``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

Arrays = Mapping[str, Tensor]
Aggregator = Callable[[Iterable[tuple[float, Arrays]]], dict[str, Tensor]]


def weighted_mean(replies: Iterable[tuple[float, Arrays]]) -> dict[str, Tensor]:
    """The mean of the arrays weighted by ``weight`` (FedAvg, McMahan et al. 2017), each in its own dtype.

    Sums are kept in float64: for whole-number weights the mean of identical models is that model to the bit. Integer
    counters are averaged and rounded. A BatchNorm ``running_var`` becomes the variance of all sites' activations
    together, the mean of the variances plus the variance of the means, which its plain average would leave out.

    Raises:
        ValueError: the stream was empty.
    """
    total = 0.0
    sums: dict[str, Tensor] = {}
    between: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for weight, arrays in replies:
        for name, array in arrays.items():
            if name.endswith("running_mean"):
                _spread(between, sums, name, array, weight, total)
            if name not in sums:
                sums[name], dtypes[name] = torch.zeros(array.shape, dtype=torch.float64), array.dtype
            sums[name].add_(array, alpha=weight)
        total += weight
    if not total:
        raise ValueError("no reply to aggregate")
    for name, spread in between.items():
        partner = name.removesuffix("running_mean") + "running_var"
        if partner in sums:
            sums[partner].add_(spread)
    return {name: _as(dtypes[name], sums[name].div_(total)) for name in list(sums)}


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


AGGREGATORS: dict[str, Aggregator] = {"mean": weighted_mean}

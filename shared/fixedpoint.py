"""A site's change of the model as whole numbers modulo 2^32, whose sum over sites is exact and cannot overflow.

A vector holds the change of every exchanged number, then a tail: the site's weight, its images, 1 if it has a loss, its
losses. All of it is added up under masks (``shared.masking``), so the server reads it of all sites together only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

HALF = 2**31 - 1  # sums are read as signed: from -HALF to HALF
MOST_LOSS = 1000.0  # mean losses per image are cut off there; the step between two is then 16 × 1000 / 2^31 at 16 sites
BLOCK = 1 << 16
TAIL = 3  # weight, images, whether there are losses; the losses come after


class Numbers(NamedTuple):
    """What the sites of a sum tell together: ``loss`` and ``losses`` are means over sites, NaN where there are none."""

    weight: float
    images: int
    losses: list[float]


def step(bound: float, sites: int) -> float:
    """The distance of two numbers that can be told apart, where ``sites`` numbers up to ``bound`` are added up.

    (2^31 - 1) / sites - 1 steps reach ``bound``, so that after rounding the sum stays within ±(2^31 - 1).
    """
    return bound / (HALF / sites - 1)


def worst_error(bound: float, sites: int, added: int, weight: float) -> float:
    """Bound on the error of any one number of the weighted mean, against exact arithmetic.

    Every site rounds by half a step at most, so the sum of ``added`` sites is wrong by ``added`` / 2 steps; it is
    divided by the sum of the weights, ``weight``, wrong by ``added`` / 2 steps of its own, times a mean of ``bound`` at
    most: together ``added`` / ``weight`` steps. Of a ``running_var`` twice the mean's own change times that comes on
    top. The new weights are then rounded to their own type, as without masks.

    Args:
        bound: largest L2 norm of a site's change.
        sites: for which the steps were chosen; of them ``added`` are in the sum.
        weight: sum of the weights, each relative to the largest that was possible.
    """
    return added * step(bound, sites) / weight


def change(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> np.ndarray:
    """What a site changed, float64 (d,), in the order of ``before``.

    A BatchNorm ``running_var`` counts as the variance around the *global* running mean, var + (mean - global mean)^2:
    these average to the variance of all sites' activations together, see ``changed``.
    """
    vector = np.empty(sum(tensor.numel() for tensor in before.values()))
    start = 0
    for name, old in before.items():
        place = torch.from_numpy(vector[start : start + old.numel()])
        place.copy_(after[name].reshape(-1)).sub_(old.reshape(-1))
        if mean := _mean_of(name, before):
            place += (after[mean].double() - before[mean].double()).square().reshape(-1)
        start += old.numel()
    return vector


def changed(before: Mapping[str, Tensor], mean: np.ndarray) -> dict[str, Tensor]:
    """``before`` plus the mean of the sites' changes, each in its own dtype; counters are rounded.

    Of a ``running_var`` the square of the mean's own change is taken off: with ``change`` this is the mean of the
    variances plus the variance of the means (law of total variance), as ``server.aggregation.weighted_mean`` gives.
    """
    moved: dict[str, Tensor] = {}
    start = 0
    for name, old in before.items():
        moved[name] = torch.from_numpy(mean[start : start + old.numel()]).reshape(old.shape)
        start += old.numel()
    result = {}
    for name, old in before.items():
        new = old.double() + moved[name]
        if partner := _mean_of(name, before):
            new = (new - moved[partner].square()).clamp_(min=0)
        result[name] = new.to(old.dtype) if old.is_floating_point() else new.round_().to(old.dtype)
    return result


def _mean_of(name: str, arrays: Mapping[str, Tensor]) -> str:
    partner = name.removesuffix("running_var") + "running_mean" if name.endswith("running_var") else ""
    return partner if partner in arrays else ""


def clip(vector: np.ndarray, bound: float) -> float:
    """Scale ``vector`` in place to an L2 norm of ``bound`` at most; gives the norm it had.

    Raises:
        ValueError: it holds numbers that are not finite.
    """
    norm = math.sqrt(float(np.dot(vector, vector)))
    if not math.isfinite(norm):
        raise ValueError("the change is not finite")
    if norm > bound:
        vector *= bound / norm
    return norm


def encode(
    vector: np.ndarray, weight: float, images: int, losses: Sequence[float], bound: float, sites: int
) -> np.ndarray:
    """A clipped change times its weight, and the site's numbers, as uint32 (d + TAIL + losses,); rounded to nearest.

    Args:
        vector: float64 (d,), each number within ``bound``; is overwritten.
        weight: from 0 to 1, relative to the largest possible.
        losses: mean per image of the whole and of each part; NaN throughout where they are not told.
        sites: the most sites whose vectors are added.
    """
    told = all(math.isfinite(loss) for loss in losses)
    coded = np.empty(len(vector) + TAIL + len(losses), np.int32)
    factor = weight / step(bound, sites)
    for start in range(0, len(vector), BLOCK):  # block by block, so that each is still in the cache for the next step
        block = vector[start : start + BLOCK]
        block *= factor
        np.rint(block, out=block)
        coded[start : start + len(block)] = block
    coded[len(vector)] = round(weight / step(1.0, sites))
    coded[len(vector) + 1] = min(images, HALF // sites)
    coded[len(vector) + 2] = told
    for place, loss in enumerate(losses, start=len(vector) + TAIL):
        coded[place] = round(min(max(loss, -MOST_LOSS), MOST_LOSS) / step(MOST_LOSS, sites)) if told else 0
    return coded.view(np.uint32)


def decode(total: np.ndarray, losses: int, bound: float, sites: int) -> tuple[np.ndarray, Numbers]:
    """The weighted mean of the changes, float64 (d,), and the numbers, from the sum of vectors of ``encode``.

    Raises:
        ValueError: no sum of sound vectors: its weight is not above 0 and within ``sites``, or its mean is longer than
            ``bound``, which no mean of clipped changes is.
    """
    signed = total.view(np.int32)
    size = len(total) - TAIL - losses
    weight = float(signed[size] * step(1.0, sites))
    if not 0 < weight <= sites + sites * step(1.0, sites):
        raise ValueError("the sum of the weights is not one")
    mean = signed[:size] * (step(bound, sites) / weight)
    longest = bound + worst_error(bound, sites, sites, weight) * math.sqrt(max(size, 1))
    if math.sqrt(float(np.dot(mean, mean))) > longest:
        raise ValueError("the mean is longer than any site's change may be")
    told = int(signed[size + 2])
    means = [float(value) * step(MOST_LOSS, sites) / told if told > 0 else math.nan for value in signed[size + TAIL :]]
    return mean, Numbers(weight, int(signed[size + 1]), means)

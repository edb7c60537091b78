"""A large image seen through overlapping windows, what is seen in them blended with Gaussian weights.

The windows, their weights and so the result are those of MONAI's ``sliding_window_inference``, to which a test holds
them. It is not called, because importing MONAI takes a process ten seconds, and every worker is one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SIGMA = 0.125  # of the weights, in sides of the window
LEAST = 1e-3  # weight, so that no pixel is divided by nothing


def starts(size: int, side: int, overlap: float) -> list[int]:
    """Where the windows along an axis begin: evenly, the last one moved back to end with the image."""
    step = side if size == side else max(int(side * (1 - overlap)), 1)
    return [min(start, size - side) for start in range(0, size - side + step, step)]


def weights(sides: Sequence[int]) -> Tensor:
    """Weights float32 (*sides), 1 in the middle of the window."""
    whole = torch.ones(())
    for side in sides:
        places = torch.arange(side, dtype=torch.float32) - (side - 1) / 2
        whole = whole[..., None] * torch.exp(places.square() / (-2 * (side * SIGMA) ** 2))
    return whole.clamp(min=max(whole.min().item(), LEAST))


def blended(
    image: Tensor, sides: Sequence[int], at_once: int, overlap: float, look: Callable[[Tensor], Tensor]
) -> Tensor:
    """What ``look`` makes of an image, window by window.

    Args:
        image: (1, channels, *size); a side shorter than the window's is lengthened at both ends by repeating its edge.
        sides: of a window in pixels.
        at_once: windows that ``look`` is given together.
        overlap: of neighbouring windows, as a share of their side, from 0 to below 1.
        look: (b, channels, *sides) -> (b, outputs, *sides).

    Returns:
        float32 (1, outputs, *size) on the CPU, for the blended whole may be larger than a GPU holds: the mean over the
        windows that show a pixel, by their weights.
    """
    size = image.shape[2:]
    missing = [max(side - have, 0) for side, have in zip(sides, size, strict=True)]
    before = [gap // 2 for gap in missing]
    if any(missing):
        both = [(front, gap - front) for front, gap in zip(before, missing, strict=True)]
        image = F.pad(image, [pad for pair in reversed(both) for pad in pair], mode="replicate")
    whole = image.shape[2:]
    corners = itertools.product(*(starts(have, side, overlap) for have, side in zip(whole, sides, strict=True)))
    windows = [_box(corner, sides) for corner in corners]
    weight = weights(sides)
    total, seen = torch.zeros(0), torch.zeros(whole)
    for first in range(0, len(windows), at_once):
        some = windows[first : first + at_once]
        found = look(torch.cat([image[window] for window in some])).float().cpu() * weight
        if not total.numel():
            total = torch.zeros(1, found.shape[1], *whole)
        for window, part in zip(some, found, strict=True):
            total[window] += part
            seen[window] += weight
    total /= seen
    return total[_box(before, size)]


def _box(corner: Sequence[int], sides: Sequence[int]) -> tuple[Any, ...]:
    """The index of a part of the last axes."""
    return (..., *(slice(at, at + side) for at, side in zip(corner, sides, strict=True)))

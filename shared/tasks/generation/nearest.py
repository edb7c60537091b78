"""How far pictures are from the nearest training image: whether a generator gives away what it was trained on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.imaging.dataset import Dataset, to_float

_SIDE = 32  # larger pictures are averaged down to this side, so that the cost of a comparison is bounded
_AT_ONCE = 1024


def thumbnails(pictures: Tensor) -> Tensor:
    """Pictures (n, channels, height, width) in [0, 1] as rows float64 (n, values), at most 32 x 32 per channel."""
    side = min(_SIDE, *pictures.shape[2:])
    if max(pictures.shape[2:]) > side:
        pictures = F.adaptive_avg_pool2d(pictures, side)
    return pictures.flatten(1).cpu().double()


def nearest(rows: Tensor, data: Dataset) -> Tensor:
    """The root mean square difference, in [0, 1], of each row of thumbnails to the nearest image of ``data``: (n,).

    Plain pixels, no features: copies are found under noise, blur and other brightness, though not if moved. Float64, so
    that it does not depend on which images are compared together.
    """
    least = torch.full((len(rows),), torch.inf, dtype=torch.float64)
    own = rows.square().sum(1)
    for start in range(0, len(data), _AT_ONCE):
        chosen = range(start, min(start + _AT_ONCE, len(data)))
        others = thumbnails(to_float(data.columns["image"].take(chosen)))
        squares = own[:, None] + others.square().sum(1) - 2 * rows @ others.T
        least = torch.minimum(least, squares.min(1).values)
    return (least.clamp(min=0) / max(rows.shape[1], 1)).sqrt()

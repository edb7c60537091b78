"""Boxes from the pixels of an image as it was read to those of the network's input, and back.

``shared.imaging.read.fit`` shrinks or enlarges an image to ``size`` x ``size`` pixels, its aspect kept, and centres it
on black. Its two sides are rounded to whole pixels, so each axis has a scale of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shared.cases import Sample
from shared.imaging.errors import UnreadableImage

Floats = npt.NDArray[np.float64]

#: A box less wide or high than so many pixels of the network's input is degenerate: nothing can be learnt of it.
LEAST_SIDE = 2.0


class Place(NamedTuple):
    """Where a fitted image lies in the network's input: its top left corner, its sides, and their scales, in (x, y)."""

    corner: Floats
    sides: Floats
    scales: Floats


def place(shape: tuple[int, int], size: int) -> Place:
    """The place of an image of ``shape`` (height, width) in ``size`` x ``size`` pixels: the rule of ``fit``."""
    original = np.array([shape[1], shape[0]], np.float64)
    scale = min(size / side for side in shape)
    sides = np.array([max(1, min(size, round(int(side) * scale))) for side in original], np.float64)
    return Place((size - sides) // 2, sides, sides / original)


def to_input(boxes: Floats, shape: tuple[int, int], size: int) -> Floats:
    """Boxes (n, 4) as x1, y1, x2, y2 from pixels of the image to pixels of the network's input."""
    where = place(shape, size)
    return boxes * np.tile(where.scales, 2) + np.tile(where.corner, 2)


def to_image(boxes: Floats, shape: tuple[int, int], size: int) -> Floats:
    """The inverse of ``to_input``."""
    where = place(shape, size)
    return (boxes - np.tile(where.corner, 2)) / np.tile(where.scales, 2)


def corners(boxes: Floats) -> Floats:
    """(n, 4) of x, y, width, height as x1, y1, x2, y2."""
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)


class Objects(NamedTuple):
    """An image's boxes in the network's input, float64 (n, 4) as x1, y1, x2, y2; their classes, and boxes dropped."""

    boxes: Floats
    classes: npt.NDArray[np.int64]
    dropped: int


def objects_of(sample: Sample, shape: tuple[int, int], size: int) -> Objects:
    """The boxes of a sample, cut at the edge of the image; the degenerate ones are dropped and counted."""
    table = np.array(sample.boxes, np.float64).reshape(-1, 5)
    boxes = to_input(inside(corners(table[:, 1:]), shape), shape, size)
    kept = (boxes[:, 2:] - boxes[:, :2]).min(1, initial=np.inf) >= LEAST_SIDE
    return Objects(boxes[kept], table[kept, 0].astype(np.int64), int((~kept).sum()))


def inside(boxes: Floats, shape: tuple[int, int]) -> Floats:
    """The part of boxes (n, 4), as x1, y1, x2, y2, within an image of ``shape`` (height, width)."""
    return np.clip(boxes, 0, np.tile([float(shape[1]), float(shape[0])], 2))


def require_inside(sample: Sample, shape: tuple[int, int]) -> None:
    """Raise UnreadableImage("box-outside") if a box has no part in the image: the two do not belong together."""
    for _, x, y, width, height in sample.boxes:
        if width > 0 and height > 0 and (x >= shape[1] or y >= shape[0] or x + width <= 0 or y + height <= 0):
            raise UnreadableImage("box-outside", f"{sample.path}: box {x:g} {y:g} {width:g} {height:g} in {shape}")

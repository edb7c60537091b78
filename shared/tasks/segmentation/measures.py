"""How well one mask agrees with another: overlap, distance of surfaces, objects found. Arrays in, numbers out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage

_CORE = 0.5  # share of the greatest depth from which on a pixel is in the core of an object; chosen on nuclei


class Overlap(NamedTuple):
    """Pixels in both masks, in the predicted and in the true one, int64 (classes,): background is left out."""

    both: np.ndarray
    predicted: np.ndarray
    truth: np.ndarray

    @property
    def seen(self) -> np.ndarray:
        """Whether a class is in either mask, bool (classes,)."""
        return np.asarray(self.predicted + self.truth > 0)

    @property
    def dice(self) -> np.ndarray:
        """2 |A and B| / (|A| + |B|) per class; NaN where neither mask has the class."""
        return _ratio(2 * self.both, self.predicted + self.truth)

    @property
    def iou(self) -> np.ndarray:
        """|A and B| / |A or B| per class; NaN where neither mask has the class."""
        return _ratio(self.both, self.predicted + self.truth - self.both)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    result: np.ndarray = np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)
    return result


def overlap(predicted: np.ndarray, truth: np.ndarray, classes: int) -> Overlap:
    """Pixel counts of two masks of one shape whose values are 0 (background) to ``classes``."""
    pairs = truth.reshape(-1).astype(np.int64) * (classes + 1) + predicted.reshape(-1)
    table = np.bincount(pairs, minlength=(classes + 1) ** 2).reshape(classes + 1, classes + 1)
    return Overlap(table.diagonal()[1:].copy(), table.sum(0)[1:], table.sum(1)[1:])


def hausdorff95(predicted: np.ndarray, truth: np.ndarray, spacing: Sequence[float]) -> float | None:
    """95th percentile of the Hausdorff distance, in the unit of ``spacing`` (per axis); None if a mask is empty.

    The larger of the two 95th percentiles of the distances from one surface to the other, as MONAI defines it. A pixel
    is on the surface if one of its direct neighbours is not in the mask; beyond the image nothing is.
    """
    if not predicted.any() or not truth.any():
        return None
    (box,) = ndimage.find_objects((predicted | truth).astype(np.uint8))
    surfaces = [mask & ~ndimage.binary_erosion(mask) for mask in (predicted[box], truth[box])]
    there, back = (
        ndimage.distance_transform_edt(~other, sampling=spacing)[own] for own, other in (surfaces, surfaces[::-1])
    )
    return float(max(np.percentile(there, 95), np.percentile(back, 95)))


class Objects(NamedTuple):
    """Objects of two masks held against each other; see ``match_objects``."""

    matched: int
    false: int
    missed: int
    aji_intersection: int
    aji_union: int


def find_objects(mask: np.ndarray) -> np.ndarray:
    """Number the objects of a bool mask from 1, int32: its connected parts, parted once more at their necks.

    The core of an object is what lies deeper in its part than half of the part's greatest depth, depth being the
    distance to the nearest pixel outside the mask, smoothed by a pixel so that rough edges do not count. A part with
    several cores is several objects that touch; its pixels go to the nearest core. Nothing depends on the size of
    the objects, and every connected part keeps at least one: small ones are not dropped.
    """
    parts = _connected(mask)
    if not parts.any():
        return parts
    depth = ndimage.gaussian_filter(ndimage.distance_transform_edt(mask), 1)
    deepest = np.zeros(parts.max() + 1)
    np.maximum.at(deepest, parts[mask], depth[mask])
    cores = _connected(mask & (depth > _CORE * deepest[parts]))
    nearest = _nearest(cores > 0)
    objects: np.ndarray = np.where(mask, cores[nearest], 0)
    boxes = ndimage.find_objects(parts)
    for number in np.unique(parts[mask & (parts[nearest] != parts)]):
        box = boxes[number - 1]
        part = parts[box] == number  # a part so thin that the core of a neighbour is nearer than its own
        own = np.where(part, cores[box], 0)
        objects[box][part] = own[_nearest(own > 0)][part]
    return objects


def _connected(mask: np.ndarray) -> np.ndarray:
    """The connected parts, numbered; pixels that touch at a corner only are not connected."""
    labels: np.ndarray = ndimage.label(mask)[0]
    return labels.astype(np.int32)


def _nearest(marked: np.ndarray) -> tuple[np.ndarray, ...]:
    """For each pixel where the nearest marked one is, as an index."""
    return tuple(ndimage.distance_transform_edt(~marked, return_distances=False, return_indices=True))


def match_objects(predicted: np.ndarray, truth: np.ndarray) -> Objects:
    """Hold two masks of numbered objects (0 the background) against each other.

    An object is matched if its IoU with one of the other mask is above one half; there is never more than one such.
    The aggregated Jaccard index (Kumar et al., IEEE TMI 2017;36:1550) is ``aji_intersection`` over ``aji_union``: of
    each true object with the predicted one of largest IoU, plus the area of predicted objects which no true one chose.
    """
    a, true_sizes = _numbered(truth)
    b, sizes = _numbered(predicted)
    shared = (a > 0) & (b > 0)
    pairs, both = np.unique(a[shared] * (len(sizes) + 1) + b[shared], return_counts=True)
    row, column = pairs // (len(sizes) + 1) - 1, pairs % (len(sizes) + 1) - 1
    union = true_sizes[row] + sizes[column] - both
    matched = int((2 * both > union).sum())
    order = np.lexsort((-both / union, row))  # by true object, its best partner first
    chosen = order[np.unique(row[order], return_index=True)[1]]
    lonely = true_sizes.sum() - true_sizes[row[chosen]].sum()
    unchosen = sizes.sum() - sizes[np.unique(column[chosen])].sum()
    return Objects(
        matched,
        len(sizes) - matched,
        len(true_sizes) - matched,
        int(both[chosen].sum()),
        int(union[chosen].sum() + lonely + unchosen),
    )


def _numbered(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mask flat with its objects numbered 1, 2, … without gaps, int64, and the size of each in pixels."""
    if mask.size and mask.min() >= 0 and mask.max() <= mask.size:  # small numbers are counted, which needs no sorting
        sizes = np.bincount(mask.reshape(-1))
        there = sizes > 0
        there[0] = False
        new = np.where(there, np.cumsum(there), 0)
        return new[mask.reshape(-1)], sizes[there]
    values, flat, counts = np.unique(mask, return_inverse=True, return_counts=True)
    if len(values) and values[0] == 0:
        return flat.reshape(-1).astype(np.int64), counts[1:]
    return flat.reshape(-1).astype(np.int64) + 1, counts

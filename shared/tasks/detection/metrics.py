"""Average precision and FROC sensitivity from sums: no box of a single image is needed, so federated equals pooled.

A site counts, for each class, its boxes (truth), and in a histogram over the score its detections and those of them
that are right at each overlap of ``OVERLAPS``. Detections of one bin count as tied.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shared.cases import unit_hash
from shared.config import Job
from shared.intervals import NOTHING, Estimate, proportion
from shared.tasks import Sums
from shared.tasks.detection.boxes import LEAST_SIDE

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

#: Intersection over union at which a detection counts as right: COCO's ten.
OVERLAPS = np.linspace(0.5, 0.95, 10)
#: Bins of the log-odds of the score, equal steps from LOWEST (a score of .001) to HIGHEST (where a float32 ends): the
#: scores of a sure detector crowd near 1, and there in log-odds they lie apart.
BINS = 2000
LOWEST, HIGHEST = -7.0, 17.0
#: Groups of images, and bins of their histograms, from which the intervals of average precision come.
GROUPS = 10
COARSE = 100
#: At most so many detections per image and class are looked at, as in COCO.
MOST = 100
_RECALLS = np.linspace(0.0, 1.0, 101)
# Two-sided 95 % quantiles of Student's t for 1 to 9 degrees of freedom.
_STUDENT = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)


def score_bins(scores: Floats) -> Counts:
    """The bin, 0..BINS-1, of each score in [0, 1]; scores beyond the limits go to an end."""
    inside = np.clip(np.asarray(scores, np.float64), 1e-9, 1 - 1e-9)
    place = (np.log(inside) - np.log1p(-inside) - LOWEST) / (HIGHEST - LOWEST) * BINS
    return np.clip(np.floor(place), 0, BINS - 1).astype(np.int64)


def group_of(identity: str) -> int:
    """The group, 0..GROUPS-1, of the image with this id."""
    return int(unit_hash(f"consilium-jackknife:{identity}") * GROUPS)


def overlaps(boxes: Floats, others: Floats) -> Floats:
    """Intersection over union of every box (n, 4) with every other (m, 4), as x1, y1, x2, y2: (n, m)."""
    corner = np.maximum(boxes[:, None, :2], others[None, :, :2])
    inside = np.clip(np.minimum(boxes[:, None, 2:], others[None, :, 2:]) - corner, 0, None).prod(2)
    areas = [(side[:, 2] - side[:, 0]) * (side[:, 3] - side[:, 1]) for side in (boxes, others)]
    return np.asarray(inside / np.maximum(areas[0][:, None] + areas[1][None] - inside, 1e-12))


def right_at(boxes: Floats, truth: Floats) -> npt.NDArray[np.bool_]:
    """Which detections of one image and class are right at each of OVERLAPS: (10, n).

    COCO's greedy matching: in the order given, the best first, each detection takes the box it overlaps most among
    those not taken yet, if by enough; of equals the last.
    """
    table = overlaps(boxes, truth)
    right = np.zeros((len(OVERLAPS), len(boxes)), bool)
    free = np.ones((len(OVERLAPS), len(truth)), bool)
    rows, last = np.arange(len(OVERLAPS)), len(truth) - 1
    for i in range(len(boxes) if len(truth) else 0):
        open_ = np.where(free, table[i], -1.0)
        best = last - open_[:, ::-1].argmax(1)
        right[:, i] = open_[rows, best] >= np.minimum(OVERLAPS, 1 - 1e-10)
        free[rows[right[:, i]], best[right[:, i]]] = False
    return right


class Tally:
    """Adds up images; ``sums`` is what leaves the site."""

    def __init__(self, classes: int) -> None:
        self.classes, self.n, self.dropped = classes, 0, 0
        self.images = np.zeros(GROUPS, np.int64)
        self.objects = np.zeros((GROUPS, classes), np.int64)
        # [k, 0] counts all detections of class k, [k, 1 + t] those that are right at overlap t
        self.fine = np.zeros((classes, 1 + len(OVERLAPS), BINS), np.int64)
        self.coarse = np.zeros((GROUPS, classes, 1 + len(OVERLAPS), COARSE), np.int64)

    def add(
        self, identity: str, truth: Floats, true_classes: Counts, boxes: Floats, classes: Counts, scores: Floats
    ) -> None:
        """Count one image: its boxes (m, 4) and their classes, the detections (n, 4), their classes and scores."""
        group = group_of(identity)
        self.n += 1
        self.images[group] += 1
        for k in range(self.classes):
            own = truth[true_classes == k]
            found = np.flatnonzero(classes == k)
            found = found[np.argsort(-scores[found], kind="stable")][:MOST]
            right = right_at(boxes[found], own)
            bins = score_bins(scores[found])
            self.objects[group, k] += len(own)
            for row, chosen in enumerate([np.ones(len(found), bool), *right]):
                np.add.at(self.fine[k, row], bins[chosen], 1)
                np.add.at(self.coarse[group, k, row], bins[chosen] * COARSE // BINS, 1)

    def sums(self) -> Sums:
        """``n`` images; ``dropped`` degenerate boxes; ``objects``, ``images`` by group; the histograms, flat."""
        lists = {name: getattr(self, name).flatten().tolist() for name in ("images", "objects", "fine", "coarse")}
        return {"n": self.n, "dropped": self.dropped, **lists}


def _array(sums: Sums, key: str, *shape: int) -> Counts:
    return np.asarray(sums[key], dtype=np.int64).reshape(shape)


def _tables(sums: Sums, job: Job) -> tuple[Counts, Counts, Counts, Counts]:
    """Images and objects by group, fine and coarse histograms; see ``Tally``."""
    k, rows = len(job.classes), 1 + len(OVERLAPS)
    images, objects = _array(sums, "images", GROUPS), _array(sums, "objects", GROUPS, k)
    return images, objects, _array(sums, "fine", k, rows, BINS), _array(sums, "coarse", GROUPS, k, rows, COARSE)


def consistent(sums: Sums, job: Job) -> bool:
    """Whether the counts of one site agree: groups with the whole, detections right with all, and with the boxes."""
    images, objects, fine, coarse = _tables(sums, job)
    merged = fine.reshape(*fine.shape[:2], COARSE, BINS // COARSE).sum(3)
    return bool(
        images.sum() == sums["n"]
        and (coarse.sum(0) == merged).all()
        and (fine[:, 1:] <= fine[:, :1]).all()
        and (coarse[:, :, 1:].sum(3) <= objects[:, :, None]).all()
        and (coarse[:, :, 0].sum(2) <= MOST * images[:, None]).all()
        and not objects[images == 0].any()
    )


def notices(sums: Sums, job: Job) -> list[str]:
    """How many degenerate boxes were left out, in words."""
    dropped = int(sums["dropped"])  # type: ignore[arg-type]
    boxes = "1 box was" if dropped == 1 else f"{dropped:,} boxes were"
    return [f"{boxes} left out, less than {LEAST_SIDE:g} pixels wide or high as the network sees it"] if dropped else []


def average_precision(detections: Counts, right: Counts, objects: int) -> float:
    """COCO's average precision: the mean over recalls 0, .01, … 1 of the best precision at that recall or beyond.

    Args:
        detections: by bin of the score, rising.
        right: those of them that are right.
        objects: boxes there are, at least one.
    """
    found = np.cumsum(right[::-1])
    named = np.cumsum(detections[::-1])
    precision = found / np.maximum(named, 1)
    best = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    # Recalls as fractions of COCO's grid: found / objects >= r, with its rounding.
    return float(best[np.searchsorted(found / objects, _RECALLS, side="left")].mean())


def _precisions(histogram: Counts, objects: Counts) -> Floats:
    """Average precision of each class at each overlap from (classes, 1 + 10, bins); NaN for a class without a box."""
    table = np.full((len(histogram), len(OVERLAPS)), np.nan)
    for k in np.flatnonzero(objects):
        for t in range(len(OVERLAPS)):
            table[k, t] = average_precision(histogram[k, 0], histogram[k, 1 + t], int(objects[k]))
    return table


def _figures(precisions: Floats, job: Job) -> dict[str, float]:
    """The metrics from a table of average precisions (classes, overlaps); classes without a box are passed over."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # no class has a box: NaN is meant
        by_overlap = np.nanmean(precisions, 0)
    found = {"map50": float(by_overlap[0]), "map75": float(by_overlap[5]), "map": float(by_overlap.mean())}
    return found | {f"map50:{name}": float(row[0]) for name, row in zip(job.classes, precisions, strict=True)}


def summarise(sums: Sums, job: Job) -> dict[str, Estimate]:
    """map50, map75, map (mean over the overlaps .50:.05:.95), map50:<class>, sensitivity_1fp, with 95 % intervals.

    As COCO's evaluation has them; a class without a box is left out of the means. ``n`` is the number of boxes.
    """
    images, objects, fine, coarse = _tables(sums, job)
    whole, boxes = _figures(_precisions(fine, objects.sum(0)), job), objects.sum(0)
    counts = dict.fromkeys(whole, int(boxes.sum())) | {
        f"map50:{name}": int(n) for name, n in zip(job.classes, boxes, strict=True)
    }
    used = np.flatnonzero(images)
    rough = _figures(_precisions(coarse.sum(0), boxes), job)
    without = [_figures(_precisions(coarse.sum(0) - coarse[g], boxes - objects[g]), job) for g in used]
    found = {
        name: jackknife(value, rough[name], [part[name] for part in without], images[used].tolist(), counts[name])
        for name, value in whole.items()
    }
    return found | {"sensitivity_1fp": _sensitivity(fine, int(boxes.sum()), int(images.sum()))}


def _sensitivity(fine: Counts, objects: int, images: int, false_per_image: float = 1.0) -> Estimate:
    """FROC: the share of boxes found, at an overlap of .5, by the lowest threshold of few enough false detections.

    All classes together (Chakraborty 1989 for the curve; one false detection per image is one point of it). Wilson's
    interval, which takes the boxes of an image for independent.
    """
    right = np.cumsum(fine[:, 1].sum(0)[::-1])
    wrong = np.cumsum(fine[:, 0].sum(0)[::-1]) - right
    allowed = right[wrong <= false_per_image * images]
    return proportion(int(allowed[-1]) if len(allowed) else 0, objects)


def jackknife(value: float, rough: float, without: Sequence[float], sizes: Sequence[int], n: int) -> Estimate:
    """An estimate with the interval of the delete-a-group jackknife for groups of unequal size.

    Busing, Meijer & van der Leeden, Statistics and Computing 1999;9:3 (equations 4 and 5), with Student's t for as many
    degrees of freedom as groups less one.

    Args:
        value: the figure itself.
        rough: the figure as the groups' coarser histograms give it, of which ``without`` are variants.
        without: the figure without each group.
        sizes: images in each group.
        n: cases behind the figure.
    """
    if math.isnan(value):
        return NOTHING
    kept = [(part, size) for part, size in zip(without, sizes, strict=True) if not math.isnan(part)]
    groups, total = len(kept), sum(size for _, size in kept)
    if groups < 2:
        return Estimate(value, 0.0, 1.0, n)
    centre = groups * rough - sum((1 - size / total) * part for part, size in kept)
    variance = 0.0
    for part, size in kept:
        ratio = total / size
        variance += (ratio * rough - (ratio - 1) * part - centre) ** 2 / (ratio - 1) / groups
    half = _STUDENT[groups - 2] * math.sqrt(variance)
    if half < 1e-9:  # all right or all wrong: leaving out a group shows nothing, though few images are no certainty
        bounds = proportion(value * total, total)
        return Estimate(value, bounds.low, bounds.high, n)
    return Estimate(value, max(value - half, 0.0), min(value + half, 1.0), n)

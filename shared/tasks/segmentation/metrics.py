"""Segmentation metrics from sums that add up over sites.

Conventions, stated once. A class which neither the true nor the predicted mask of an image has is left out of that
image's mean (as nnU-Net does: there is nothing to find and nothing was invented); predicted where it is not, it counts
0. The value of an image is the mean over the classes counted in it; an image without any is left out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from shared.config import Job
from shared.intervals import NOTHING, Estimate, Z, mean_dependent, mean_of_values
from shared.tasks import Sums
from shared.tasks.classification import metrics as labels
from shared.tasks.segmentation.measures import Objects, Overlap

_OF_IMAGE = "image_"  # keys and metrics of the classes of the whole image
_LABEL_SUMS = ("confusion", "positives", "negatives")


@lru_cache(maxsize=16)
def label_job(job: Job) -> Job:
    """The classification job hidden in a segmentation job: its classes are those of the whole image."""
    return dataclasses.replace(job, data=dataclasses.replace(job.data, classes=job.data.labels, labels=""))


class Tally:
    """Sums over images, filled one image at a time.

    Keys, lists by class: ``intersection``, ``predicted``, ``truth`` in pixels; ``overlap_squares``, per class the sums
    of a^2, ab and b^2 with a = 2 x intersection, b = predicted + truth of an image; ``dice_class`` with ``_squares``
    and ``_n``; ``dice`` and ``iou`` of the images with ``_squares`` and their common ``dice_n``; ``hd95`` in mm
    likewise, and ``hd95_missing``, the images where it could not be computed: no spacing known, or no class in both
    masks. With instances also ``matched``, ``false`` and ``missed`` objects, ``aji_intersection`` and ``aji_union`` in
    pixels, and the products of both ratios as above.
    """

    def __init__(self, job: Job) -> None:
        zeros = [0] * len(job.classes)
        self.instances = job.data.masks == "instances"
        self.sums: Sums = {"n": 0, "loss": 0.0, "loss_squares": 0.0}
        self.sums |= {key: list(zeros) for key in ("intersection", "predicted", "truth", "dice_class_n")}
        self.sums |= {key: [0.0] * len(zeros) for key in ("dice_class", "dice_class_squares")}
        self.sums |= {"overlap_squares": [0.0] * 3 * len(zeros), "dice_n": 0, "hd95_n": 0, "hd95_missing": 0}
        self.sums |= {f"{key}{end}": 0.0 for key in ("dice", "iou", "hd95") for end in ("", "_squares")}
        if self.instances:
            self.sums |= dict.fromkeys(("matched", "false", "missed", "aji_intersection", "aji_union"), 0)
            self.sums |= {"objects_squares": [0.0] * 3, "aji_squares": [0.0] * 3}

    def add(self, loss: float, over: Overlap, distances: Sequence[float], objects: Objects | None) -> None:
        """One image: its loss, its overlap, its HD95 in mm for each class where there is one, its objects."""
        self._add("n", 1)
        self._value("loss", loss)
        for key, counts in zip(("intersection", "predicted", "truth"), over, strict=True):
            self._list(key, counts.tolist())
        a, b = 2.0 * over.both, (over.predicted + over.truth).astype(float)
        self._list("overlap_squares", np.stack([a * a, a * b, b * b], 1).reshape(-1).tolist())
        self._list("dice_class", np.nan_to_num(over.dice).tolist())
        self._list("dice_class_squares", np.nan_to_num(over.dice**2).tolist())
        self._list("dice_class_n", over.seen.astype(int).tolist())
        if over.seen.any():
            self._add("dice_n", 1)
            self._value("dice", float(np.nanmean(over.dice)))
            self._value("iou", float(np.nanmean(over.iou)))
        self._add("hd95_n" if distances else "hd95_missing", 1)
        if distances:
            self._value("hd95", float(np.mean(distances)))
        if self.instances and objects:
            self._objects(objects)

    def _objects(self, objects: Objects) -> None:
        for key in ("matched", "false", "missed", "aji_intersection", "aji_union"):
            self._add(key, getattr(objects, key))
        double = 2.0 * objects.matched
        pairs = {
            "objects_squares": (double, double + objects.false + objects.missed),
            "aji_squares": (float(objects.aji_intersection), float(objects.aji_union)),
        }
        for key, (a, b) in pairs.items():
            self._list(key, [a * a, a * b, b * b])

    def _add(self, key: str, value: int) -> None:
        self.sums[key] += value  # type: ignore[operator]

    def _value(self, key: str, value: float) -> None:
        self.sums[key] += value  # type: ignore[operator]
        self.sums[f"{key}_squares"] += value * value  # type: ignore[operator]

    def _list(self, key: str, values: Sequence[float]) -> None:
        self.sums[key] = [held + more for held, more in zip(self.sums[key], values, strict=True)]  # type: ignore[arg-type]


def with_labels(sums: Sums, found: Sums) -> Sums:
    """Segmentation sums and those of the classifier of whole images."""
    return sums | {f"{_OF_IMAGE}{key}": found[key] for key in _LABEL_SUMS}


def _labels_of(sums: Sums) -> Sums:
    found: Sums = {key: sums[f"{_OF_IMAGE}{key}"] for key in _LABEL_SUMS}
    return found | {"n": sums["n"], "loss": 0.0, "loss_squares": 0.0}


def consistent(sums: Sums, job: Job) -> bool:
    """Whether the counts of one site agree with each other."""
    n, slack = int(sums["n"]), 1e-6  # type: ignore[arg-type]
    per_class = zip(*(sums[key] for key in ("intersection", "predicted", "truth", "dice_class_n")), strict=True)
    good = all(both <= min(predicted, truth) and count <= n for both, predicted, truth, count in per_class)
    good &= sums["dice_n"] <= n and sums["hd95_n"] + sums["hd95_missing"] == n  # type: ignore[operator]
    good &= sums["iou"] <= sums["dice"] + slack and sums["dice"] <= sums["dice_n"] + slack  # type: ignore[operator]
    if job.data.masks == "instances":
        good &= sums["aji_intersection"] <= sums["aji_union"]  # type: ignore[operator]
    missing: list[int] = sums.get("missing", [])  # type: ignore[assignment]
    good &= all(count <= n for count in missing)
    return bool(good) and (not job.labels or labels.consistent(_labels_of(sums), label_job(job)))


def ratio(part: float, whole: float, products: Sequence[float], n: int) -> Estimate:
    """Sum of a over sum of b with a 95 % interval that takes images, not pixels or objects, as independent.

    The linearised ("ratio estimator") variance, Cochran, Sampling Techniques, 3rd ed. 1977, eq. 6.13, from
    ``products`` = the sums of a^2, ab and b^2 over the ``n`` images. With one image the interval is [0, 1].
    """
    if whole <= 0 or n <= 0:
        return NOTHING
    value = part / whole
    if n == 1:
        return Estimate(value, 0.0, 1.0, 1)
    aa, ab, bb = products
    spread = max(aa - 2 * value * ab + value * value * bb, 0.0) * n / (n - 1)
    half = Z * math.sqrt(spread) / whole
    return Estimate(value, max(value - half, 0.0), min(value + half, 1.0), n)


def _within(estimate: Estimate) -> Estimate:
    """The interval of a mean of shares, kept inside 0 and 1; one image tells nothing of how others differ from it."""
    if not estimate.n:
        return estimate
    if estimate.n == 1:
        return dataclasses.replace(estimate, low=0.0, high=1.0)
    # Rounding may take a sum of ones beyond one: the estimate stays inside its interval.
    return dataclasses.replace(estimate, low=max(estimate.low, 0.0), high=max(min(estimate.high, 1.0), estimate.value))


def _iou_of_dice(dice: Estimate) -> Estimate:
    """IoU = Dice / (2 - Dice) rises with Dice, so the bounds of one are those of the other."""
    if not dice.n:
        return dice
    iou = [value / (2 - value) for value in (dice.value, dice.low, dice.high)]
    return Estimate(iou[0], iou[1], iou[2], dice.n)


def summarise(sums: Sums, job: Job) -> dict[str, Estimate]:
    """Metrics with 95 % intervals.

    ``dice`` and ``iou``: mean over images; ``dice_pooled`` and ``iou_pooled``: from all pixels together, mean over the
    classes; ``hd95``: mean over images in mm; ``instance_f1`` at IoU above .5 and ``aji``, over all objects; ``loss``;
    ``dice:<class>`` where there are several; ``image_auroc``, ``image_balanced_accuracy``, ``image_accuracy`` of
    the classes of the whole image. ``n`` counts images.
    """
    one = {key: float(value) for key, value in sums.items() if not isinstance(value, list)}
    lists = {key: value for key, value in sums.items() if isinstance(value, list)}
    count = len(job.classes)
    pooled = [
        ratio(
            2 * lists["intersection"][k],
            lists["predicted"][k] + lists["truth"][k],
            lists["overlap_squares"][3 * k : 3 * k + 3],
            int(one["n"]),
        )
        for k in range(count)
    ]
    found = {
        name: _within(mean_of_values(one[name], one[f"{name}_squares"], int(one["dice_n"]))) for name in ("dice", "iou")
    }
    found["dice_pooled"] = mean_dependent(pooled)
    found["iou_pooled"] = mean_dependent([_iou_of_dice(part) for part in pooled])
    found["hd95"] = mean_of_values(one["hd95"], one["hd95_squares"], int(one["hd95_n"]))
    if job.data.masks == "instances":
        found["instance_f1"] = ratio(
            2 * one["matched"],
            2 * one["matched"] + one["false"] + one["missed"],
            lists["objects_squares"],
            int(one["n"]),
        )
        found["aji"] = ratio(one["aji_intersection"], one["aji_union"], lists["aji_squares"], int(one["n"]))
    found["loss"] = mean_of_values(one["loss"], one["loss_squares"], int(one["n"]))
    if count > 1:
        parts = zip(job.classes, lists["dice_class"], lists["dice_class_squares"], lists["dice_class_n"], strict=True)
        found |= {f"dice:{name}": _within(mean_of_values(a, b, int(n))) for name, a, b, n in parts}
    if job.labels:
        of_image = labels.summarise(_labels_of(sums), label_job(job))
        found |= {f"{_OF_IMAGE}{name}": value for name, value in of_image.items() if name != "loss"}
    return found

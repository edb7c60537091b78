"""What metrics are called, and how their figures are written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple


class Wording(NamedTuple):
    """How a metric is called; ``of_class`` before the name of a class, where that is another word.

    ``figures``: not a share but a measure of any size, written with three significant figures.
    """

    name: str
    of_class: str = ""
    unit: str = ""
    figures: bool = False


# Metrics whose name is more than its key with blanks.
WORDINGS = {
    "auroc": Wording("AUROC"),
    "dice": Wording("Dice"),
    "iou": Wording("IoU"),
    "dice_pooled": Wording("Dice, pooled"),
    "iou_pooled": Wording("IoU, pooled"),
    "hd95": Wording("Hausdorff 95", unit="mm", figures=True),
    "instance_f1": Wording("instance F1"),
    "aji": Wording("AJI"),
    "image_auroc": Wording("whole-image AUROC"),
    "image_balanced_accuracy": Wording("whole-image balanced accuracy"),
    "image_accuracy": Wording("whole-image accuracy"),
    "map50": Wording("mAP@50", of_class="AP@50"),
    "map75": Wording("AP75"),
    "map": Wording("mAP@[.5:.95]"),
    "sensitivity_1fp": Wording("sensitivity at 1 false positive per image"),
    "frechet": Wording("Fréchet distance", figures=True),
    "synthetic_accuracy": Wording("balanced accuracy, trained on invented images"),
    "memorised": Wording("memorised share"),
    "mse": Wording("MSE", figures=True),
    "psnr": Wording("PSNR", unit="dB", figures=True),
    "ssim": Wording("SSIM"),
}


def wording(metric: str) -> Wording:
    """How the metric, or its part of one class, is called and written."""
    key = metric.partition(":")[0]
    return WORDINGS.get(key, Wording(key.replace("_", " ")))


def limits(metric: str) -> tuple[float, float]:
    """The least and the largest value that a metric can have."""
    key = metric.partition(":")[0]
    if key == "psnr":
        return -math.inf, math.inf
    if key == "ssim":
        return -1.0, 1.0
    return 0.0, math.inf if key == "loss" or wording(key).figures else 1.0


def metric_name(metric: str, start: bool = False) -> str:
    """``auroc:WBC`` as AUROC WBC, ``hd95`` as Hausdorff 95 (mm); ``start``: with a capital, mAP aside."""
    words, part = wording(metric), metric.partition(":")[2]
    name = words.of_class or words.name if part else words.name
    if start and name.split()[0].replace("-", "").islower():
        name = name[0].upper() + name[1:]
    return f"{name}{' ' if part else ''}{part}{f' ({words.unit})' if words.unit else ''}"


def number(value: float | None, metric: str = "") -> str:
    """Three decimals, or three significant figures as the metric wants; no leading zero, a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    size = abs(value)
    if wording(metric).figures and size:
        size = float(f"{size:.3g}")
        place = math.floor(math.log10(size))
        text = f"{size:,.{max(2 - place, 0)}f}" if place > -6 else f"{size:.2e}"
    else:
        text = f"{size:.3f}"
    return ("−" if value < 0 and float(text.replace(",", "")) else "") + text.removeprefix("0")


def with_interval(value: float | None, low: float | None, high: float | None, metric: str = "") -> str:
    """``.940 [.911, .960]``; without brackets where a figure has no interval."""
    if number(low) == "–" or number(high) == "–":
        return number(value, metric)
    return f"{number(value, metric)} [{number(low, metric)}, {number(high, metric)}]" if number(value) != "–" else "–"


def privacy_words(spent: Mapping[str, Any]) -> str:
    """What ``server.spent.privacy_spent`` found, in one sentence; "" for nothing."""
    if not spent:
        return ""
    promise = f"epsilon {spent['epsilon']:.3g} at delta {spent['delta']:g} for each {spent['unit']}"
    if spent["kind"] == "local" and "sites" not in spent:
        return f"Differential privacy by each site: {promise}, of this run alone."
    if spent["kind"] == "local":
        return f"Differential privacy by each site: {promise} where most was spent, counted over all runs of the site."
    if spent["kind"] == "central":
        return f"Differential privacy by the server: {promise}, against whoever gets the model, not against the server."
    return f"Differential privacy with noise shared by {spent['noisy_sites']} sites or more: {promise}."

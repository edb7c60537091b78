"""How well images are rebuilt, and how well that tells anomalies: from sums that add up over sites."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shared.config import Job
from shared.intervals import Estimate, area_under_roc, mean_of_values
from shared.tasks import Sums
from shared.tasks.classification.metrics import area_from_histograms

# Bins of the decimal logarithm of an image's mean squared error, from LEAST to MOST: each 0.0025 decades wide, 0.6 % of
# the error, so that AUROC from them is within 1e-3 of the exact one. Grey values are clamped to 0..1: none is above 1.
LEAST, MOST = 1e-10, 1.0
BINS = 4000

_WINDOW, _SIGMA = 11, 1.5  # Wang et al. 2004, section III-B
_C1, _C2 = 0.01**2, 0.03**2


def normal_class(job: Job) -> int:
    """The index of the class the model is trained on."""
    return job.classes.index(job.data.normal) if job.data.normal else 0


def squared_error(images: Tensor, rebuilt: Tensor) -> Tensor:
    """The mean squared error of each image, (b, c, height, width) in [0, 1] -> (b,): the anomaly score."""
    return (images - rebuilt).square().mean((1, 2, 3))


def psnr(error: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB from mean squared errors; 100 where the error is below 1e-10."""
    return -10 * error.clamp(min=LEAST).log10()


def ssim(images: Tensor, rebuilt: Tensor) -> Tensor:
    """Structural similarity of each pair of images, (b, c, height, width) in [0, 1] -> (b,) in [-1, 1].

    Wang, Bovik, Sheikh & Simoncelli, IEEE Trans. Image Processing 2004;13:600: Gaussian window of 11 x 11 pixels with
    sd 1.5, K1 = .01, K2 = .03, mean over the places where the window lies inside the image, and over the channels.
    Images of fewer than 11 pixels get the largest odd window that fits.
    """
    channels, *size = images.shape[1:]
    side = min(_WINDOW, *(extent - (extent + 1) % 2 for extent in size))
    offsets = torch.arange(side, dtype=images.dtype, device=images.device) - side // 2
    line = torch.exp(-offsets.square() / (2 * _SIGMA**2))
    window = torch.outer(line, line)
    weight = (window / window.sum()).expand(channels, 1, side, side)

    def local(x: Tensor) -> Tensor:
        return F.conv2d(x, weight, groups=channels)

    a, b = local(images), local(rebuilt)
    var_a, var_b = local(images.square()) - a.square(), local(rebuilt.square()) - b.square()
    both = local(images * rebuilt) - a * b
    index = (2 * a * b + _C1) * (2 * both + _C2) / ((a.square() + b.square() + _C1) * (var_a + var_b + _C2))
    return index.mean((1, 2, 3))


def error_bins(error: Tensor) -> Tensor:
    """The bin, 0..BINS-1, of each mean squared error; what lies beyond the limits goes to an end, NaN to the last."""
    log = error.nan_to_num(nan=MOST).clamp(LEAST, MOST).log10()
    place = (log - math.log10(LEAST)) / math.log10(MOST / LEAST) * BINS
    return place.long().clamp(0, BINS - 1)


def histograms(sums: Sums, job: Job) -> np.ndarray:
    """How many images of each class fell into each bin of the error, int64 (classes, BINS)."""
    return np.asarray(sums["errors"], dtype=np.int64).reshape(len(job.classes), BINS)


def consistent(sums: Sums, job: Job) -> bool:
    """Whether the counts of one site agree, and no sum is larger than its number of images allows."""
    counts = histograms(sums, job).sum(1)
    normal = int(counts[normal_class(job)])
    # mse and (1 - ssim) / 2 lie in 0..1, psnr in 0..100; floats of many images add up with rounding
    most = {"mse": 1.0, "psnr": 100.0, "dssim": 1.0}
    bounded = all(
        float(sums[name]) <= normal * top * (1 + 1e-9)  # type: ignore[arg-type]
        and float(sums[f"{name}_squares"]) <= float(sums[name]) * top * (1 + 1e-9)  # type: ignore[arg-type]
        for name, top in most.items()
    )
    return bool(counts.sum() == sums["n"]) and bounded


def summarise(sums: Sums, job: Job) -> dict[str, Estimate]:
    """mse, psnr (dB) and ssim: means over the normal images. auroc: anomalies of any class against normal images by
    mean squared error; auroc:<class> where there are several classes of anomalies. All with 95 % intervals.
    """
    table, normal = histograms(sums, job), normal_class(job)
    n = int(table[normal].sum())
    mse, decibels, dssim = (
        mean_of_values(float(sums[name]), float(sums[f"{name}_squares"]), n)  # type: ignore[arg-type]
        for name in ("mse", "psnr", "dssim")
    )
    others = [k for k in range(len(job.classes)) if k != normal]
    anomalies = table[others].sum(0)
    area = area_from_histograms(anomalies, table[normal]) if others else area_under_roc(0.5, 0, 0)
    found = {
        "mse": mse,
        "psnr": decibels,
        "ssim": Estimate(1 - 2 * dssim.value, 1 - 2 * dssim.high, 1 - 2 * dssim.low, dssim.n),
        "auroc": area,
    }
    if len(others) > 1:
        found |= {f"auroc:{job.classes[k]}": area_from_histograms(table[k], table[normal]) for k in others}
    return found

"""The loss of one batch, and the sums by which a model is judged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from shared.config import Job
from shared.imaging.dataset import Dataset
from shared.tasks import Sums
from shared.tasks.reconstruction.data import Batch, batch
from shared.tasks.reconstruction.metrics import BINS, error_bins, normal_class, psnr, squared_error, ssim

# The decoder of a variational autoencoder gives the mean of normal distributions of this standard deviation, in units
# of the normalised image: how exact an image must be rebuilt before a longer code is not worth its cost.
NOISE = 0.1


def step(model: nn.Module, batch: Batch, job: Job, class_weights: Sequence[float], part: str = "") -> Tensor:
    """The mean over the images of their mean squared error plus the cost of their code.

    It is the negative evidence lower bound per pixel, times 2 NOISE², up to a constant (Kingma & Welling 2014, eq. 7).
    """
    rebuilt, cost = model(batch.images)
    errors = (rebuilt - batch.images).square().flatten(1).mean(1)
    losses: Tensor = errors + 2 * NOISE**2 * cost / batch.images[0].numel()
    return losses.mean()


def class_weights(counts: Sequence[int], job: Job) -> list[float]:
    """Unused: only one class is learnt from."""
    return [1.0]


def count_classes(data: Dataset, job: Job) -> list[int]:
    """Training images per class."""
    return [sum(k in sample.target for sample in data.samples) for k in range(len(job.classes))]


@torch.inference_mode()
def rebuild(model: nn.Module, data: Dataset, job: Job, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of images and what the model makes of them: float64 (b, channels, size, size) in [0, 1], on the CPU."""
    model.eval()
    size = job.evaluation.batch_size
    for start in range(0, len(data), size):
        found = batch(data, range(start, min(start + size, len(data))), job, device, train=False)
        rebuilt, _ = model(found.images)
        yield found.pixels(found.images).cpu().double(), found.pixels(rebuilt).cpu().double()


def collect(model: nn.Module, data: Dataset, job: Job, device: torch.device) -> Sums:
    """What a model does on a data set, as sums that add up over sites.

    ``n``; over the normal images ``mse``, ``psnr``, ``dssim`` = (1 - SSIM) / 2 and the squares of each; ``errors``, the
    histogram of the mean squared error (``error_bins``) of the images of each class, classes x BINS.
    """
    normal = normal_class(job)
    table = torch.zeros(len(job.classes), BINS, dtype=torch.int64)
    names = ("mse", "psnr", "dssim")
    totals = dict.fromkeys((*names, *(f"{name}_squares" for name in names)), 0.0)
    seen = 0
    for images, rebuilt in rebuild(model, data, job, device):
        kinds = torch.tensor([sample.target[0] for sample in data.samples[seen : seen + len(images)]])
        seen += len(images)
        error = squared_error(images, rebuilt)
        bins = error_bins(error)
        for k in range(len(job.classes)):
            table[k] += torch.bincount(bins[kinds == k], minlength=BINS)
        mine = kinds == normal
        if mine.any():
            dssim = (1 - ssim(images[mine], rebuilt[mine])) / 2
            for name, values in zip(names, (error[mine], psnr(error[mine]), dssim.clamp(0, 1)), strict=True):
                totals[name] += values.sum().item()
                totals[f"{name}_squares"] += values.square().sum().item()
    return {"n": len(data), **totals, "errors": table.flatten().tolist()}

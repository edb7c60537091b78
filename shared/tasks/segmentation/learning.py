"""The loss of one batch, what a network makes of a whole image, and the sums by which a model is judged."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.composed import count_missing, flagged
from shared.config import Job
from shared.devices import autocast
from shared.imaging.dataset import Dataset
from shared.tasks import Sums
from shared.tasks.classification import learning as labels
from shared.tasks.segmentation.data import Batch, memory_format, whole_image
from shared.tasks.segmentation.measures import Objects, find_objects, hausdorff95, match_objects, overlap
from shared.tasks.segmentation.metrics import Tally, label_job, with_labels
from shared.tasks.segmentation.models import Output, patch_size
from shared.tasks.segmentation.windows import blended

AT_ONCE = 4  # an image of so many patches or fewer goes through the network in one piece
_SMOOTH = 1.0  # added above and below in soft Dice, so that a class without a pixel has a gradient


def step(model: nn.Module, batch: Batch, job: Job, class_weights: Sequence[float], part: str = "") -> Tensor:
    """The mean over a batch of each image's own loss: see ``mask_losses``, plus cross-entropy of the image's class."""
    logits, of_image = both_outputs(model(batch.images))
    loss = mask_losses(logits, batch.masks).mean()
    if of_image is not None:
        loss = loss + labels.loss_of_logits(of_image.float(), batch.targets, label_job(job), class_weights)
    return loss


def both_outputs(output: Output) -> tuple[Tensor, Tensor | None]:
    """The logits of the mask and, where the job has labels, those of the image."""
    return output if isinstance(output, tuple) else (output, None)


def mask_losses(logits: Tensor, masks: Tensor) -> Tensor:
    """Cross-entropy (mean over pixels) plus soft Dice loss (mean over foreground classes), of each image: (b,).

    Dice as by Milletari et al. (3DV 2016) without the squares, per image and not over the batch: one image's
    gradient then does not depend on the others, which differential privacy needs. The mean is over the classes that the
    image shows, or over all if it shows none: a class it lacks would otherwise be punished for its mere chance in every
    pixel, and rare ones never start to be found.

    Args:
        logits: (b, 1 + classes, *size), channel 0 the background.
        masks: int64 (b, *size).
    """
    logits = logits.float()
    entropy = F.cross_entropy(logits, masks, reduction="none").flatten(1).mean(1)
    shares = logits.softmax(1).flatten(2)[:, 1:]
    classes = torch.arange(1, logits.shape[1], device=masks.device)
    wanted = masks.flatten(1)[:, None] == classes[:, None]  # not one_hot: of a whole volume its int64 would be 8 x this
    both, pixels = (shares * wanted).sum(2), wanted.sum(2)
    dice = (2 * both + _SMOOTH) / (shares.sum(2) + pixels + _SMOOTH)
    counted = (pixels > 0) | ~(pixels > 0).any(1, keepdim=True)
    return entropy + ((1 - dice) * counted).sum(1) / counted.sum(1)


def count_classes(data: Dataset, job: Job) -> list[int]:
    """Images that show each class; after them, if the job has labels of whole images, the images of each of these."""
    seen = np.zeros(len(job.classes), np.int64)
    for i in range(len(data)):
        seen += data.columns["pixels"][i][1:] > 0
    return [*seen.tolist(), *(labels.count_classes(data, label_job(job)) if job.labels else ())]


def class_weights(counts: Sequence[int], job: Job) -> list[float]:
    """The weights of the classes of the whole image. Those of the mask have none: soft Dice counts each the same."""
    if not job.labels:
        return [1.0]
    return labels.class_weights(counts[len(job.classes) :], label_job(job))


@torch.inference_mode()
def outcomes(model: nn.Module, data: Dataset, job: Job, device: torch.device) -> Iterator[tuple[Tensor, Tensor | None]]:
    """What the network makes of each image: logits float32 (1 + classes, *size) on the CPU, and of the image (labels,).

    An image larger than ``AT_ONCE`` patches is seen through overlapping windows of the size of a patch, whose results
    are blended with Gaussian weights; the logits of the image are then the mean over the windows.
    """
    model.eval()
    for index in range(len(data)):
        image = whole_image(data, index, job)[None]
        image = image.to(device, memory_format=memory_format(image))
        with autocast(device, job):
            logits, of_image = _through(model, image, job)
        yield logits[0].float().cpu(), None if of_image is None else of_image.float().cpu().mean(0)


def likeliest(logits: Tensor) -> Tensor:
    """The class of each pixel, int64 (*size), of logits (1 + classes, *size); of equals the first."""
    return logits.max(0).indices  # on a CPU argmax over the first axis takes twenty times as long


def in_one_piece(size: Sequence[int], job: Job) -> bool:
    """Whether an image of this size goes through the network as a whole."""
    return math.prod(size) <= AT_ONCE * math.prod(patch_size(job))


def _through(model: nn.Module, image: Tensor, job: Job) -> tuple[Tensor, Tensor | None]:
    if in_one_piece(image.shape[2:], job):
        return both_outputs(model(image))
    of_windows: list[Tensor] = []

    def look(windows: Tensor) -> Tensor:
        logits, of_image = both_outputs(model(windows.contiguous(memory_format=memory_format(windows))))
        if of_image is not None:
            of_windows.append(of_image)
        return logits.float()

    logits = blended(image, patch_size(job), job.evaluation.batch_size, job.evaluation.overlap, look)
    return logits, torch.cat(of_windows) if of_windows else None


def collect(model: nn.Module, data: Dataset, job: Job, device: torch.device) -> Sums:
    """What a model does on a data set, as sums that add up over sites; see ``metrics.Tally``.

    If cases may lack an image, ``missing`` says how many do; see ``composed.count_missing``.
    """
    tally = Tally(job)
    of_images: list[tuple[Tensor, Sequence[tuple[int, ...]]]] = []
    for index, (logits, of_image) in enumerate(outcomes(model, data, job, device)):
        mask = np.asarray(data.columns["mask"][index])
        truth = (mask > 0).astype(np.int64) if job.data.masks == "instances" else mask.astype(np.int64)
        loss = mask_losses(logits[None], torch.from_numpy(truth)[None]).item()
        predicted = likeliest(logits).numpy()
        spacing = data.columns["spacing"][index]
        distances = _distances(predicted, truth, spacing, len(job.classes)) if spacing.all() else []
        tally.add(loss, overlap(predicted, truth, len(job.classes)), distances, _objects(predicted, mask, job))
        if of_image is not None:
            of_images.append((of_image[None].double(), [data.samples[index].target]))
    missing: Sums = {"missing": count_missing(data.samples, job)} if flagged(job) else {}
    of_labels = with_labels(tally.sums, labels.sums_of_logits(of_images, label_job(job))) if job.labels else tally.sums
    return of_labels | missing


def _distances(predicted: np.ndarray, truth: np.ndarray, spacing: np.ndarray, classes: int) -> list[float]:
    """HD95 in mm of each class that both masks have."""
    found = (hausdorff95(predicted == k, truth == k, spacing.tolist()) for k in range(1, classes + 1))
    return [distance for distance in found if distance is not None]


def _objects(predicted: np.ndarray, mask: np.ndarray, job: Job) -> Objects | None:
    return match_objects(find_objects(predicted > 0), mask) if job.data.masks == "instances" else None

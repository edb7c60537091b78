"""The loss of one batch, and the sums by which a model is judged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.composed import count_missing, flagged
from shared.config import Job
from shared.devices import to_device
from shared.imaging.dataset import Dataset
from shared.tasks import Sums
from shared.tasks.classification.data import Batch, batch
from shared.tasks.classification.metrics import BINS, LIMIT, score_bins


def step(model: nn.Module, batch: Batch, job: Job, class_weights: Sequence[float], part: str = "") -> Tensor:
    """The mean loss of a batch.

    Each image's loss is weighed on its own and the mean taken over the number of images, never over the sum of the
    weights: so one image's share does not depend on the others, which bounded gradients (differential privacy) need.
    """
    return loss_of_logits(model(*batch.inputs), batch.targets, job, class_weights)


def loss_of_logits(
    logits: Tensor, targets: Sequence[tuple[int, ...]], job: Job, class_weights: Sequence[float]
) -> Tensor:
    """The mean over the images of their weighted loss, from logits (b, classes)."""
    weights = to_device(torch.tensor(class_weights, dtype=logits.dtype), logits.device)
    if job.data.multilabel:
        wanted = to_device(many_hot(targets, len(job.classes)).to(logits.dtype), logits.device)
        losses = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        weights = torch.where(wanted > 0, weights, 1.0)
    else:
        index = to_device(torch.tensor([target[0] for target in targets]), logits.device)
        losses = F.cross_entropy(logits, index, reduction="none")
        weights = weights[index]
    return (losses * weights).mean()  # another loss is made of ``losses`` just above: docs/extending.md


def many_hot(targets: Sequence[tuple[int, ...]], classes: int) -> Tensor:
    """Class indices as a 0/1 matrix (n, classes)."""
    table = torch.zeros(len(targets), classes)
    for row, target in enumerate(targets):
        table[row, list(target)] = 1
    return table


def class_weights(counts: Sequence[int], job: Job) -> list[float]:
    """A weight per class from the number of training images of all sites together.

    Inverse frequency, scaled so that the weights average 1 over the images; a class nobody has counts 1. Multi-label:
    the weight of the positives of a label, negatives over positives, at most 100.
    """
    total = sum(counts)
    if job.train.class_weights == "none":
        return [1.0] * len(counts)
    if job.data.multilabel:
        images = counts[-1]
        return [min((images - count) / count, 100.0) if count else 1.0 for count in counts[:-1]]
    present = sum(count > 0 for count in counts)
    return [total / (present * count) if count else 1.0 for count in counts]


def count_classes(data: Dataset, job: Job) -> list[int]:
    """Training images per class; multi-label: images per label and, last, the number of images."""
    counts = [sum(k in sample.target for sample in data.samples) for k in range(len(job.classes))]
    return [*counts, len(data)] if job.data.multilabel else counts


@torch.inference_mode()
def collect(model: nn.Module, data: Dataset, job: Job, device: torch.device) -> Sums:
    """What a model does on a data set, as sums that add up over sites; see ``sums_of_logits``.

    If cases may lack a part, ``missing`` says how many do; see ``count_missing``.
    """
    model.eval()
    size = job.evaluation.batch_size
    batches = (
        batch(data, range(start, min(start + size, len(data))), job, device, train=False)
        for start in range(0, len(data), size)
    )
    sums = sums_of_logits(((model(*found.inputs).cpu().double(), found.targets) for found in batches), job)
    return sums | {"missing": count_missing(data.samples, job)} if flagged(job) else sums


def sums_of_logits(outcomes: Iterable[tuple[Tensor, Sequence[tuple[int, ...]]]], job: Job) -> Sums:
    """The sums of any classifier from its logits float64 (b, classes), on the CPU, and the true class indices.

    ``n``; ``loss`` and ``loss_squares``; ``confusion``, classes x classes by row = truth (multi-label: per label
    true negatives, false positives, false negatives, true positives); ``positives`` and ``negatives``, a histogram of
    the score of each class over images that have it and that have it not.
    """
    classes, n = len(job.classes), 0
    confusion = torch.zeros(classes * 4 if job.data.multilabel else classes * classes, dtype=torch.int64)
    histogram = torch.zeros(2, classes, BINS, dtype=torch.int64)
    loss = squares = 0.0
    for logits, targets in outcomes:
        n += len(targets)
        wanted = many_hot(targets, classes)
        if job.data.multilabel:
            losses = F.binary_cross_entropy_with_logits(logits, wanted.double(), reduction="none").mean(1)
            scores = logits
            cell = (2 * wanted + (logits > 0)).long() + 4 * torch.arange(classes)
        else:
            truth = wanted.argmax(1)
            losses = F.cross_entropy(logits, truth, reduction="none")
            share = logits.log_softmax(1)
            scores = share - torch.log1p(-share.exp()).clamp(min=-LIMIT)  # log-odds of each class
            cell = truth * classes + logits.argmax(1)
        confusion += torch.bincount(cell.flatten(), minlength=len(confusion))
        bins = score_bins(scores)
        for k in range(classes):
            for side, chosen in enumerate((wanted[:, k] == 0, wanted[:, k] == 1)):
                histogram[side, k] += torch.bincount(bins[chosen, k], minlength=BINS)
        loss, squares = loss + losses.sum().item(), squares + losses.square().sum().item()
    return {
        "n": n,
        "loss": loss,
        "loss_squares": squares,
        "confusion": confusion.tolist(),
        "negatives": histogram[0].flatten().tolist(),
        "positives": histogram[1].flatten().tolist(),
    }

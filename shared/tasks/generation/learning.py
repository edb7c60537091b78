"""The two players' losses, the sums by which the generator is judged, and the sheet of samples a person looks at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shared.cases import derived_seed
from shared.config import Job
from shared.imaging.augment import normalise
from shared.imaging.dataset import Dataset, to_float
from shared.tasks import Sums
from shared.tasks.classification import learning as classification
from shared.tasks.generation.data import Batch, batch
from shared.tasks.generation.frechet import upper
from shared.tasks.generation.metrics import BINS, distance_bins, groups, made_per_group
from shared.tasks.generation.models import FEATURES, Gan
from shared.tasks.generation.nearest import nearest, thumbnails
from shared.tasks.generation.separation import Separation

_HORIZON = 0.05  # the moving average of the generator reaches back over this share of the run's steps
_ROWS, _COLUMNS = 8, 8  # of the sheet of samples


def step(model: Gan, batch: Batch, job: Job, class_weights: Sequence[float], part: str) -> Tensor:
    """The mean over a batch of the hinge loss (Lim & Ye 2017; Miyato et al. 2018) of the player whose turn it is.

    Samples are made of the classes of the batch's real images, as many; their noise is drawn from torch's global
    generator. The moving average follows at the start of the generator's turn, when every site holds the weights it
    was sent: with one step a round the sites' averages are then equal, and their mean is that of the global model.
    """
    images, classes = batch
    noise = torch.randn(len(images), job.model.latent, device=images.device)
    if part == "generator.":
        model.follow(max(_HORIZON * job.federation.rounds * job.train.local_steps, 1.0))
        return -model.discriminator(normalise(model.generator(noise, classes), job), classes).mean()  # type: ignore[no-any-return]
    with torch.no_grad():
        made = normalise(model.generator(noise, classes), job)
    # Real and made ones go through together: one pass, and so one backward pass for each image.
    scores = model.discriminator(torch.cat([images, made]), torch.cat([classes, classes]))
    real, fake = scores.chunk(2)
    return (F.relu(1 - real) + F.relu(1 + fake)).mean()


def count_classes(data: Dataset, job: Job) -> list[int]:
    """Training images per class."""
    return classification.count_classes(data, job)


def class_weights(counts: Sequence[int], job: Job) -> list[float]:
    """None: the generator is to make the classes as often as they come."""
    return [1.0]


class Samples(NamedTuple):
    """What a generator makes in an evaluation, by kind: thumbnails (kinds, m, values), features (kinds, m, d)."""

    thumbnails: Tensor
    features: Tensor


@torch.inference_mode()
def collect(model: Gan, data: Dataset, job: Job, device: torch.device) -> Sums:
    """What a generator is worth against a data set, as sums that add up over sites (see ``metrics.summarise``).

    ``real_features`` and ``real_pairs``: the sum of the features of the real images, and the upper triangle of the sum
    of their outer products. ``made_features``, ``made_pairs``: the same of samples, which every site makes alike from
    the job's seed; a site adds their mean once for each of its real images, of that image's class. So samples have the
    classes of the real images, and adding sites up counts no sample more than another. ``held_distances``: a histogram
    of the real images' distances to the nearest training image of the site; ``made_distances``: of the samples', again
    once for each real image. ``confusion``, where the generator is told the class: rows are the truth, columns what a
    classifier says that saw only samples.
    """
    kinds, classes = groups(job), len(job.classes)
    features, pairs = np.zeros(FEATURES), np.zeros(FEATURES * (FEATURES + 1) // 2)
    made_features, made_pairs = features.copy(), pairs.copy()
    held, made = torch.zeros(BINS, dtype=torch.int64), torch.zeros(BINS, dtype=torch.int64)
    confusion = torch.zeros(classes * classes, dtype=torch.int64)
    if len(data):
        model.eval()
        samples = make_samples(model, job, device)
        separation = Separation(samples.features.numpy()) if job.model.conditional else None
        counts = torch.zeros(kinds, dtype=torch.int64)
        for images, truth in _batches(data, job, device):
            found = features_of(model, images)
            features += found.sum(0).numpy()
            pairs += upper((found.T @ found).numpy())
            counts += torch.bincount(truth if kinds > 1 else torch.zeros_like(truth), minlength=kinds)
            if separation:
                cell = truth * classes + torch.from_numpy(separation.classes(found.numpy()))
                confusion += torch.bincount(cell, minlength=len(confusion))
        for count, rows in zip(counts.tolist(), samples.features, strict=True):
            made_features += count * rows.mean(0).numpy()
            made_pairs += count * upper((rows.T @ rows).numpy() / len(rows))
        held, made = _distances(samples, counts, data)
    sums: Sums = {
        "n": len(data),
        "real_features": features.tolist(),
        "real_pairs": pairs.tolist(),
        "made_features": made_features.tolist(),
        "made_pairs": made_pairs.tolist(),
        "held_distances": held.tolist(),
        "made_distances": made.tolist(),
    }
    return sums | ({"confusion": confusion.tolist()} if job.model.conditional else {})


def _batches(data: Dataset, job: Job, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised images on the device and their classes on the CPU."""
    for start in range(0, len(data), job.evaluation.batch_size):
        rows = range(start, min(start + job.evaluation.batch_size, len(data)))
        images, classes = batch(data, rows, job, device, train=False)
        yield images, classes.cpu()


def features_of(model: Gan, images: Tensor) -> Tensor:
    """The means over the image of the reference's last channels, float64 (n, FEATURES) on the CPU; none is negative."""
    found: Tensor = model.get_submodule("reference.features")(images)
    return found[:, :FEATURES].cpu().double()


def make_pictures(model: Gan, job: Job, classes: Sequence[int], seed: int, device: torch.device) -> Iterator[Tensor]:
    """Pictures (n, channels, size, size) in [0, 1] of these classes, some at a time; the same for equal seeds."""
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, len(classes), job.evaluation.batch_size):
        chosen = torch.tensor(classes[start : start + job.evaluation.batch_size], dtype=torch.int64)
        # Always a whole batch: torch draws a short one in another order, and few are to be the first of many.
        noise = torch.randn(job.evaluation.batch_size, job.model.latent, generator=generator)[: len(chosen)]
        yield model(noise.to(device), chosen.to(device))


def make_samples(model: Gan, job: Job, device: torch.device) -> Samples:
    """The samples of an evaluation: the same at every site and after every round, but for what the generator learnt."""
    per_kind, kinds = made_per_group(job), groups(job)
    rows, features = [], []
    classes = [kind for kind in range(kinds) for _ in range(per_kind)]
    for pictures in make_pictures(model, job, classes, derived_seed(job.seed, "samples"), device):
        rows.append(thumbnails(pictures))
        features.append(features_of(model, normalise(pictures, job)))
    return Samples(*(torch.cat(parts).reshape(kinds, per_kind, -1) for parts in (rows, features)))


def _distances(samples: Samples, counts: Tensor, data: Dataset) -> tuple[Tensor, Tensor]:
    """Histograms of the distances of real images, and of samples, to the nearest training image of the site."""
    training = data.whole.subset("train")
    held, made = torch.zeros(BINS, dtype=torch.int64), torch.zeros(BINS, dtype=torch.int64)
    if len(training):
        real = thumbnails(to_float(data.columns["image"].take(range(len(data)))))
        held += torch.bincount(distance_bins(nearest(real, training)), minlength=BINS)
        for count, rows in zip(counts, samples.thumbnails, strict=True):
            made += count * torch.bincount(distance_bins(nearest(rows, training)), minlength=BINS)
    return held, made


@torch.inference_mode()
def show(model: Gan, job: Job) -> dict[str, np.ndarray]:
    """``samples``: a sheet uint8 (h, w) or (h, w, 3) of 8 x 8 pictures, the same noise each round; each class has rows
    of its own, from the top in the job's order.
    """
    model.eval()
    rows = max(_ROWS, groups(job))
    classes = [row * groups(job) // rows for row in range(rows) for _ in range(_COLUMNS)]
    device = model.updates.device
    pictures = torch.cat(list(make_pictures(model, job, classes, derived_seed(job.seed, "sheet"), device))).cpu()
    times = max(1, 64 // job.data.size)
    framed = F.pad(pictures.repeat_interleave(times, 2).repeat_interleave(times, 3), (1, 1, 1, 1), value=1.0)
    channels, side = framed.shape[1:3]
    sheet = framed.reshape(rows, _COLUMNS, channels, side, side).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    return {"samples": to_bytes(sheet.squeeze(2) if channels == 1 else sheet)}


def to_bytes(picture: Tensor) -> np.ndarray:
    """Values in [0, 1] as uint8."""
    return (picture * 255).round().byte().cpu().numpy()

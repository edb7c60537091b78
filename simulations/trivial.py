"""The trivial model of a task: what next to nothing reaches, without which no figure of a network says anything.

classification   logistic regression on the pixels
segmentation     Otsu's threshold of each image on its own; nothing is learnt
detection        in every image the mean box of each class of the training images; nothing is looked at
reconstruction   the first 32 principal components of the training images

What is learnt is learnt from all sites' training images in one place. Other tasks have none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from server.results import scores_of
from shared.config import Job
from shared.errors import SiteRefusal
from shared.imaging.dataset import Dataset, concatenate, load_dataset, to_float
from shared.samples import read_samples
from shared.sitefile import read_site
from shared.tasks import Sums, add_sums, load_task
from shared.tasks.detection.data import truth
from shared.tasks.detection.metrics import Tally as BoxTally
from shared.tasks.segmentation.measures import find_objects, match_objects, overlap
from shared.tasks.segmentation.metrics import Tally
from simulations.sites import find_sites

BINS = 256  # of Otsu's histogram
SIDE = 32  # pixels a side that logistic regression is given, at most
COMPONENTS = 32
Judge = Callable[[Dataset], Sums]  # the sums that the task's collect gives of a network


def trivial_scores(job: Job, data: Path, out: Path, cache: Path | None = None) -> dict[str, Any]:
    """Scores as ``server.results.run_scores`` has them, and ``about``; empty where the task has no trivial model.

    ``data``, ``out`` and ``cache`` are as for ``find_sites``.
    """
    about, make = _MODELS.get(job.task, ("", None))
    if make is None or not _fits(job):
        return {}
    whole: dict[str, Dataset] = {}
    for site in (read_site(file) for file in find_sites(data, job, out, cache)):
        try:
            whole[site.name] = load_dataset(read_samples(site, job), site, job)
        except SiteRefusal as refusal:  # it is not in the federation either
            print(f"{site.name} is left out: {refusal}")
    if not whole:
        return {}
    judge = make([part.subset("train") for part in whole.values()], job)
    tests = {name: test for name, part in whole.items() if len(test := part.subset("test"))}
    sums = {name: judge(test) for name, test in tests.items()}
    task = load_task(job.task)
    found = scores_of(task.summarise(add_sums(sums.values()), job), sum(map(len, tests.values())))
    places = {name: scores_of(task.summarise(sums[name], job), len(test)) for name, test in tests.items()}
    return {"about": about, **found, "sites": places}


def _fits(job: Job) -> bool:
    """Whether the trivial model of the task can take the job's cases."""
    if job.task == "classification":
        return not (job.data.multilabel or job.modalities or job.tabular)
    if job.task == "segmentation":
        return len(job.classes) == 1 and not (job.labels or job.modalities or job.model.name == "unet3d")
    return True


# ---------------------------------------------------------------------- classification


class Regression(nn.Module):
    """Multinomial logistic regression on an image of at most ``SIDE`` pixels a side."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = weights  # (features + 1, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (b, classes) of images (b, channels, size, size)."""
        x = pixels(images).to(self.weights)
        return x @ self.weights[:-1] + self.weights[-1]


def pixels(images: Tensor) -> Tensor:
    """(b, channels, size, size) as rows of features."""
    return (F.adaptive_avg_pool2d(images, SIDE) if max(images.shape[2:]) > SIDE else images).flatten(1)


def fit_regression(x: Tensor, y: Tensor, weights: Tensor, strength: float = 1.0) -> Tensor:
    """The weights, the last row the intercepts: least weighted cross-entropy summed plus ``strength``/2 |weights|².

    Args:
        x: (n, features); y: (n,) classes; weights: one per class, in the loss.
    """
    x = x.double()
    held = torch.zeros(x.shape[1] + 1, len(weights), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([held], max_iter=300, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = x @ held[:-1] + held[-1]
        loss = F.cross_entropy(logits, y, weights.double(), reduction="sum") + strength / 2 * held[:-1].square().sum()
        loss = loss / len(x)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return held.detach()


def _regression(train: list[Dataset], job: Job) -> Judge:
    task, here, cpu = load_task(job.task), concatenate(train), torch.device("cpu")
    batches = (
        task.batch(here, range(start, min(start + 256, len(here))), job, cpu, train=False)
        for start in range(0, len(here), 256)
    )
    x = torch.cat([pixels(found.images) for found in batches])
    y = torch.tensor([sample.target[0] for sample in here.samples])
    weights = torch.tensor(task.class_weights(task.count_classes(here, job), job), dtype=torch.float64)
    model = Regression(fit_regression(x, y, weights))
    return lambda data: dict(task.collect(model, data, job, cpu))


# ---------------------------------------------------------------------- segmentation


def otsu(image: np.ndarray) -> float:
    """The threshold that parts grey values into the two classes of largest variance between them (Otsu 1979)."""
    counts, edges = np.histogram(image, BINS)
    middles = (edges[1:] + edges[:-1]) / 2
    below, mass = np.cumsum(counts), np.cumsum(counts * middles)
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (mass / below - (mass[-1] - mass) / above) ** 2
    return float(edges[1:][np.argmax(np.nan_to_num(between))])


def segment(image: np.ndarray) -> np.ndarray:
    """The minority side of Otsu's threshold, bool."""
    mask: np.ndarray = image > otsu(image)
    return ~mask if mask.mean() > 0.5 else mask


def threshold_sums(data: Dataset, job: Job) -> Sums:
    """What ``collect`` gives of a network, without a loss; the connected parts of the foreground are the objects."""
    tally = Tally(job)
    for index in range(len(data)):
        mask = np.asarray(data.columns["mask"][index])
        found = segment(to_float(data.columns["image"][index]).mean(0).numpy())
        objects = match_objects(find_objects(found), mask) if job.data.masks == "instances" else None
        tally.add(0.0, overlap(found.astype(np.int64), (mask > 0).astype(np.int64), 1), [], objects)
    return tally.sums


# ---------------------------------------------------------------------- detection


def mean_boxes(data: list[Dataset], job: Job) -> tuple[np.ndarray, np.ndarray]:
    """Mean training box (k, 4), in the fitted image, of each class that has one, and the classes."""
    found = [truth(part, i, job) for part in data for i in range(len(part))]
    boxes = np.concatenate([item.boxes for item in found])
    classes = np.concatenate([item.classes for item in found])
    kinds = np.unique(classes)
    return np.stack([boxes[classes == k].mean(0) for k in kinds]), kinds


def box_sums(data: Dataset, job: Job, boxes: np.ndarray, classes: np.ndarray) -> Sums:
    """What ``collect`` gives of a network. Average precision needs an order of the images: it is drawn at random."""
    tally, generator = BoxTally(len(job.classes)), np.random.default_rng(0)
    for i in range(len(data)):
        own = truth(data, i, job)
        scores = np.full(len(boxes), generator.random())
        tally.add(data.samples[i].id, own.boxes, own.classes, boxes, classes, scores)
    return tally.sums()


def _mean_box(train: list[Dataset], job: Job) -> Judge:
    constant = mean_boxes(train, job)
    return lambda data: box_sums(data, job, *constant)


# ---------------------------------------------------------------------- reconstruction


class Components(nn.Module):
    """Rebuilds images from their first principal components."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        rows = images.flatten(1).double()
        self.mean = rows.mean(0)
        _, _, axes = torch.linalg.svd(rows - self.mean, full_matrices=False)
        self.axes = axes[:COMPONENTS]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The images (b, channels, size, size) rebuilt, and their codes' cost, which is none."""
        rows = images.flatten(1).double() - self.mean
        rebuilt = (rows @ self.axes.T) @ self.axes + self.mean
        return rebuilt.to(images).view_as(images), torch.zeros(len(images))


def _principal(train: list[Dataset], job: Job) -> Judge:
    task, here, cpu = load_task(job.task), concatenate(train), torch.device("cpu")
    model = Components(task.batch(here, range(len(here)), job, cpu, train=False).images)
    return lambda data: dict(task.collect(model, data, job, cpu))


_MODELS: Mapping[str, tuple[str, Callable[[list[Dataset], Job], Judge] | None]] = {
    "classification": ("logistic regression on pixels", _regression),
    "segmentation": ("Otsu’s threshold", lambda train, job: lambda data: threshold_sums(data, job)),
    "detection": ("mean box of each class", _mean_box),
    "reconstruction": (f"PCA, {COMPONENTS} components", _principal),
}

"""Which counts of its images a site tells: exact ones, a declared number, and none of a cell that is too small.

A count that is left out must not follow from those that are told. So where a class is suppressed, the images that show
nothing but such classes are left out of the split's number, too: the classes still add up to it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from client.policy import Policy
from shared.cases import SPLITS
from shared.config import Job
from shared.errors import SiteRefusal
from shared.imaging.dataset import Dataset
from shared.norms import is_private
from shared.tasks import Sums, load_task


class Told(NamedTuple):
    """What is told of a split: its number of images, and its class counts as ``count_classes`` of the task gives them.

    ``rows`` are the images that are counted. ``exact``: nothing was declared or suppressed. ``small``: the split, or a
    class of it, has fewer images than ``min_cell``, and more than none: no sums over it leave.
    """

    images: int
    classes: list[int]
    rows: list[int]
    exact: bool
    small: bool


def tell(data: Dataset, job: Job, policy: Policy) -> dict[str, Told]:
    """What a site with these rules tells of its data, by split."""
    return {split: _tell(data.subset(split), split, job, policy) for split in SPLITS}


def _tell(data: Dataset, split: str, job: Job, policy: Policy) -> Told:
    task = load_task(job.task)
    if split == "train" and not policy.exact_counts:
        # Zeros, not invented counts: the server's class weights then come from the sites that do tell.
        none = [0] * len(task.count_classes(Dataset.of(()), job))
        return Told(policy.declared_images if len(data) else 0, none, [], False, False)
    counts = [int(count) for count in task.count_classes(data, job)]
    rows = list(range(len(data)))
    if policy.min_cell <= 1:
        return Told(len(data), counts, rows, True, False)
    shown = _shown(data, job, len(counts))
    cells = shown.sum(0)
    small = (cells > 0) & (cells < policy.min_cell)
    if small.any():
        rows = np.flatnonzero((shown & ~small).any(1) | ~shown.any(1)).tolist()
    if len(rows) < policy.min_cell:
        return Told(0, [0] * len(counts), [], not len(data), bool(len(data)))
    counts = [
        0 if hidden else count
        for count, hidden in zip(task.count_classes(rows_of(data, rows), job), small, strict=True)
    ]
    return Told(len(rows), counts, rows, not small.any(), bool(small.any()))


def is_small(data: Dataset, rows: list[int], job: Job, policy: Policy) -> bool:
    """Whether some images are fewer than ``min_cell``, or those of a class are, and more than none."""
    return _tell(rows_of(data, rows), "test", job, policy).small


def _shown(data: Dataset, job: Job, classes: int) -> np.ndarray:
    """bool (n, classes): which image is counted in which class, be it for one box or for many."""
    task = load_task(job.task)
    found = [task.count_classes(rows_of(data, [row]), job) for row in range(len(data))]
    return np.array(found, dtype=np.int64).reshape(-1, classes) > 0


def rows_of(data: Dataset, rows: list[int]) -> Dataset:
    """Some images of a data set; nothing is copied."""
    columns = {name: column.rows(rows) for name, column in data.columns.items()}
    return Dataset(columns, tuple(data.samples[i] for i in rows))


def survey_counts(told: Mapping[str, Told], skipped: int) -> Sums:
    """What a site says of its images before the first round: of each split, of each class of the training images."""
    counts: Sums = {f"images-{split}": told[split].images for split in SPLITS}
    return counts | {"skipped": skipped, "classes": told["train"].classes}


def require_cells(told: Mapping[str, Told], split: str) -> None:
    """Refuse figures over a split of too few images, or over images that are trained on.

    Raises:
        SiteRefusal: split-forbidden or small-cell.
    """
    if split not in SPLITS[1:]:
        raise SiteRefusal("split-forbidden", f"asked for figures over the split {split!r}, only val and test give any")
    if told[split].small:
        raise SiteRefusal("small-cell", f"{split} has fewer than privacy.min_cell images, or a class of it has")


def training_figures(
    told: Told,
    job: Job,
    steps: int,
    images: int,
    losses: tuple[float, ...],
    epsilon: float | None = None,
    seconds: float = 0.0,
) -> Sums:
    """What goes with a trained model: a weight and the steps; without DP and with exact counts, images seen, losses and
    the seconds that the training took.

    These would tell what the rules keep back: under DP a loss is no noised figure, and a number of images seen, or the
    time they take, gives away how many there are.

    Args:
        losses: of each part of the model, summed over the images seen.
        epsilon: of all that was spent on the images so far; it follows from noise, rate and steps alone.
    """
    figures: Sums = {"num-examples": told.images, "steps": steps}
    if epsilon is not None and math.isfinite(epsilon):
        figures["epsilon"] = epsilon
    if told.exact and not is_private(job):
        figures |= {"images": images, "loss": sum(losses), "seconds": round(seconds, 2)}
        if len(losses) > 1:
            figures["losses"] = list(losses)
    return figures

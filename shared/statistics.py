"""What a survey asks of every site's images, as sums that add up over sites: which numbers, and what they mean."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from shared.cases import SPLITS
from shared.config import Job
from shared.imaging.dataset import Dataset
from shared.tasks import Sums, load_task

GREY_BINS = 32  # of equal width, of grey values from 0 to 1
PATIENT_BINS = (0, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)  # where each begins; how many patients is not told


def template(job: Job) -> Sums:
    """A survey's reply from a site without images: names, lengths and kinds of its sums.

    For each split ``images-…``; ``classes-…`` as the task counts them; ``patients-…``, a one in the bin of
    PATIENT_BINS; of the decoded grey values, as the network gets them before it is normalised, ``grey-…``, the
    histogram, ``values-…``, how many there are, their ``sum-…`` and the sum of their ``squares-…``.

    Sums over images, by which sites are told apart: ``dark-…``, how many show dark on bright (skewed to the dark side,
    see ``shared.imaging.harmonise``); of the mean grey value of each image ``means-…`` and the squares ``means2-…``; of
    its standard deviation ``sds-…``. Black bars that fitting added count for none. Of colour pictures ``hues-…`` and
    ``hues2-…``, the same of the shares that red and green have in the image's mean colour. ``spacing-…`` is of the
    images that tell how large a pixel is: how many, the sum in mm, the sum of squares.
    """
    counted = len(load_task(job.task).count_classes(Dataset.of(()), job))
    sums: Sums = {}
    for split in SPLITS:
        sums |= {f"images-{split}": 0, f"classes-{split}": [0] * counted, f"patients-{split}": [0] * len(PATIENT_BINS)}
        sums |= {f"grey-{split}": [0] * GREY_BINS, f"values-{split}": 0, f"sum-{split}": 0.0, f"squares-{split}": 0.0}
        sums |= {f"dark-{split}": 0, f"means-{split}": 0.0, f"means2-{split}": 0.0, f"sds-{split}": 0.0}
        if has_colour(job):
            sums |= {f"hues-{split}": [0.0] * 2, f"hues2-{split}": [0.0] * 2}
        sums |= {f"spacing-{split}": [0.0] * 3}
    return sums


def has_colour(job: Job) -> bool:
    """Whether the job's images are red, green and blue."""
    return job.data.channels == 3 and not job.modalities


class Split(NamedTuple):
    """What is known of a split, at one site or at all; ``patients`` in words, mean and sd NaN without values."""

    images: int
    classes: list[int]
    patients: str
    grey: list[int]
    mean: float
    sd: float


def split_of(sums: Mapping[str, object], split: str) -> Split:
    """A split's part of such sums; the mean and standard deviation of its grey values follow from them."""
    count, total, squares = (float(sums[f"{key}-{split}"]) for key in ("values", "sum", "squares"))  # type: ignore[arg-type]
    mean = total / count if count else math.nan
    sd = math.sqrt(max(squares / count - mean**2, 0.0)) if count else math.nan
    images, classes, bins, grey = (sums[f"{key}-{split}"] for key in ("images", "classes", "patients", "grey"))
    return Split(images, classes, _patients(bins), grey, mean, sd)  # type: ignore[arg-type]


def _patients(bins: list[int]) -> str:
    """The least and the most patients that the bins of one or more sites allow, such as 20–49."""
    if not any(bins):
        return "–"
    low = sum(max(edge, 1) * sites for edge, sites in zip(PATIENT_BINS, bins, strict=True))
    if bins[-1]:
        return f"{low:,} or more"
    high = sum((edge - 1) * sites for edge, sites in zip(PATIENT_BINS[1:], bins[:-1], strict=True))
    return f"{low:,}–{high:,}"

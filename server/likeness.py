"""Which sites' images look unlike the others', and the rule of the job that helps: from the sums of a survey alone.

A site is held against the one that is nearest to all: the mean of all would lie where nobody is. Thresholds are wide,
since sites of one kind differ too: what passes them a person would see at a glance.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from shared.cases import SPLITS
from shared.config import Job, Scalar, toml_scalar
from shared.errors import UserError
from shared.rules import OF_SITE, PERCENTS, STAINS, rules_of
from shared.statistics import GREY_BINS
from shared.tasks import TASKS, Sums

TURNED = 0.5  # further share of images that are dark on bright
BRIGHTER = 0.1  # further mean grey value of the images, of 0 to 1
CONTRAST = 1.6  # times the standard deviation within images
CAST = 0.02  # further share of red or green in the mean colour
COARSER = 1.25  # times the mm per pixel
SPREAD = 1.5  # and as many standard deviations between images of one site, for grey and colour

INTENSITY = ("zscore", "percentiles", *OF_SITE, "nyul")


class Unlike(NamedTuple):
    """A site whose images look unlike the others', in words, and the setting of the job that helps."""

    site: str
    what: str
    setting: str

    def __str__(self) -> str:
        return f"{self.site} looks unlike the others: {self.what}; {self.setting}"


class Look(NamedTuple):
    """How a site's images look, over all splits; NaN where it did not tell.

    ``dark``: the share that is dark on bright. ``mean`` and ``apart``: mean and standard deviation, between images, of
    their mean grey value; ``sd``: the mean of the standard deviation within them. ``hues``: shares of red and green in
    their mean colour, ``hues_apart`` the larger of the standard deviations. ``spacing`` in mm.
    """

    images: int
    dark: float
    mean: float
    apart: float
    sd: float
    hues: tuple[float, ...]
    hues_apart: float
    spacing: float


def look_of(sums: Mapping[str, object]) -> Look:
    """How a site's images look by its answer to a survey."""
    told = [split for split in SPLITS if sums[f"values-{split}"]]
    images = sum(int(sums[f"images-{split}"]) for split in told)  # type: ignore[call-overload]
    known, mm, _ = _added(sums, "spacing", SPLITS)
    spacing = mm / known if known else math.nan
    if not images:
        return Look(0, math.nan, math.nan, math.nan, math.nan, (), math.nan, spacing)
    dark, mean, squares, sd = (_added(sums, key, told)[0] / images for key in ("dark", "means", "means2", "sds"))
    hues: tuple[float, ...] = ()
    hues_apart = math.nan
    if "hues-train" in sums:
        hues = tuple(value / images for value in _added(sums, "hues", told))
        of_squares = [value / images for value in _added(sums, "hues2", told)]
        hues_apart = max(_sd(square, hue) for square, hue in zip(of_squares, hues, strict=True))
    return Look(images, dark, mean, _sd(squares, mean), sd, hues, hues_apart, spacing)


def _added(sums: Mapping[str, object], key: str, splits: Sequence[str]) -> list[float]:
    parts = [np.atleast_1d(np.asarray(sums[f"{key}-{split}"], np.float64)) for split in splits]
    return [float(value) for value in np.sum(parts, 0)]


def _sd(mean_square: float, mean: float) -> float:
    return math.sqrt(max(mean_square - mean**2, 0.0))


# --- who is unlike ----------------------------------------------------------------------------------------------------


def unlike(sites: Mapping[str, Sums], job: Job) -> list[Unlike]:
    """The sites that look unlike the others, each with what differs and the setting that helps.

    A rule that the job has already is not named again. A site that is turned round is not called brighter, too, nor one
    of another stain: one rule mends both.
    """
    looks = {name: look_of(sums) for name, sums in sites.items()}
    found: list[Unlike] = []
    for kind in (_polarity, _colour, _intensity):
        found += [item for item in kind(looks, job) if item.site not in {other.site for other in found}]
    return [*found, *_spacing(looks, job)]


def _pairs(looks: Mapping[str, Look], value: Callable[[Look], tuple[float, ...]]) -> list[tuple[str, Look, Look]]:
    """Each other site with the reference: the one whose distance to all is the least, of two the one with more."""
    places = {name: np.array(value(look)) for name, look in looks.items()}
    known = {name: place for name, place in places.items() if place.size and np.isfinite(place).all()}
    if len(known) < 2:
        return []
    to_all = {
        name: sum(float(np.abs(place - other).sum()) for other in known.values()) for name, place in known.items()
    }
    middle = min(known, key=lambda name: (round(to_all[name], 9), -looks[name].images, name))
    return [(name, looks[name], looks[middle]) for name in known if name != middle]


def _polarity(looks: Mapping[str, Look], job: Job) -> list[Unlike]:
    if "polarity" in rules_of(job.data.harmonise):
        return []
    found = []
    for name, look, other in _pairs(looks, lambda look: (look.dark,)):
        if abs(look.dark - other.dark) > TURNED:
            what = "dark objects on a bright ground" if look.dark > other.dark else "bright objects on a dark ground"
            shares = f"{look.dark:.0%} of its images are dark on bright, of others {other.dark:.0%}"
            found.append(Unlike(name, f"{what} ({shares})", _set(job, "polarity")))
    return found


def _colour(looks: Mapping[str, Look], job: Job) -> list[Unlike]:
    if set(STAINS) & set(rules_of(job.data.harmonise)):
        return []
    found = []
    for name, look, other in _pairs(looks, lambda look: look.hues):
        further = max(abs(a - b) for a, b in zip(look.hues, other.hues, strict=True))
        if further > max(CAST, SPREAD * max(look.hues_apart, other.hues_apart)):
            shares = f"red, green, blue {_shares(look.hues)} of its light, {_shares(other.hues)} of others'"
            found.append(Unlike(name, f"another stain or light ({shares})", _set(job, "reinhard", "macenko")))
    return found


def _shares(hues: tuple[float, ...]) -> str:
    return ", ".join(f"{share:.0%}" for share in (*hues, 1 - sum(hues)))


def _intensity(looks: Mapping[str, Look], job: Job) -> list[Unlike]:
    if set(INTENSITY) & set(rules_of(job.data.harmonise)):
        return []
    found = []
    for name, look, other in _pairs(looks, lambda look: (look.mean, look.sd)):
        further = look.mean - other.mean
        ratio = max(look.sd, 1e-6) / max(other.sd, 1e-6)
        words = []
        if abs(further) > max(BRIGHTER, SPREAD * max(look.apart, other.apart)):
            direction = "brighter" if further > 0 else "darker"
            words.append(f"{direction} (mean grey value {look.mean:.2f}, of others {other.mean:.2f})")
        if max(ratio, 1 / ratio) > CONTRAST:
            direction = "more" if ratio > 1 else "less"
            words.append(f"{direction} contrast (sd {look.sd:.2f}, of others {other.sd:.2f})")
        if words:
            found.append(Unlike(name, " and ".join(words), _set(job, "zscore", "percentiles")))
    return found


def _spacing(looks: Mapping[str, Look], job: Job) -> list[Unlike]:
    found = []
    for name, look, other in _pairs(looks, lambda look: (math.log(look.spacing),)):
        ratio = look.spacing / other.spacing
        if max(ratio, 1 / ratio) > COARSER:
            what = f"pixels of {look.spacing:.2g} mm, of others {other.spacing:.2g} mm"
            found.append(
                Unlike(name, what, _setting(job, "data.spacing", [float(f"{max(look.spacing, other.spacing):.2g}")]))
            )
    return found


def _set(job: Job, *rules: str) -> str:
    """The setting with a rule added to those the job has; any of several does."""
    before = rules_of(job.data.harmonise)
    return _setting(job, "data.harmonise", [",".join((*before, rule)) for rule in rules])


def _setting(job: Job, key: str, values: Sequence[Scalar]) -> str:
    """In words, those of the values that the job may have: films keep their grey values, detection its sizes."""
    written = []
    for value in values:
        with contextlib.suppress(UserError):
            job.replace(**{key: value})
            written.append(f"{key} = {toml_scalar(value)}")
    return (
        f"set {' or '.join(written)}"
        if written
        else f"no setting of the job makes {TASKS[job.task].case}s alike in this"
    )


# --- a standard scale -------------------------------------------------------------------------------------------------


def landmarks(sums: Mapping[str, object]) -> str:
    """``data.landmarks`` for Nyúl's rule, from the histogram that the sites' answers add up to; "" without one.

    Percentiles of all sites' grey values together, within a bin by straight lines: what the sites had told anyway, and
    no image of any of them. Black bars are in the first bin; so the scale begins a little too dark.
    """
    histogram = np.array(_added(sums, "grey", SPLITS))
    if not histogram.any():
        return ""
    below = np.array([0.0, *accumulate(histogram)]) / histogram.sum()
    edges = np.linspace(0, 1, GREY_BINS + 1)
    steps = np.concatenate([[True], np.diff(below) > 0])
    values = np.interp(np.array(PERCENTS) / 100, below[steps], edges[steps]).clip(0.001, 0.999)
    return " ".join(f"{value:.3f}" for value in values)

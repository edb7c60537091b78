"""A site's answer to ``consilium survey``: counts and grey values of its images, within its own rules."""

from __future__ import annotations

import numpy as np

from client.counts import Told
from client.workspace import Workspace
from shared.cases import SPLITS
from shared.config import Job
from shared.errors import SiteRefusal
from shared.imaging.dataset import Column, Dataset
from shared.imaging.harmonise import skewness
from shared.statistics import GREY_BINS, PATIENT_BINS, has_colour, template
from shared.tasks import Sums

_LARGEST = 65535  # of a grey value as it is kept, see shared.imaging.dataset.to_uint16


def statistics(workspace: Workspace, job: Job) -> Sums:
    """The sums of ``shared.statistics.template`` over the images that the site tells of.

    Raises:
        SiteRefusal: dp-required, at a site from which figures leave only with noise: these have none.
    """
    if workspace.policy.require_dp:
        raise SiteRefusal("dp-required", "require_dp, but a survey's figures are exact")
    sums = template(job)
    for split in SPLITS:
        told = workspace.told[split]
        found = _split(workspace.data.subset(split), told, workspace.policy.min_cell, has_colour(job))
        sums |= {f"{name}-{split}": value for name, value in found.items()}
    return sums


def _split(data: Dataset, told: Told, least: int, colour: bool) -> Sums:
    found: Sums = {"images": told.images, "classes": told.classes}
    if not told.rows:  # nothing there, too few, or a number declared in their place
        return found
    patients = len({data.samples[row].patient for row in told.rows})
    place = int(np.searchsorted(PATIENT_BINS, patients, side="right")) - 1
    found["patients"] = [int(number == place) for number in range(len(PATIENT_BINS))]
    column = data.columns.get("image", data.columns.get("frames"))  # signals have no grey values
    if column is None:
        return found
    looks = _looks(column, told.rows, least, colour)
    return found | _grey(column, told.rows, least) | looks | {"spacing": _spacing(data, told.rows, least)}


def _grey(column: Column, rows: list[int], least: int) -> Sums:
    """Sums are kept as whole numbers, so that they are exact however many values there are."""
    histogram, values, total, squares = np.zeros(GREY_BINS, np.int64), 0, 0, 0
    for row in rows:
        raw = np.asarray(column[row]).reshape(-1)
        histogram += np.bincount(raw // ((_LARGEST + 1) // GREY_BINS), minlength=GREY_BINS)
        whole = raw.astype(np.int64)
        values, total, squares = values + len(raw), total + int(whole.sum()), squares + int(np.dot(whole, whole))
    histogram[histogram < least] = 0
    return {
        "grey": histogram.tolist(),
        "values": values,
        "sum": total / _LARGEST,
        "squares": squares / _LARGEST**2,
    }


def _looks(column: Column, rows: list[int], least: int, colour: bool) -> Sums:
    """By which sites are told apart: sums over images, each of which counts the same."""
    dark, means, sds, hues = 0, [], [], []
    for row in rows:
        picture = _without_bars(np.asarray(column[row])) / _LARGEST
        dark += skewness(picture) < 0
        means.append(float(picture.mean()))
        sds.append(float(picture.std()))
        if colour:
            mean = picture.mean((*range(picture.ndim - 3), -2, -1))
            hues.append(mean[:2] / mean.sum() if mean.any() else np.full(2, 1 / 3))
    if 0 < dark < least:
        dark = 0
    elif 0 < len(rows) - dark < least:  # else it would tell of so few bright ones
        dark = len(rows)
    found: Sums = {"dark": dark, "means": sum(means), "means2": float(np.square(means).sum()), "sds": sum(sds)}
    if colour:
        found |= {"hues": np.sum(hues, 0).tolist(), "hues2": np.square(hues).sum(0).tolist()}
    return found


def _without_bars(raw: np.ndarray) -> np.ndarray:
    """The image (…, height, width) without the black rows and columns at its edges; all of one that is black."""
    brightest = raw.reshape(-1, *raw.shape[-2:]).max(0)
    rows, columns = np.flatnonzero(brightest.max(1)), np.flatnonzero(brightest.max(0))
    if not len(rows):
        return raw
    return raw[..., rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _spacing(data: Dataset, rows: list[int], least: int) -> list[float]:
    """How many images tell how large a pixel is, the sum in mm (the mean of rows and columns), the sum of squares."""
    column = data.columns.get("spacing")
    found = [] if column is None else [float(np.mean(column[row][-2:])) for row in rows]
    known = [mm for mm in found if mm > 0]
    if len(known) < least:
        return [0.0, 0.0, 0.0]
    return [float(len(known)), sum(known), float(np.square(known).sum())]

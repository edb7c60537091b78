"""A site's answer to ``consilium survey``: counts and grey values of its images, within its own rules."""

from __future__ import annotations

import numpy as np

from client.counts import Told
from client.workspace import Workspace
from shared.cases import SPLITS
from shared.config import Job
from shared.errors import SiteRefusal
from shared.imaging.dataset import Column, Dataset
from shared.statistics import GREY_BINS, PATIENT_BINS, template
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
        found = _split(workspace.data.subset(split), workspace.told[split], workspace.policy.min_cell)
        sums |= {f"{name}-{split}": value for name, value in found.items()}
    return sums


def _split(data: Dataset, told: Told, least: int) -> Sums:
    found: Sums = {"images": told.images, "classes": told.classes}
    if not told.rows:  # nothing there, too few, or a number declared in their place
        return found
    patients = len({data.samples[row].patient for row in told.rows})
    place = int(np.searchsorted(PATIENT_BINS, patients, side="right")) - 1
    found["patients"] = [int(number == place) for number in range(len(PATIENT_BINS))]
    column = data.columns.get("image", data.columns.get("frames"))  # signals have no grey values
    return found | (_grey(column, told.rows, least) if column is not None else {})


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

"""The scale of a site: the grey values that become black and white by the rules ``site-zscore``, ``site-percentiles``.

They are measured on the site's own training images, as the rules before leave them, and kept beside its image cache.
Nothing of it is sent. The same files give the same scale, whatever machine or number of workers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shared.cases import Sample, SiteData, unit_hash
from shared.config import Job
from shared.errors import SiteRefusal
from shared.imaging.errors import UnreadableImage
from shared.imaging.harmonise import TAILS, Ends, ends_of_moments, grey, harmonise
from shared.imaging.read import Picture, read_image
from shared.imaging.stamp import stamp
from shared.imaging.volumes import read_volume
from shared.rules import rules_of, site_rule
from shared.sitefile import OWN_FOLDER
from shared.tasks import load_task

MOST = 256  # images that are measured, picked by hash: a scale of two numbers needs no more
_LEVELS = 65536  # of grey values in the histogram, as finely as images are kept
_VERSION = 1


def with_scale(samples: Sequence[Sample], site: SiteData, job: Job) -> SiteData:
    """The site with its scale, measured or read where it was measured before; as it is if the job asks for none.

    Raises:
        SiteRefusal: "no-training-images" that could be read.
    """
    if site.scale is not None or not site_rule(job.data.harmonise):
        return site
    chosen = _measured(samples)
    path = (site.cache or site.root / OWN_FOLDER / "cache") / f"scale-{_key(chosen, site, job)}.json"
    try:
        low, high = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        low, high = measure(samples, site, job)
        _write(path, json.dumps([low, high]))
    return replace(site, scale=(float(low), float(high)))


def measure(samples: Sequence[Sample], site: SiteData, job: Job) -> Ends:
    """The scale by the job's site rule, from the training images among ``samples``; see the module."""
    rule = site_rule(job.data.harmonise)
    histogram = np.zeros(_LEVELS, np.int64)
    for sample in _measured(samples):
        with contextlib.suppress(UnreadableImage):  # such images are counted and named where they are decoded
            values = np.rint(_before(sample, site, job) * (_LEVELS - 1)).astype(np.int64)
            histogram += np.bincount(values.reshape(-1), minlength=_LEVELS)
    if not histogram.any():
        raise SiteRefusal(
            "no-training-images",
            f"data.harmonise = {rule!r} takes the site's scale from its training images, and not one could be read",
        )
    return ends_of_histogram(histogram, rule)


def ends_of_histogram(histogram: npt.NDArray[np.int64], rule: str) -> Ends:
    """The grey values that become 0 and 1, from counts (65536,) of grey values from 0 to 1."""
    greys = np.linspace(0, 1, len(histogram))
    if rule == "site-zscore":
        mean = float(np.average(greys, weights=histogram))
        return ends_of_moments(mean, float(np.average((greys - mean) ** 2, weights=histogram)) ** 0.5)
    below = np.cumsum(histogram)
    low, high = (greys[np.searchsorted(below, below[-1] * share / 100)] for share in TAILS)
    return float(low), float(high)


def _measured(samples: Sequence[Sample]) -> list[Sample]:
    """At most MOST training images, each file and frame once."""
    files = {(sample.path, sample.key, str(sample.frame)): sample for sample in samples if sample.split == "train"}
    picked = sorted(files, key=lambda file: unit_hash("#".join(file)))[:MOST]
    return [files[file] for file in sorted(picked)]


def _before(sample: Sample, site: SiteData, job: Job) -> Picture:
    """The grey values of an image under the rules that stand before the one of the site."""
    rules = rules_of(job.data.harmonise)
    before = ",".join(rules[: rules.index(site_rule(job.data.harmonise))]) or "none"
    path = site.root / sample.path
    if job.task == "segmentation" and load_task(job.task).models.dimensions(job) == 3:
        values = read_volume(path, job.data.window).values
        picture = values.reshape(len(values), -1)
    else:
        picture = read_image(path, sample.frame, key=sample.key or None)
    return grey(harmonise(picture, before, job.data.landmarks)).clip(0, 1)


def _key(samples: Sequence[Sample], site: SiteData, job: Job) -> str:
    data = job.data
    parts = [f"{_VERSION} {site.root.resolve()} {job.task} {job.model.name} {data.harmonise} {data.landmarks}"]
    parts.append(f"{data.window}")
    parts += [f"{sample.path}#{sample.key}#{sample.frame} {stamp(site.root / sample.path)}" for sample in samples]
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _write(path: Path, text: str) -> None:
    """Kept for the next time; where it cannot be written it is measured again."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)

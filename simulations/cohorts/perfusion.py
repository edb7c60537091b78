"""Cohorts of dynamic contrast-enhanced scans, drawn by a program, whose two classes differ in the time course alone.

A contrast agent is given while a breast lesion is scanned again and again. In both classes it lights up and reaches the
same brightness halfway between the agent's arrival and the end; "persistent" (as benign lesions do) goes on rising,
"washout" (as malignant ones do) falls. Place, shape, size and brightness come from the same distributions, brightness
from a wide one, so one frame tells next to nothing, nor does the mean over time, nor do the frames out of order.

Every random number comes from a stream named by (seed, site, split, patient): the same arguments give the same bytes, a
site does not depend on how many others there are, and more patients leave the earlier ones as they were.
"""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.tag import Tag
from pydicom.uid import (
    ExplicitVRLittleEndian,
    MRImageStorage,
    MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
    RLELossless,
    generate_uid,
)
from scipy.ndimage import gaussian_filter  # type: ignore[import-untyped,unused-ignore]

from shared.cases import SPLITS

GENERATOR = "perfusion phantom 1"  # goes into README.txt and the headers; raise it when the scans change
LABELS = ("persistent", "washout")
SIZE = 16  # pixels
FRAMES = 12
_TOP = 4095  # 12 bits
_SHOWN = 0.85  # share of the full scale that the display window covers
_RATE = 0.030  # mean relative change per minute after the rise, up or down by class
_SPREAD = 0.022  # its standard deviation among the patients of one class
_BRIGHTNESS = (0.08, 0.62)  # of the lesion at the middle of its course, drawn evenly in its logarithm


@dataclass(frozen=True)
class Scanner:
    """A hospital: how it scans, how it stores, how many of its patients have a lesion that washes out."""

    name: str
    interval: float  # minutes from frame to frame
    delay: float  # minutes until the agent arrives, on average
    gain: float  # brightness of everything
    noise: float  # standard deviation in either channel, of the full scale
    washout: float  # share of the patients
    share: float  # training patients, as a share of the largest site's
    storage: str  # "multiframe", "multiframe-rle", "series" or "png"


_SITES = (
    Scanner("hospital-east", 0.60, 1.0, 1.00, 0.012, 0.5, 1.0, "multiframe"),
    Scanner("hospital-lake", 0.70, 1.3, 0.85, 0.011, 0.3, 0.75, "multiframe-rle"),
    Scanner("hospital-moor", 0.55, 0.8, 1.10, 0.014, 0.6, 0.5, "series"),
    Scanner("hospital-peak", 0.80, 1.6, 0.95, 0.012, 0.2, 0.25, "png"),
)


class Exam(NamedTuple):
    """One patient's scan: ``frames`` float32 (t, 16, 16) in [0, 1] as displayed, at ``times`` in minutes; ``mask`` is
    the share of the lesion in every pixel; ``arrival`` of the agent in minutes."""

    frames: NDArray[np.float32]
    times: NDArray[np.float64]
    mask: NDArray[np.float32]
    arrival: float
    label: str


def scanner(number: int, seed: int) -> Scanner:
    """The hospital with this number, from 0: four are fixed, those after them are drawn from the seed."""
    if number < len(_SITES):
        return _SITES[number]
    rng = np.random.default_rng([seed, number])
    return Scanner(
        name=f"hospital-{number + 1:02d}",
        interval=rng.uniform(0.55, 0.8),
        delay=rng.uniform(0.8, 1.6),
        gain=rng.uniform(0.85, 1.15),
        noise=rng.uniform(0.011, 0.014),
        washout=rng.uniform(0.2, 0.6),
        share=rng.uniform(0.25, 1.0),
        storage=("multiframe", "series", "multiframe-rle", "png")[number % 4],
    )


def counts(machine: Scanner, patients: int) -> dict[str, int]:
    """Patients of each split, where the largest site trains on ``patients``: all sites test on half as many."""
    return {
        "train": max(2, round(patients * machine.share)),
        "val": max(1, round(patients / 10)),
        "test": max(2, round(patients / 2)),
    }


def draw(number: int, split: str, patient: int, seed: int) -> Exam:
    """The scan of one patient of site ``number``; the label decides on the sign of the late course and nothing else."""
    machine = scanner(number, seed)
    rng = np.random.default_rng([seed, number, SPLITS.index(split), patient])
    washes_out = bool(rng.random() < machine.washout)
    times = np.arange(FRAMES - int(rng.integers(0, 3))) * machine.interval
    arrival = machine.delay + rng.uniform(-0.3, 0.3)
    rate = abs(_RATE) * (-1 if washes_out else 1) + rng.normal(0, _SPREAD)
    lesion = np.exp(rng.uniform(*np.log(_BRIGHTNESS))) * _course(times, arrival, rng.uniform(0.15, 0.35), rate)
    tissue = rng.uniform(0.03, 0.10) * _course(times, arrival, rng.uniform(0.5, 1.5), rng.normal(0.02, 0.02))
    mask = _lesion(rng)
    before = rng.uniform(0.10, 0.20) * _texture(rng, 2.5, 0.35)  # the tissue without the agent
    signal = (
        before
        + tissue[:, None, None] * _texture(rng, 2.0, 0.3)
        + lesion[:, None, None] * mask * _texture(rng, 1.0, 0.2)
    )
    signal *= machine.gain * rng.uniform(0.9, 1.1)
    noise = rng.normal(0, machine.noise, (2, *signal.shape))
    seen = np.hypot(signal + noise[0], noise[1])  # the magnitude of a complex signal: Rician
    return Exam(np.clip(seen, 0, 1).astype(np.float32), times, mask, arrival, LABELS[washes_out])


def _course(times: NDArray[np.float64], arrival: float, rise: float, rate: float) -> NDArray[np.float64]:
    """Brightness over time: 0 before the arrival, an exponential rise, then a straight line of slope ``rate``
    through 1 at the middle of what is left of the scan."""
    since = np.maximum(times - arrival, 0)
    middle = (times[-1] - arrival) / 2
    course: NDArray[np.float64] = (1 - np.exp(-since / rise)) * (1 + rate * (since - middle))
    return course


def _lesion(rng: np.random.Generator) -> NDArray[np.float32]:
    """An ellipse of random place, size and direction with a lobed edge, as the share of each pixel it covers."""
    fine = 4
    centre = rng.uniform(4.5, SIZE - 4.5, 2)
    radii = rng.uniform(2.0, 3.8, 2)
    angle = rng.uniform(0, np.pi)
    y, x = np.meshgrid(*[(np.arange(SIZE * fine) + 0.5) / fine] * 2, indexing="ij")
    down, right = y - centre[0], x - centre[1]
    u, v = right * np.cos(angle) + down * np.sin(angle), down * np.cos(angle) - right * np.sin(angle)
    lobes = 1 + rng.uniform(0, 0.2) * np.cos(rng.integers(2, 6) * np.arctan2(v, u) + rng.uniform(0, 2 * np.pi))
    inside = np.hypot(u / radii[0], v / radii[1]) < lobes
    share: NDArray[np.float32] = inside.reshape(SIZE, fine, SIZE, fine).mean((1, 3)).astype(np.float32)
    return share


def _texture(rng: np.random.Generator, scale: float, depth: float) -> NDArray[np.float64]:
    """A smooth random field about 1, spread by ``depth``, with a grain of ``scale`` pixels."""
    field = gaussian_filter(rng.standard_normal((SIZE, SIZE)), scale, mode="reflect")
    smooth: NDArray[np.float64] = np.exp(depth * field / field.std())
    return smooth

"""From a picture as it was read to what a task keeps of it: the site's rules, then the network's size."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from shared.cases import SiteData
from shared.config import Job
from shared.imaging.harmonise import harmonise
from shared.imaging.read import Picture, fit
from shared.imaging.spacing import middle, pixel_spacing, resampled_picture


def harmonised(picture: Picture, site: SiteData, job: Job) -> Picture:
    """A whole picture after ``data.harmonise``; see ``shared.imaging.harmonise.harmonise``."""
    return harmonise(picture, job.data.harmonise, job.data.landmarks, site.scale)


def fitted(picture: Picture, path: Path, job: Job) -> np.ndarray:
    """A picture, or a part of one, of the file ``path`` as float32 (channels, size, size) in [0, 1].

    Without ``data.spacing`` it is fitted into that size. With it every pixel is so many mm: the picture is resampled,
    and its middle is taken, black where it is smaller.

    Raises:
        UnreadableImage: "no-spacing" where a spacing is asked for and the file tells none.
    """
    size = job.data.size
    if job.data.spacing:
        picture = middle(resampled_picture(picture, pixel_spacing(path), job.data.spacing), (size, size))
    return fit(picture, size, size, job.data.channels)


def spacing_kept(picture: Picture, path: Path, job: Job) -> np.ndarray:
    """Millimetres per pixel (row, column) of what ``fitted`` gives, float64; zeros where the file tells none."""
    if job.data.spacing:
        return np.full(2, job.data.spacing)
    spacing: np.ndarray = pixel_spacing(path) * (max(picture.shape[:2]) / job.data.size)
    return spacing


def prepared_by(job: Job) -> str:
    """What both depend on."""
    data = job.data
    return f"{data.channels} {data.size} {data.spacing} {data.harmonise} {data.landmarks}"

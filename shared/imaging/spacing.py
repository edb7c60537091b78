"""How large a pixel is, and images resampled so that it is equally large everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import interpolate

from shared.imaging.display import Picture
from shared.imaging.errors import UnreadableImage, only_unreadable


def pixel_spacing(path: Path) -> np.ndarray:
    """(row, column) spacing of a DICOM picture in mm, float64; zeros where it says none, and of every other file.

    PixelSpacing only: ImagerPixelSpacing is measured at the detector, not in the patient (PS3.3 10.7.1.3).
    """
    try:
        found = _pixel_spacing(path)
    except UnreadableImage:
        found = ()
    return np.array(found if len(found) == 2 and min(found) > 0 else (0.0, 0.0))


@only_unreadable
def _pixel_spacing(path: Path) -> tuple[float, ...]:
    with path.open("rb") as file:
        if file.read(132)[128:] != b"DICM":
            return ()
    from pydicom import dcmread

    return tuple(map(float, dcmread(path, stop_before_pixels=True, specific_tags=["PixelSpacing"]).PixelSpacing))


def resample(
    planes: np.ndarray, mask: np.ndarray, spacing: np.ndarray, wanted: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An image (channels, *size) linearly, its mask (*size) by nearest neighbour, to ``wanted`` mm along every axis.

    An image that shrinks is smoothed first. The new spacing is that of whole pixels, so not quite ``wanted``.

    Raises:
        UnreadableImage: "no-spacing" where the spacing is not known.
    """
    image, size, shrinks = _resampled(planes, spacing, wanted)
    # As float64, which holds every object's number.
    labels = interpolate(torch.from_numpy(mask.astype(np.float64))[None, None], size, mode="nearest-exact")
    return image, labels[0, 0].numpy().astype(mask.dtype), spacing * np.array(shrinks)


def _resampled(planes: np.ndarray, spacing: np.ndarray, wanted: float) -> tuple[np.ndarray, list[int], list[float]]:
    """The image, its size without channels, and by how much each axis shrank."""
    if not spacing.all():
        raise UnreadableImage("no-spacing", "data.spacing asks for mm, the file does not say how large a pixel is")
    old_size = planes.shape[1:]
    size = [max(1, round(side * mm / wanted)) for side, mm in zip(old_size, spacing, strict=True)]
    shrinks = [old / new for old, new in zip(old_size, size, strict=True)]
    if max(shrinks) > 1:
        from scipy.ndimage import gaussian_filter

        sigma = [0.0, *(max(0.0, (factor - 1) / 2) for factor in shrinks)]
        planes = gaussian_filter(planes, sigma, mode="nearest")
    mode = "bilinear" if len(size) == 2 else "trilinear"
    image = interpolate(torch.from_numpy(np.ascontiguousarray(planes))[None], size, mode=mode, align_corners=False)
    return image[0].clamp(0, 1).numpy(), size, shrinks


def resampled_picture(picture: Picture, spacing: np.ndarray, wanted: float) -> Picture:
    """A picture (H, W) or (H, W, 3) resampled to ``wanted`` mm per pixel; see ``resample``."""
    planes = picture[None] if picture.ndim == 2 else np.moveaxis(picture, -1, 0)
    image = _resampled(planes.astype(np.float32), spacing, wanted)[0]
    return image[0] if picture.ndim == 2 else np.ascontiguousarray(np.moveaxis(image, 0, -1))


def middle(picture: Picture, size: Sequence[int]) -> Picture:
    """The middle (height, width) of a picture (H, W) or (H, W, 3); black where it is smaller."""
    result = np.zeros((*size, *picture.shape[2:]), np.float32)
    taken, put = [], []
    for has, wants in zip(picture.shape[:2], size, strict=True):
        both = min(has, wants)
        taken.append(slice((has - both) // 2, (has - both) // 2 + both))
        put.append(slice((wants - both) // 2, (wants - both) // 2 + both))
    result[tuple(put)] = picture[tuple(taken)]
    return result

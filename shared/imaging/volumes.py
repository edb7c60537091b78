"""Volumes: a NIfTI file, a folder with one DICOM series, or a multi-frame DICOM file, all read to the same array.

Whatever the file, axes are (d, h, w): slices from feet to head, rows from front to back, columns from the patient's
right to the left, as an axial CT is shown (see grid.py). The same patient as NIfTI and as DICOM gives the same array.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shared.errors import UserError
from shared.imaging.dicom import dicom_frame_count, patient_id
from shared.imaging.errors import UnreadableImage
from shared.imaging.grid import Affine, Array, Stack, canonical, spacing
from shared.imaging.nifti import is_nifti_name, read_nifti
from shared.imaging.series import Name, has_place, named, read_series, slice_files, sorted_planes


class Volume(NamedTuple):
    """A volume and where it lies.

    ``values`` is float32 (d, h, w) in [0, 1]; ``spacing`` (dz, dy, dx) is in mm along the same axes, None where the
    file does not say; ``affine`` takes an index (d, h, w, 1) to mm (x, y, z, 1), RAS+ (the identity where unknown);
    ``reference`` is DICOM's FrameOfReferenceUID, "" where there is none.
    """

    values: npt.NDArray[np.float32]
    spacing: tuple[float, float, float] | None
    affine: Affine
    reference: str = ""


def read_volume(path: Name, window: str = "") -> Volume:
    """Read one volume.

    Args:
        path: a .nii or .nii.gz file, a folder with the slices of one DICOM series, or a multi-frame DICOM file.
        window: "low high" in the file's measured units (CT: HU): these and what lies beyond become 0 and 1. "" takes
            the least and the largest value of the volume. Padding and NaN become 0 and count for neither.

    Raises:
        UnreadableImage: whatever is wrong with the files; ``detail`` names the file.
        UserError: a window that is not two growing numbers.
    """
    ends = window_ends(window)
    stack = read_stack(path)
    values = _unit(stack.values, stack.valid, ends)
    if stack.affine is None:
        return Volume(values, None, np.eye(4))
    return Volume(values, spacing(stack.affine), stack.affine, stack.reference)


def read_stack(path: Name) -> Stack:
    """The volume in its files' own units, axes in the canonical order. Raises UnreadableImage as read_volume does."""
    reader = read_nifti if is_nifti_name(path) else read_series
    return named(Path(path), lambda file: canonical(reader(file)))


def is_volume(path: Name) -> bool:
    """Whether read_volume is the reader to ask: a NIfTI file, a folder of DICOM slices, a DICOM file of many frames.

    Of a folder only its first two slices are looked at: one that mixes series is a volume here, and an error there. A
    folder of pictures that lie nowhere in space (radiographs) is none.
    """
    path = Path(path)
    if is_nifti_name(path):
        return path.is_file()
    try:
        if path.is_dir():
            return len(slice_files(path)) > 1 and all(map(has_place, slice_files(path)[:2]))
        return path.is_file() and dicom_frame_count(path) > 1
    except (UnreadableImage, OSError):
        return False


def source_files(path: Name) -> list[Path]:
    """The files of a volume, a series' slices in the order of their places; of a file, itself."""
    if Path(path).is_file():
        return [Path(path)]
    return list(dict.fromkeys(plane.path for plane in sorted_planes(path)))


def volume_patient(path: Name) -> str:
    """The PatientID of a series or DICOM file; "" where it has none, or for NIfTI. It stays at the site."""
    path = Path(path)
    files = slice_files(path)[:1] if path.is_dir() else [path]
    return patient_id(files[0]) if files else ""


def window_ends(window: str) -> tuple[float, float] | None:
    """The two ends of a window written "low high"; None for "".

    Raises:
        UserError: not two finite growing numbers.
    """
    if not window.strip():
        return None
    try:
        low, high = (float(word) for word in window.replace(",", " ").split())
    except ValueError:
        low, high = math.nan, math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(f"data.window = {window!r}: write two growing numbers, for example '-160 240'")
    return low, high


def _unit(values: Array, valid: Array | None, ends: tuple[float, float] | None) -> npt.NDArray[np.float32]:
    """Values of any unit as float32 in [0, 1]; see read_volume."""
    if ends is None:
        inside = values if valid is None else values[valid]
        ends = (float(inside.min()), float(inside.max())) if inside.size else (0.0, 1.0)
    low, high = ends
    # 32-bit numbers in double: a float's 24 bits do not hold each of them
    result = values.astype(np.result_type(values.dtype, np.float32))
    result -= low
    result *= 1.0 / (high - low) if high > low else 0.0
    if valid is not None:
        result[~valid] = 0.0
    picture: npt.NDArray[np.float32] = result.clip(0.0, 1.0).astype(np.float32)
    return picture

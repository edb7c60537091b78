"""NIfTI files: one volume read with its place in space, a mask written."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from shared.imaging.errors import UnreadableImage, require_bytes, silence
from shared.imaging.grid import Affine, Array, Stack, as_in_file
from shared.imaging.series import MAX_VOXELS, Name

_MILLIMETRES = {"meter": 1000.0, "micron": 0.001}
_SUFFIXES = (".nii", ".nii.gz")


def is_nifti_name(path: Name) -> bool:
    """Whether the file is NIfTI by its name."""
    return str(path).lower().endswith(_SUFFIXES)


def read_nifti(path: Name) -> Stack:
    """The one volume of a NIfTI file (x, y, z), its values through the header's slope, of any number type.

    The affine is the sform, else the qform, else what the voxel sizes say (nibabel's rule), in mm whatever the header's
    unit of length.

    Raises:
        UnreadableImage: "not-a-volume" for pictures, films and colour; "truncated", "corrupt", "too-large", ….
    """
    image = _open(path)
    values = np.asanyarray(image.dataobj).reshape(_volume_shape(path, image))
    unit = _MILLIMETRES.get(image.header.get_xyzt_units()[0], 1.0)
    valid = np.isfinite(values) if values.dtype.kind == "f" else None
    return Stack(
        values,
        np.diag([unit, unit, unit, 1.0]) @ np.asarray(image.affine, np.float64),
        None if valid is None or valid.all() else valid,
    )


def read_flat_nifti(path: Name) -> Array:
    """The values of a NIfTI file that holds one flat picture, (rows, columns) as other programs show them."""
    image = _open(path)
    shape = [side for side in image.shape if side != 1]
    if len(shape) != 2:
        raise UnreadableImage("mask-size", f"{path}: {image.shape}, for a flat picture")
    values: Array = np.asanyarray(image.dataobj).reshape(shape).T
    return values


def _open(path: Name) -> Any:
    """A nibabel image whose header is sound."""
    import nibabel
    from nibabel.filebasedimages import ImageFileError

    silence("nibabel.global")
    require_bytes(path)
    try:
        image: Any = nibabel.load(path)
    except ImageFileError as error:
        raise UnreadableImage("corrupt", f"{path}: {error}") from None
    if not isinstance(image, nibabel.Nifti1Image | nibabel.Nifti1Pair):
        raise UnreadableImage("unsupported-format", f"{path}: {type(image).__name__}, not NIfTI")
    if math.prod(image.shape) > MAX_VOXELS:
        raise UnreadableImage("too-large", f"{path}: {image.shape}")
    kind = image.get_data_dtype()
    needed = image.dataobj.offset + math.prod(image.shape) * kind.itemsize
    if not str(path).endswith(".gz") and os.path.getsize(path) < needed:
        raise UnreadableImage("truncated", f"{path}: {os.path.getsize(path)} bytes of {needed}")
    if kind.kind not in "iuf":
        raise UnreadableImage("not-a-volume", f"{path}: voxels of type {kind}, not one number each")
    return image


def _volume_shape(path: Name, image: Any) -> tuple[int, ...]:
    shape = image.shape
    if len(shape) < 3 or min(shape[:3]) < 2 or any(side != 1 for side in shape[3:]):
        raise UnreadableImage("not-a-volume", f"{path}: {' x '.join(map(str, shape))} voxels; one volume is needed")
    return tuple(shape[:3])


def write_nifti(mask: Array, affine: Affine, out: Path, like: Path | None = None) -> None:
    """Write a mask (d, h, w) of whole numbers as NIfTI.

    Args:
        mask: in the canonical order of axes (see grid.py), in the smallest number type that holds its values.
        affine: of the mask's grid, from (d, h, w) to mm, RAS+.
        out: a file name that ends in .nii or .nii.gz.
        like: the NIfTI file that was segmented: the mask gets its order of axes and its place, so that both lie voxel
            on voxel for programs that look at no affine. Left out, axes are (w, h, d).
    """
    import nibabel

    image: Any
    if like is None:
        turned, place = mask.transpose(2, 1, 0), affine[:, [2, 1, 0, 3]]
    else:
        source = _open(like)
        turned, place = as_in_file(mask, np.asarray(source.affine, np.float64)), source.affine
    kind = np.min_scalar_type(int(mask.max(initial=0)))
    image = nibabel.Nifti1Image(np.ascontiguousarray(turned).astype(kind if kind.itemsize < 4 else np.int32), place)
    image.header.set_xyzt_units(source.header.get_xyzt_units()[0] if like is not None else "mm")
    nibabel.save(image, out)

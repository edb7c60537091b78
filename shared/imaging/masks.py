"""Masks: which class, or which object, every pixel or voxel of an image belongs to.

A mask is PNG, TIFF or BMP (values, or indices of a palette), NIfTI, a DICOM segmentation, or a DICOM series of values.
It is never resampled: it must lie on the image's own grid. 0 is the background and k the k-th class of the job, unless
the site's [label_map] says otherwise: it maps values ("2" = "liver") and names of DICOM segments ("Leber" = "liver"),
and "" as the class is background.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.errors import SiteRefusal
from shared.imaging.errors import MAX_PIXELS, UnreadableImage, require_bytes, silence
from shared.imaging.grid import Array, Stack, canonical, same_place
from shared.imaging.nifti import is_nifti_name, read_flat_nifti, read_nifti, write_nifti
from shared.imaging.segments import read_segments, segment_labels, write_segmentation
from shared.imaging.series import Name, named, read_series
from shared.imaging.volumes import Volume

__all__ = ["read_mask", "write_nifti", "write_segmentation"]

Mask = npt.NDArray[np.int32]
_BACKGROUND = ("", "background")
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def read_mask(
    path: Name,
    shape: tuple[int, ...],
    classes: Sequence[str],
    label_map: Mapping[str, str],
    instances: bool = False,
    like: Volume | None = None,
    image: Path | None = None,
) -> Mask:
    """Read the mask of one image.

    Args:
        path: the mask's file, or a folder with a DICOM series or a single file.
        shape: (h, w) of the picture or (d, h, w) of the volume as decoded, before anything is resampled.
        classes: of the job, without the background.
        label_map: of the site.
        instances: the values number objects (of one class) instead of classes; each DICOM segment is one object.
        like: the volume; it must be given for DICOM segmentations of volumes, and NIfTI masks are checked against it.
        image: the picture's file, by which its part of a DICOM segmentation of many pictures is found.

    Returns:
        int32 of exactly ``shape``: 0 background, k for ``classes[k - 1]``; or objects numbered 1, 2, … without a gap.
        With a single class, a mask of 0 and the largest value of 8 or 16 bits (255, 65535) means class 1 by it.

    Raises:
        UnreadableImage: "mask-size", "mask-position", "not-a-mask", "unknown-class" for a value or segment, or what is
            wrong with the file; the detail names the file, what was found and what is allowed.
        SiteRefusal: "unknown-label" for a name under [label_map] that is no class of the job.
    """
    path = named(Path(path), _only_file)
    segments = named(path, segment_labels) if named(path, _is_dicom) else None
    if segments is not None:
        if len(shape) == 3 and like is None:
            raise ValueError("a DICOM segmentation of a volume is read with the volume: like = …")
        numbers = {number: number for number in segments} if instances else {
            number: _class_of(label, f"{path}: segment {label!r}", classes, label_map)
            for number, label in segments.items()
        }  # fmt: skip
        mask: Mask = named(path, lambda file: read_segments(file, shape, numbers, like, image))
        return _numbered(mask) if instances else mask
    values = named(path, lambda file: _values(file, shape, like))
    return _numbered(values) if instances else _as_classes(values, path, classes, label_map)


def _only_file(path: Path) -> Path:
    """The one file of a folder that holds one, else the path itself."""
    files = [file for file in path.iterdir() if not file.name.startswith(".")] if path.is_dir() else []
    return files[0] if len(files) == 1 else path


def _is_dicom(path: Path) -> bool:
    if path.is_dir():
        return False
    require_bytes(path)
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def _values(path: Path, shape: tuple[int, ...], like: Volume | None) -> Array:
    """The whole numbers a mask file holds, of exactly ``shape``."""
    if len(shape) == 3:
        values = _volume(path, like)
    else:
        values = read_flat_nifti(path) if is_nifti_name(path) else _raster(path)
    if values.shape != shape:
        raise UnreadableImage("mask-size", f"{path}: a mask of {_times(values.shape)}, its image has {_times(shape)}")
    if values.dtype.kind == "f":
        whole = np.rint(values)
        if not np.isfinite(values).all() or np.abs(values - whole).max(initial=0) > 1e-3:
            raise UnreadableImage("not-a-mask", f"{path}: values between whole numbers; save it without interpolation")
        values = whole.astype(np.int64)
    return values


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _volume(path: Path, like: Volume | None) -> Array:
    if is_nifti_name(path):
        stack: Stack = canonical(read_nifti(path))
    elif path.is_dir() or _is_dicom(path):
        stack = canonical(read_series(path))
    else:
        raise UnreadableImage(
            "unsupported-format", f"{path}: the mask of a volume is NIfTI or DICOM, which have places"
        )
    if like is not None and like.spacing is not None and stack.affine is not None:
        if stack.values.shape != like.values.shape:
            return stack.values  # the caller says so
        if not same_place(like.affine, stack.affine, like.values.shape):
            own, other = (np.round(affine, 2).tolist() for affine in (stack.affine, like.affine))
            raise UnreadableImage("mask-position", f"{path}: its affine is {own}, its image's is {other}")
    return stack.values


def _as_classes(values: Array, path: Path, classes: Sequence[str], label_map: Mapping[str, str]) -> Mask:
    """Values as class numbers, through the site's label map."""
    found = [int(value) for value in np.unique(values)]
    lit = [value for value in found if value]
    table = {}
    for value in lit:
        if str(value) in label_map:
            table[value] = _class_of(str(value), f"{path}: value {value}", classes, label_map)
        elif 0 < value <= len(classes):
            table[value] = value
        elif len(classes) == 1 and lit in ([255], [65535]):
            table[value] = 1
        else:
            allowed = ", ".join(f"{number} {name}" for number, name in enumerate(classes, start=1))
            raise UnreadableImage(
                "unknown-class",
                f"{path}: value {value}; allowed are 0 (background), {allowed}; map others under [label_map] in "
                f'site.toml, to "" if they are background',
            )
    mask = np.zeros(values.shape, np.int32)
    for value, number in table.items():
        mask[values == value] = number
    return mask


def _class_of(label: str, where: str, classes: Sequence[str], label_map: Mapping[str, str]) -> int:
    """The number of a class, from 1, by what the site calls it; 0 where it is background."""
    name = label_map.get(label, label)
    if name in classes:
        return classes.index(name) + 1
    if name in _BACKGROUND:
        return 0
    allowed = f"a class of the job ({', '.join(classes)})"
    if label in label_map:  # a word of site.toml, so every mask would say the same
        raise SiteRefusal(
            "unknown-label", f"{where}: [label_map] in site.toml makes it {name!r}, which is not {allowed}"
        )
    raise UnreadableImage(
        "unknown-class",
        f'{where} is not {allowed}; map it under [label_map] in site.toml, to "" if it is to be left out',
    )


def _numbered(values: Array) -> Mask:
    """Objects numbered 1, 2, … in the order of their values; 0 stays."""
    found, places = np.unique(values, return_inverse=True)
    numbers = np.cumsum(found != 0).astype(np.int32)
    numbers[found == 0] = 0
    mask: Mask = numbers[places].reshape(values.shape)
    return mask


# --- PNG, TIFF, BMP ---------------------------------------------------------------------------------------------------


def _raster(path: Path) -> Array:
    """Values of a picture file as stored: grey levels, or indices of the palette, (h, w)."""
    require_bytes(path)
    with path.open("rb") as file:
        values = _tiff(path) if file.read(4) in _TIFF else None
    if values is None:
        values = _pillow(path)
    if values.ndim == 3 and values.shape[2] in (2, 4):
        values = values[..., :-1]  # how transparent a pixel is
    if values.ndim == 3 and (values == values[..., :1]).all():
        values = values[..., 0]
    if values.ndim != 2:
        raise UnreadableImage("not-a-mask", f"{path}: a colour picture; the value of a mask is its class or object")
    return values.astype(np.uint8) if values.dtype == bool else values


def _pillow(path: Path) -> Array:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with path.open("rb") as file, Image.open(file, formats=("PNG", "TIFF", "BMP", "JPEG")) as image:
            if image.format == "JPEG":
                raise UnreadableImage("not-a-mask", f"{path}: JPEG changes values; save masks as PNG")
            if image.width * image.height > MAX_PIXELS:
                raise UnreadableImage("too-large", f"{path}: {image.size}")
            values: Array = np.asarray(ImageOps.exif_transpose(image)) // _png_scale(path, image)
            return values
    except Image.DecompressionBombError as error:
        raise UnreadableImage("too-large", f"{path}: {error}") from None
    except UnidentifiedImageError:
        raise UnreadableImage("unsupported-format", f"{path}: masks are PNG, TIFF, BMP, NIfTI or DICOM SEG") from None


def _png_scale(path: Path, image: Any) -> int:
    """What Pillow multiplies the values of a grey PNG by: it stretches 2 and 4 bits to 8."""
    if image.format != "PNG":
        return 1
    with path.open("rb") as file:
        bits, colour = file.read(26)[24:]  # of IHDR, always the first chunk
    if bits == 16 and colour in (2, 6):
        raise UnreadableImage("not-a-mask", f"{path}: a colour picture of 16 bits")
    return {2: 85, 4: 17}.get(bits, 1) if colour == 0 else 1


def _tiff(path: Path) -> Array | None:
    """The page of a TIFF, of any number type; None where tifffile lacks the decoder, which Pillow may have."""
    import tifffile

    silence("tifffile")
    with tifffile.TiffFile(path) as file:
        if len(file.pages) > 1:
            raise UnreadableImage("not-a-mask", f"{path}: {len(file.pages)} pages; a mask has one")
        page: Any = file.pages[0]
        if math.prod(page.shape) > MAX_PIXELS:
            raise UnreadableImage("too-large", f"{path}: {page.shape}")
        try:
            values: Array = page.asarray()
        except (ValueError, ImportError) as error:
            if "imagecodecs" in str(error):
                return None
            raise
        return np.moveaxis(values, 0, -1) if page.axes.startswith("S") else values

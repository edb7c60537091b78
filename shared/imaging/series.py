"""A DICOM series, one file per slice or one multi-frame file, as a stack of slices sorted by where they lie.

Slices are sorted by their position along the normal of the image plane (PS3.3 C.7.6.2.1.1), never by file name or
InstanceNumber. A gantry's tilt is kept: the affine then is a shear.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np

from shared.imaging.display import functional_group, quantities
from shared.imaging.errors import UnreadableImage, only_unreadable, require_bytes, silence
from shared.imaging.grid import LPS_TO_RAS, Affine, Array, Stack
from shared.imaging.read import is_image_name
from shared.imaging.stored import Opened, decode, open_dicom

Name = str | os.PathLike[str]
R = TypeVar("R")

#: Most voxels read at once (4 GB): damaged headers must not claim all memory.
MAX_VOXELS: Final = 2**30
#: Files that may lie beside the slices and are none: what is drawn on them, reports, plans, the directory.
_NOT_SLICES: Final = ("1.2.840.10008.1.3.10", "1.2.840.10008.5.1.4.1.1.66", "1.2.840.10008.5.1.4.1.1.88")
_UNEVEN = 0.2  # share of the distance between slices by which it may vary: written positions are rounded
_TILT = 0.01  # largest difference of two direction cosines that still are the same


class Plane(NamedTuple):
    """One slice, before its pixels are decoded. Positions are DICOM's: mm, LPS+."""

    path: Path
    frame: int
    series: str
    uid: str
    reference: str
    shape: tuple[int, int]
    position: Array | None  # (3,) of the centre of the first pixel
    across: Array  # (3,) direction in which the column index grows, times the distance of columns
    down: Array  # (3,) direction in which the row index grows, times the distance of rows


def read_series(path: Name) -> Stack:
    """A folder with one DICOM series, or a multi-frame file: values in measured units (CT: HU), float32.

    Without positions (an old multi-frame file) frames stand in the file's order and the affine is None.

    Raises:
        UnreadableImage: a slice cannot be read, and "not-a-volume", "mixed-series", "missing-slice",
            "duplicate-slice", "uneven-slices", "too-large"; the detail names the file.
    """
    planes = sorted_planes(path)
    height, width = planes[0].shape
    if len(planes) * height * width > MAX_VOXELS:
        raise UnreadableImage("too-large", f"{path}: {len(planes)} slices of {height} x {width}")
    values = np.empty((len(planes), height, width), np.float32)
    valid = np.empty(values.shape, bool)
    place = 0
    for file, group in itertools.groupby(planes, lambda plane: plane.path):
        frames = [plane.frame for plane in group]
        for picture, padded in named(file, partial(_decode, frames=frames)):
            values[place], valid[place] = picture, ~padded
            place += 1
    return Stack(values, affine_of(planes), None if valid.all() else valid, planes[0].reference)


def sorted_planes(path: Name | Sequence[Path]) -> list[Plane]:
    """The slices of a folder, a multi-frame file or some files, in the order of their places; checked, none decoded.

    Raises:
        UnreadableImage: see read_series.
    """
    if isinstance(path, str | os.PathLike):
        path = Path(path)
        files = slice_files(path) if path.is_dir() else [path]
    else:
        files, path = list(path), Path(os.path.commonpath(path))
    planes = [plane for file in files for plane in named(file, _planes)]
    if len(planes) < 2:
        deeper = path.is_dir() and any(item.is_dir() and not item.name.startswith(".") for item in path.iterdir())
        hint = "; folders within it are not looked into, name the one of the series" if deeper else ""
        raise UnreadableImage("not-a-volume", f"{path}: {len(planes)} slices; a volume needs two at least{hint}")
    series = {plane.series: plane.path for plane in planes}
    if len(series) > 1:
        names = " and ".join(file.name for file in list(series.values())[:2])
        raise UnreadableImage(
            "mixed-series", f"{path}: slices of {len(series)} series ({names}, for example); give each series a folder"
        )
    placeless = [plane for plane in planes if plane.position is None]
    if placeless and (len(files) > 1 or len(placeless) < len(planes)):
        raise UnreadableImage("not-a-volume", f"{placeless[0].path}: does not say where it lies (no position)")
    for plane in planes[1:]:
        _check_alike(planes[0], plane)
    return planes if placeless else _stacked(planes)


def affine_of(planes: Sequence[Plane]) -> Affine | None:
    """From index (slice, row, column) to mm, RAS+; None where positions are unknown."""
    first, last = planes[0].position, planes[-1].position
    if first is None or last is None:
        return None
    affine = np.eye(4)
    affine[:3] = np.stack([(last - first) / (len(planes) - 1), planes[0].down, planes[0].across, first], axis=1)
    return LPS_TO_RAS @ affine


def slice_files(folder: Path) -> list[Path]:
    """The DICOM files of a folder that may hold slices, by name.

    Hidden files, files of other kinds, segmentations and reports are passed over; an empty file is not, for it was one
    of the slices.
    """
    files = sorted(file for file in Path(folder).iterdir() if file.is_file() and not file.name.startswith("."))
    return [file for file in files if file.stat().st_size == 0 or (is_image_name(file) and _is_dicom(file))]


@only_unreadable
def has_place(file: Path) -> bool:
    """Whether the slices of a DICOM file say where they lie."""
    return all(plane.position is not None for plane in _planes(file))


def _is_dicom(file: Path) -> bool:
    """Whether the file may be a slice: a .dcm without the DICM mark is one, a broken one."""
    from pydicom.filereader import read_file_meta_info

    with file.open("rb") as stream:
        marked = stream.read(132)[128:] == b"DICM"
    if not marked:
        return file.suffix.lower() in (".dcm", ".dicom")
    silence("pydicom")
    try:
        kind = str(read_file_meta_info(file).get("MediaStorageSOPClassUID", ""))
    except Exception:  # broken, so a slice that reading will complain of
        return True
    return not kind.startswith(_NOT_SLICES)


def named(file: Path, reader: Callable[[Path], R]) -> R:
    """What ``reader`` reads of the file; whatever is wrong is an UnreadableImage whose detail names the file."""
    try:
        return only_unreadable(reader)(file)
    except UnreadableImage as error:
        if str(file) in error.detail:
            raise
        problem = UnreadableImage(error.code, f"{file}: {error.detail}" if error.detail else str(file))
    raise problem


def _planes(file: Path) -> list[Plane]:
    require_bytes(file)
    with file.open("rb") as stream:
        opened = open_dicom(stream)
        if opened.options["samples_per_pixel"] != 1 or opened.options["photometric_interpretation"] == "PALETTE COLOR":
            raise UnreadableImage("not-a-volume", "a colour picture")
        return [plane_of(file, opened, index) for index in range(opened.frames)]


def plane_of(file: Path, opened: Opened, index: int) -> Plane:
    """Where one frame of an opened file lies; ValueError where the header contradicts itself."""
    header = opened.header
    position = _numbers(functional_group(opened, index, "PlanePositionSequence"), "ImagePositionPatient", 3)
    turn = _numbers(functional_group(opened, index, "PlaneOrientationSequence"), "ImageOrientationPatient", 6)
    step = _numbers(functional_group(opened, index, "PixelMeasuresSequence"), "PixelSpacing", 2)
    shape = int(opened.options["rows"]), int(opened.options["columns"])
    if position is None or turn is None or step is None:
        position, turn, step = None, np.array([1.0, 0, 0, 0, 1, 0]), np.ones(2)
    elif "PerFrameFunctionalGroupsSequence" not in header and opened.frames > 1:
        offsets = _numbers(header, "GridFrameOffsetVector", opened.frames)  # a dose, PS3.3 C.8.8.3.2
        normal = np.cross(turn[:3], turn[3:])
        position = None if offsets is None else position + (offsets[index] - offsets[0]) * normal
    # PixelSpacing is first the distance of rows, then that of columns (PS3.3 10.7.1.3)
    return Plane(
        file,
        index,
        str(header.get("SeriesInstanceUID", "")),
        str(header.get("SOPInstanceUID", "")),
        str(header.get("FrameOfReferenceUID", "")),
        shape,
        position,
        turn[:3] * step[1],
        turn[3:] * step[0],
    )


def _numbers(item: Any, keyword: str, count: int) -> Array | None:
    """Numbers of a header element, None where it is absent; ValueError where they are not ``count`` finite ones."""
    value = item.get(keyword)
    if value is None or (hasattr(value, "__len__") and len(value) == 0):
        return None
    numbers = np.atleast_1d(np.asarray(value, np.float64))
    if numbers.shape != (count,) or not np.isfinite(numbers).all():
        raise ValueError(f"{keyword} is not {count} numbers")
    return numbers


def _check_alike(first: Plane, other: Plane) -> None:
    """Raise "uneven-slices" where two slices cannot lie in one stack."""
    if first.shape != other.shape:
        problem = f"{other.shape} pixels, others {first.shape}"
    else:
        steps = [(np.linalg.norm(one), np.linalg.norm(two)) for one, two in _axes(first, other)]
        turns = [np.abs(one / a - two / b).max() for (one, two), (a, b) in zip(_axes(first, other), steps, strict=True)]
        if max(turns) > _TILT:
            problem = "turned otherwise than the others"
        elif any(abs(a - b) > 0.01 * a for a, b in steps):
            problem = f"pixels of {steps[1][1]:g} x {steps[0][1]:g} mm, others {steps[1][0]:g} x {steps[0][0]:g}"
        else:
            return
    raise UnreadableImage("uneven-slices", f"{other.path}: {problem}")


def _axes(first: Plane, other: Plane) -> Iterable[tuple[Array, Array]]:
    return (first.across, other.across), (first.down, other.down)


def _stacked(planes: list[Plane]) -> list[Plane]:
    """The planes sorted along their normal; "duplicate-slice", "missing-slice" or "uneven-slices" if no even stack."""
    normal = np.cross(planes[0].across, planes[0].down)
    normal = normal / np.linalg.norm(normal)
    places = {id(plane): float(normal @ plane.position) for plane in planes}
    planes = sorted(planes, key=lambda plane: places[id(plane)])
    gaps = np.diff([places[id(plane)] for plane in planes])
    usual = float(np.median(gaps))
    for gap, (below, above) in zip(gaps, itertools.pairwise(planes), strict=True):
        between = f"{_label(below)} and {_label(above)}"
        if gap < 1e-3:
            raise UnreadableImage("duplicate-slice", f"{between} lie at the same place")
        if abs(gap - usual) > _UNEVEN * usual:
            raise UnreadableImage("missing-slice", f"{gap:g} mm between {between}, elsewhere {usual:g} mm")
    step = (planes[-1].position - planes[0].position) / (len(planes) - 1)  # type: ignore[operator]
    for number, plane in enumerate(planes):
        aside = plane.position - planes[0].position - number * step  # type: ignore[operator]
        if np.linalg.norm(aside - normal * (normal @ aside)) > _UNEVEN * usual:
            raise UnreadableImage("uneven-slices", f"{_label(plane)}: lies aside of the others")
    return planes


def _label(plane: Plane) -> str:
    return f"{plane.path}" + (f" frame {plane.frame}" if plane.frame else "")


def _decode(file: Path, frames: Sequence[int]) -> list[tuple[Array, Array]]:
    """Values (h, w) float32 in measured units, and a mask of the padding, of the asked frames."""
    found = []
    with file.open("rb") as stream:
        opened = open_dicom(stream)
        for index in frames:
            stored, _ = decode(opened, index)
            values, padded = quantities(stored, opened, index)
            found.append((values.astype(np.float32), padded))
    return found

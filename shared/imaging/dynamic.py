"""DICOM films: the frames of a multi-frame file, or of a folder of files, in order.

Frames at different places are a stack of slices, sorted by position (see shared.imaging.series). Frames at one place
are sorted by the first of these that every frame has and no two share: temporal position, acquisition date and time,
trigger time, instance number; a single file that has none of them keeps its own order.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shared.imaging.display import display, functional_group, quantities
from shared.imaging.errors import UnreadableImage, require_bytes
from shared.imaging.grid import Array
from shared.imaging.series import Plane, named, plane_of, sorted_planes
from shared.imaging.stored import Opened, decode, open_dicom

Ends = tuple[float, float]
_AT_ONCE = 32  # frames of a file held in memory at full size


class Frame(NamedTuple):
    """One frame before its grey values are settled.

    ``values`` is a picture in [0, 1], or where ``measured`` in a unit of its own; ``padded`` marks what is no image;
    ``inverted`` where the least value is white. ``name`` says to a person which frame it is.
    """

    name: str
    values: Array
    measured: bool = False
    padded: Array | None = None
    inverted: bool = False


class Film(NamedTuple):
    """``length`` frames, of which ``read`` decodes some, in order; ``ends`` of the window they share, if any."""

    length: int
    read: Callable[[Sequence[int]], Iterator[Frame]]
    ends: Ends | None = None


class _Place(NamedTuple):
    """A DICOM frame before decoding: where it lies, when it was taken by each clock, the window it names."""

    plane: Plane
    times: tuple[float | str | None, ...]
    order: tuple[float, int] | None  # instance number and frame
    window: tuple[object, ...] | None


def dicom_film(files: Sequence[Path], window: Ends | None = None) -> Film:
    """The frames of one file, or of the files of one folder; ``window`` goes before those they name.

    Raises:
        UnreadableImage: "mixed-series", "no-order", those of a stack of slices (see read_series), or what is wrong with
            a file.
    """
    places = [place for file in files for place in named(file, _places)]
    series = {place.plane.series: place.plane.path for place in places}
    if len(series) > 1:
        names = " and ".join(file.name for file in list(series.values())[:2])
        raise UnreadableImage(
            "mixed-series", f"{files[0].parent}: {len(series)} series ({names}, for example); give each a folder"
        )
    ordered = _ordered(places, files)
    windows = {place.window for place in places}
    shown = window is None and len(windows) == 1 and windows != {None}
    return Film(len(ordered), functools.partial(_frames, ordered, shown), None if shown else window or _span(windows))


def _places(file: Path) -> list[_Place]:
    require_bytes(file)
    with file.open("rb") as stream:
        opened = open_dicom(stream)
        return [_place(file, opened, index) for index in range(opened.frames)]


def _place(file: Path, opened: Opened, index: int) -> _Place:
    header, content = opened.header, functional_group(opened, index, "FrameContentSequence")
    taken = content.get("FrameAcquisitionDateTime") or header.get("AcquisitionDateTime")
    if not taken and header.get("AcquisitionTime"):
        taken = f"{header.get('AcquisitionDate') or ''}{header.AcquisitionTime}"
    position = content.get("TemporalPositionIndex") or header.get("TemporalPositionIdentifier")
    numbers = [None if value in (None, "") else float(value) for value in (position, header.get("TriggerTime"))]
    instance = header.get("InstanceNumber")
    return _Place(
        plane_of(file, opened, index),
        (numbers[0], str(taken).replace(":", "") if taken else None, numbers[1]),
        None if instance in (None, "") else (float(instance), index),
        _window(file, functional_group(opened, index, "FrameVOILUTSequence")),
    )


def _window(file: Path, group: Any) -> tuple[object, ...] | None:
    """What tells one window from another: its ends and function, or the file of a look-up table."""
    if group.get("VOILUTSequence"):
        return (file,)
    try:
        centre, width = (float(np.atleast_1d(group.get(f"Window{name}"))[0]) for name in ("Center", "Width"))
    except (TypeError, ValueError, IndexError):
        return None
    usable = math.isfinite(centre) and math.isfinite(width) and width > 0
    return (centre - width / 2, centre + width / 2, str(group.get("VOILUTFunction") or "LINEAR")) if usable else None


def _span(windows: set[tuple[object, ...] | None]) -> Ends | None:
    """The ends of what all windows together span; None where one frame has no plain window."""
    plain = [window[:2] for window in windows if window is not None and len(window) == 3]
    if len(plain) < len(windows):
        return None
    return min(low for low, _ in plain), max(high for _, high in plain)  # type: ignore[type-var, return-value]


def _ordered(places: Sequence[_Place], files: Sequence[Path]) -> list[Plane]:
    """Planes in the order of time, or of place; see the module."""
    planes = [place.plane for place in places]
    if len(planes) > 1 and all(plane.position is not None for plane in planes):
        normal = np.cross(planes[0].across, planes[0].down)
        normal = normal / np.linalg.norm(normal)
        levels = {round(float(normal @ plane.position), 2) for plane in planes}
        if len(levels) == len(planes):
            return sorted_planes(files)
        if len(levels) > 1:
            raise UnreadableImage(
                "mixed-series",
                f"{files[0].parent}: {len(planes)} frames at {len(levels)} places; give each place a folder",
            )
    for keys in [*zip(*(place.times for place in places), strict=True), [place.order for place in places]]:
        if None not in keys and len(set(keys)) == len(keys):
            return [plane for _, plane in sorted(zip(keys, planes, strict=True), key=lambda pair: pair[0])]
    if len(files) > 1:
        raise UnreadableImage("no-order", f"{files[0].parent}: no time or instance number tells the frames apart")
    return planes


def _frames(planes: Sequence[Plane], shown: bool, picked: Sequence[int]) -> Iterator[Frame]:
    """Decoded frames, some of one file at a time; pictures if ``shown`` by their window."""
    for file, group in itertools.groupby((planes[k] for k in picked), lambda plane: plane.path):
        frames = [plane.frame for plane in group]
        for start in range(0, len(frames), _AT_ONCE):
            yield from named(file, functools.partial(_decode, shown=shown, frames=frames[start : start + _AT_ONCE]))


def _decode(file: Path, shown: bool, frames: Sequence[int]) -> list[Frame]:
    found = []
    with file.open("rb") as stream:
        opened = open_dicom(stream)
        for index in frames:
            stored, photometric = decode(opened, index)
            name = f"{file} frame {index}"
            if shown or stored.ndim == 3 or photometric == "PALETTE COLOR" or opened.options["bits_stored"] == 1:
                found.append(Frame(name, display(stored, photometric, opened, index)))
                continue
            values, padded = quantities(stored, opened, index)
            inverted = photometric == "MONOCHROME1" or opened.header.get("PresentationLUTShape") == "INVERSE"
            found.append(Frame(name, values, True, padded, inverted))
    return found

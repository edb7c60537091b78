"""Films: a multi-frame DICOM file, a folder of DICOM files or of pictures, a TIFF of many pages, a video, an array.

One rule of grey values holds for all frames of a film, so that a frame that is brighter than another stays so. Pictures
of 8 bits are divided by 255 and arrays of floats within [0, 1] stay; all else runs from the least to the greatest
value of the whole film. DICOM frames that share one window are shown with it; if their windows differ, the one that
spans them all serves.

Frames of a folder of pictures are sorted by name, "frame2" before "frame10"; for DICOM see shared.imaging.dynamic.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from shared.imaging import video
from shared.imaging.display import Picture
from shared.imaging.dynamic import Ends, Film, Frame, dicom_film
from shared.imaging.errors import MAX_PIXELS, UnreadableImage, only_unreadable, require_bytes, silence
from shared.imaging.grid import Array
from shared.imaging.read import frame_count, is_image_name, read_image
from shared.imaging.series import named, slice_files

T = TypeVar("T")


@only_unreadable
def read_film(
    path: str | os.PathLike[str],
    each: Callable[[Picture], T],
    most: int = 0,
    window: Ends | None = None,
    key: str = "",
    row: int | None = None,
) -> list[T]:
    """What ``each`` makes of every frame, a picture float32 (H, W) or (H, W, 3) in [0, 1], in order of time.

    Args:
        path: a file or folder; see the module.
        most: at most so many frames, evenly picked; 0 takes all.
        window: values shown black and white, instead of the rules of the module (pictures of 8 bits stay as they are).
        key: array of an .npz file; "" for its only one.
        row: the film's place along the first axis of an array of films (n, t, h, w) or (n, t, h, w, c).

    Raises:
        UnreadableImage: "no-frames", "uneven-frames", "no-order", "mixed-series" and what reading a frame or a series
            raises; the detail names the file.
    """
    film = _open(Path(path), key, row, window)
    if not film.length:
        raise UnreadableImage("no-frames", str(path))
    picked = pick(film.length, most)
    ends = window or film.ends
    found: list[T] = []
    first: Frame | None = None
    for frame in film.read(picked):
        if first is None:
            first = frame
            if frame.measured and ends is None:
                ends = _ends(film.read(picked))
        if frame.values.shape != first.values.shape or frame.measured != first.measured:
            raise UnreadableImage(
                "uneven-frames", f"{frame.name}: {frame.values.shape}, others {first.values.shape} ({first.name})"
            )
        found.append(each(_picture(frame, ends)))
    return found


def pick(count: int, most: int) -> list[int]:
    """At most ``most`` of ``count`` numbers, evenly spread, the middle one if one; all for 0."""
    if not 0 < most < count:
        return list(range(count))
    return [(2 * number + 1) * count // (2 * most) for number in range(most)]


@only_unreadable
def is_film(path: Path) -> bool:
    """Whether a file is a film by itself: a video, more than one frame or page, or an array."""
    if video.is_video(path) or path.suffix.lower() in (".npy", ".npz"):
        return True
    return is_image_name(path) and frame_count(path) > 1


def _open(path: Path, key: str, row: int | None, window: Ends | None) -> Film:
    if path.is_dir():
        files = slice_files(path)
        if files:
            return dicom_film(files, window)
        names = sorted((file for file in path.iterdir() if is_image_name(file)), key=_natural)
        pictures = [file for file in names if not file.name.startswith(".")]
        return Film(len(pictures), lambda picked: (named(pictures[k], _raster) for k in picked))
    require_bytes(path)
    with path.open("rb") as file:
        head = file.read(132)
    if head[128:] == b"DICM":
        return dicom_film([path], window)
    if head.startswith((b"PK\x03\x04", b"\x93NUMPY")):
        return _array(path, key, row)
    if video.is_video(path):
        return Film(video.frame_count(path), functools.partial(_video, path))
    return Film(frame_count(path), lambda picked: (_raster(path, page) for page in picked))


def _natural(path: Path) -> list[tuple[int, int | str]]:
    """Sorts numbers within names by their value."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", path.name)]


# --- grey values ------------------------------------------------------------------------------------------------------


def _ends(frames: Iterable[Frame]) -> Ends:
    """The least and the greatest value of a film without its padding; (0, 1) for floats within."""
    low, high, floats = math.inf, -math.inf, True
    for frame in frames:
        kept = frame.values if frame.padded is None else frame.values[~frame.padded]
        kept = kept[np.isfinite(kept)]
        floats &= frame.padded is None and kept.dtype.kind == "f"
        if kept.size:
            low, high = min(low, float(kept.min())), max(high, float(kept.max()))
    return (0.0, 1.0) if floats and low >= 0 and high <= 1 else (low, high)


def _picture(frame: Frame, ends: Ends | None) -> Picture:
    if not frame.measured or ends is None:
        return frame.values.astype(np.float32)
    low, high = ends
    values = np.nan_to_num(frame.values.astype(np.float64), nan=low) - low
    result = np.clip(values / (high - low), 0, 1) if high > low else np.zeros(values.shape)
    if frame.inverted:
        result = 1 - result
    if frame.padded is not None:
        result[frame.padded] = 0
    picture: Picture = result.astype(np.float32)
    return picture


# --- kinds of files other than DICOM ----------------------------------------------------------------------------------


def _raster(path: Path, page: int = 0) -> Frame:
    """A frame of a PNG, JPEG, BMP or TIFF: its own values where they have more than 8 bits and the file not DICOM."""
    from PIL import Image

    name = f"{path}" + (f" page {page}" if page else "")
    with path.open("rb") as file:
        head = file.read(4)
    if head[:2] in (b"II", b"MM"):
        deep = _deep_page(path, page)
        if deep is not None:
            return Frame(name, deep[0], True, inverted=deep[1])
    elif head == b"\x89PNG":
        with Image.open(path) as image:
            if image.mode.startswith("I"):
                if image.width * image.height > MAX_PIXELS:
                    raise UnreadableImage("too-large", name)
                return Frame(name, np.asarray(image), True)
    return Frame(name, read_image(path, page))


def _deep_page(path: Path, page: int) -> tuple[Array, bool] | None:
    """Values of a TIFF page of more than 8 bits, and whether its least is white."""
    import tifffile

    silence("tifffile")
    with tifffile.TiffFile(path) as file:
        found: Any = file.pages[page]
        if np.max(found.bitspersample) <= 8:
            return None
        if math.prod(found.shape) > MAX_PIXELS:
            raise UnreadableImage("too-large", f"{found.shape}")
        values = found.asarray()
        return np.moveaxis(values, 0, -1) if found.axes.startswith("S") else values, int(found.photometric) == 0


def _video(path: Path, picked: Sequence[int]) -> Iterator[Frame]:
    wanted = set(picked)
    for number, picture in enumerate(itertools.islice(video.frames(path), max(picked) + 1)):
        if number in wanted:
            yield Frame(f"{path} frame {number}", picture)


def _array(path: Path, key: str, row: int | None) -> Film:
    films = load_array(path, key)
    if row is not None and not -1 < row < len(films):
        raise UnreadableImage("frame-out-of-range", f"{path}: row {row} of {len(films)}")
    values = films if row is None else films[row]
    if values.ndim == 4 and values.shape[1] in (1, 3) and values.shape[3] not in (1, 3):
        values = np.moveaxis(values, 1, 3)
    if values.ndim == 4 and values.shape[3] == 1:
        values = values[..., 0]
    if values.ndim not in (3, 4) or values.shape[3:] not in ((), (3,)) or 0 in values.shape[1:]:
        raise UnreadableImage(
            "no-pixels", f"{path}: an array of shape {values.shape} is no film (t, h, w) or (t, h, w, 3)"
        )
    if values.dtype.kind not in "buif":
        raise UnreadableImage("unsupported-format", f"{path}: numbers of type {values.dtype}")
    small = values.dtype in (np.uint8, bool)
    scale = np.float32(255 if values.dtype == np.uint8 else 1)
    return Film(
        len(values),
        lambda picked: (
            Frame(f"{path} frame {k}", values[k].astype(np.float32) / scale if small else values[k], not small)
            for k in picked
        ),
    )


def load_array(path: Path, key: str = "") -> Array:
    """An array of a NumPy file; of an archive the named one, or the only one."""
    status = os.stat(path)
    return _load(os.path.abspath(path), status.st_mtime_ns, status.st_size, key)


@functools.lru_cache(maxsize=2)  # the cases of one archive come one after the other
def _load(path: str, _changed: int, _size: int, key: str) -> Array:
    try:
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            if not key and len(loaded.files) != 1:
                raise UnreadableImage("no-such-array", f"{path}: name one of {loaded.files} as key")
            if key and key not in loaded.files:
                raise UnreadableImage("no-such-array", f"{path}: {key!r} not among {loaded.files}")
            return np.asanyarray(loaded[key or loaded.files[0]])
    except MemoryError as error:  # a damaged header may name any size
        raise UnreadableImage("too-large", f"{path}: {error}") from None

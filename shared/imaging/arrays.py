"""Files of NumPy arrays, .npz and .npy, as stacks of pictures."""

from __future__ import annotations

import functools
import os
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.imaging.errors import UnreadableImage

Array = npt.NDArray[Any]


def pictures(path: str | os.PathLike[str], kind: str, key: str | None) -> Array:
    """The pictures of an array file along the first axis: (N, H, W) or (N, H, W, channels)."""
    stat = os.stat(path)
    array = _load(os.path.abspath(path), stat.st_mtime_ns, stat.st_size, kind, key)
    if array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4)):
        return array[None]  # a single picture
    if array.ndim == 4 and array.shape[1] in (1, 3) and array.shape[3] not in (1, 3, 4):
        return np.moveaxis(array, 1, 3)
    return array


@functools.lru_cache(maxsize=4)  # a data set reads one file thousands of times; few, because they stay in memory
def _load(path: str, _changed: int, _size: int, kind: str, key: str | None) -> Array:
    try:
        if kind == "npy":
            return np.asanyarray(np.load(path, mmap_mode="r", allow_pickle=False))
        with np.load(path, allow_pickle=False) as archive:
            return np.asanyarray(archive[_array_name(path, archive, key)])
    except MemoryError as error:  # a damaged header may name any size
        raise UnreadableImage("too-large", str(error)) from None


def _array_name(path: str, archive: Any, key: str | None) -> str:
    names: list[str] = list(archive.files)
    if key is not None or "images" in names:
        wanted = "images" if key is None else key
        if wanted not in names:
            raise UnreadableImage("no-such-array", f"{wanted!r} not among {names}")
        return wanted
    shapes = _shapes(path, names)
    # Labels are (N,) or (N, 1): more axes than these, if any array has them, else both sides longer than 1.
    deep = [name for name in names if len(shapes[name]) in (3, 4)]
    likely = deep or [name for name in names if len(shapes[name]) == 2 and min(shapes[name]) > 1]
    if len(likely) != 1:
        raise UnreadableImage("no-such-array", f"name one of {names}")
    return likely[0]


def _shapes(path: str, names: list[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays of an archive from their headers, without decompressing them."""
    import zipfile

    from numpy.lib import format as npy

    shapes = {}
    with zipfile.ZipFile(path) as archive:
        for name in names:
            with archive.open(name + ".npy") as member:
                version = npy.read_magic(member)
                read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
                shapes[name] = read(member)[0]
    return shapes

"""Films (endoscopy, ultrasound) read frame by frame with FFmpeg's libraries, through PyAV.

Frames are numbered from 0 in the order they are shown. A film is decoded from its start up to the frame asked for and
stays open there, so that frames asked for in rising order cost one pass over the film: sort by frame.
"""

from __future__ import annotations

import functools
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from shared.imaging.dicom import frame_index
from shared.imaging.display import Picture
from shared.imaging.errors import MAX_PIXELS, UnreadableImage, only_unreadable, require_bytes

Name = str | os.PathLike[str]

_SUFFIXES: Final = frozenset(
    {
        ".mp4",
        ".m4v",
        ".mov",
        ".avi",
        ".mkv",
        ".webm",
        ".mpg",
        ".mpeg",
        ".ts",
        ".m2ts",
        ".mts",
        ".wmv",
        ".asf",
        ".ogv",
        ".flv",
    }
)
#: Where in the file which bytes stand, and FFmpeg's name for a file that has them. It is named to FFmpeg, which would
#: otherwise also read lists of other files and addresses.
_MAGIC: Final = (
    (4, b"ftyp", "mov"),
    (4, b"moov", "mov"),
    (4, b"mdat", "mov"),
    (4, b"wide", "mov"),
    (0, b"\x1a\x45\xdf\xa3", "matroska"),
    (8, b"AVI ", "avi"),
    (0, b"\0\0\x01\xba", "mpeg"),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "asf"),
    (0, b"OggS", "ogg"),
    (0, b"FLV\x01", "flv"),
)
_PICTURES: Final = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")  # photographs in the same container
_KEPT_OPEN: Final = 2


def is_video_name(path: Name) -> bool:
    """Whether a walk through a folder should take the file for a film: by its suffix."""
    return Path(path).suffix.lower() in _SUFFIXES


def is_video(path: Name) -> bool:
    """Whether the file is a film, by its first bytes, or by its suffix where these say nothing. Never raises."""
    try:
        with open(path, "rb") as file:
            head = file.read(400)
    except OSError:
        return False
    return bool(container_of(head)) or (is_video_name(path) and head[128:132] != b"DICM")


def container_of(head: bytes) -> str:
    """FFmpeg's name for the kind of file that starts with these (400) bytes; "" for what is no film."""
    if head[4:8] == b"ftyp" and head[8:12] in _PICTURES:
        return ""
    for start, packet in ((0, 188), (4, 192)):  # MPEG transport streams repeat their mark in every packet
        if len(head) > start + packet and head[start] == head[start + packet] == 0x47:
            return "mpegts"
    return next((kind for place, magic, kind in _MAGIC if head[place:].startswith(magic)), "")


@only_unreadable
def frame_count(path: Name) -> int:
    """Number of frames; all of them are decoded, because what a file says of itself is often missing or wrong.

    Raises:
        UnreadableImage: "no-frames" for a film without a picture, "truncated" for one cut off in MP4, MOV or AVI (the
            other kinds do not tell); "corrupt", "empty-file", "too-large", "not-found".
    """
    status = os.stat(path)
    return _count(os.path.abspath(path), status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=256)
def _count(path: str, _changed: int, _size: int) -> int:
    film = _Film(path)
    try:
        while film.advance() is not None:
            pass
        return film.read
    finally:
        film.close()


@only_unreadable
def read_frame(path: Name, frame: int | str) -> Picture:
    """One frame as a picture, float32 (H, W, 3) in [0, 1], turned as the film says.

    Args:
        frame: number from 0, or "middle" (count // 2).

    Raises:
        UnreadableImage: "frame-out-of-range" for a frame that is not there; else as ``frame_count``. Of a film that is
            cut off or damaged somewhere, frames well before that place can be read.
    """
    index = frame_index(frame, frame_count(path) if frame == "middle" else 2**62)
    status = os.stat(path)
    address = (os.path.abspath(path), status.st_mtime_ns, status.st_size)
    with _lock:
        film = _open.pop(address, None)
        if film is not None and film.read > index + 1:  # it lies behind
            film.close()
            film = None
        film = film or _Film(address[0])
        try:
            found = film.seek(index)
            picture = None if found is None else _picture(found)
        except BaseException:
            film.close()
            raise
        _open[address] = film
        while len(_open) > _KEPT_OPEN:
            _open.popitem(last=False)[1].close()
        if picture is None:
            raise UnreadableImage("frame-out-of-range", f"frame {index} of {film.read}")
        return picture


def frames(path: Name) -> Iterator[Picture]:
    """Every frame in order, float32 (H, W, 3) in [0, 1].

    Raises:
        UnreadableImage: as ``frame_count``, when the place in question is reached.
    """
    film = only_unreadable(_Film)(os.path.abspath(path))
    try:
        step: Callable[[], Picture | None] = only_unreadable(film.next_picture)
        while (picture := step()) is not None:
            yield picture
    finally:
        film.close()


class _Film:
    """An open film. ``read`` frames have been decoded, the last of them is ``last``."""

    def __init__(self, path: str) -> None:
        import av

        require_bytes(path)
        with open(path, "rb") as file:
            kind = container_of(file.read(400))
        if not kind:
            raise UnreadableImage("corrupt", f"{path}: not a film, though named as one")
        self.container: Any = av.open(path, format=kind, metadata_errors="ignore")
        self.read = 0
        self.last: Any = None
        if not self.container.streams.video:
            self.container.close()
            raise UnreadableImage("no-frames", path)
        self.stream: Any = self.container.streams.video[0]
        self.stream.thread_type = "AUTO"
        if self.stream.width * self.stream.height > MAX_PIXELS:
            self.container.close()
            raise UnreadableImage("too-large", f"{self.stream.width} x {self.stream.height}")
        self.decoded: Iterator[Any] = self.container.decode(self.stream)

    def advance(self) -> Any:
        """The next frame as decoded, None after the last. A film cut short or without a picture is unreadable."""
        from av.error import FFmpegError

        cut = UnreadableImage("truncated", f"{self.read} frames of {self.stream.frames}")
        try:
            found = next(self.decoded, None)
        except FFmpegError:  # of the frame that the cut goes through
            if self._is_cut():
                raise cut from None
            raise
        if found is not None:
            self.last = found
            self.read += 1
        elif self._is_short():
            raise cut
        elif not self.read:
            raise UnreadableImage("no-frames", self.container.name)
        return found

    def _is_short(self) -> bool:
        """Whether the film, at its end, has less in it than it says: it was cut off while it was copied.

        MP4 and MOV are judged by where their frames lie: they may hold frames that are not to be shown.
        """
        if self.container.format.name == "avi":
            return bool(self.stream.frames > self.read)
        return self._is_cut()

    def _is_cut(self) -> bool:
        """Whether frames of which the film's index knows lie beyond the end of the file."""
        return any(entry.pos + entry.size > self.container.size for entry in self.stream.index_entries)

    def seek(self, index: int) -> Any:
        """Frame ``index``, which must be the last decoded or later; None if there are not so many."""
        while self.read <= index:
            if self.advance() is None:
                return None
        return self.last

    def next_picture(self) -> Picture | None:
        found = self.advance()
        return None if found is None else _picture(found)

    def close(self) -> None:
        self.container.close()


def _picture(frame: Any) -> Picture:
    """A decoded frame as a picture, turned upright by the film's display matrix."""
    values = frame.to_ndarray(format="rgb24").astype(np.float32) / np.float32(255)
    return np.ascontiguousarray(np.rot90(values, frame.rotation // 90))


_lock = threading.Lock()
_open: OrderedDict[tuple[str, int, int], _Film] = OrderedDict()


def _before_fork() -> None:
    """Close the open films: a forked process has none of the threads that decode them, and would wait for these."""
    _lock.acquire()
    while _open:
        _open.popitem()[1].close()


def _forget_lock() -> None:
    """In a forked process the lock is new: whoever held it is not there."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=lambda: _lock.release(), after_in_child=_forget_lock)

"""What a site has: its folder, its samples, and which of them train, validate and test."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

SPLITS = ("train", "val", "test")
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}


@dataclass(frozen=True)
class SiteData:
    """A site's own description of its images (the ``[data]``, ``[label_map]`` and ``[limits]`` of its site.toml)."""

    name: str
    root: Path
    format: str = "auto"
    csv: str = ""
    label_map: Mapping[str, str] = field(default_factory=dict)
    max_unreadable: float = 0.05
    cache: Path | None = None
    cache_gb: float = 100.0  # most that all decoded images in it may take, 10^9 bytes
    scale: tuple[float, float] | None = None  # see shared.imaging.scale; it stays at the site


@dataclass(frozen=True)
class Sample:
    """One case and what is to be learnt from it; all paths are relative to the site's folder.

    ``path`` is its image: a file, or the folder of a DICOM series or of frames. ``target`` holds the indices of the
    classes of the whole image: one index, any number if multi-label, none where the task has none. ``frame`` and
    ``key`` pick a frame of a file and an array of an npz; ``box`` = (x, y, width, height) in pixels of the decoded
    image cuts a part out. ``mask`` is the file or folder of its mask, ``boxes`` are its objects as (class, x, y, width,
    height), ``paths`` all images of a case of several, in the order of the job's modalities with "" where one is
    missing (``path`` is then the first that is there), and ``values`` its numbers, NaN where missing. ``size`` is the
    width and height of the image that its boxes were drawn in, where the annotation says so; ``fault`` the code and the
    detail of what makes the case useless, where the annotation alone tells.
    """

    path: str
    target: tuple[int, ...]
    patient: str
    split: str
    frame: int | str = "middle"
    box: tuple[float, float, float, float] | None = None
    key: str = ""
    mask: str = ""
    boxes: tuple[tuple[int, float, float, float, float], ...] = ()
    paths: tuple[str, ...] = ()
    values: tuple[float, ...] = ()
    size: tuple[int, int] | None = None
    fault: tuple[str, str] | None = None

    @property
    def id(self) -> str:
        """Unique within the site."""
        return f"{self.path}#{self.key}#{self.frame}#{self.box or ''}"

    @property
    def files(self) -> tuple[str, ...]:
        """Every file or folder the case is read from."""
        return tuple(name for name in (self.path, self.mask, *self.paths) if name)


def unit_hash(text: str) -> float:
    """A number in [0, 1) that depends on ``text`` alone, on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:8]) / 2**64


def split_of(patient: str, val_fraction: float, test_fraction: float) -> str:
    """``train``, ``val`` or ``test`` by the hash of the patient.

    All images of a patient fall on one side, and adding files never moves an old one.
    """
    place = unit_hash(f"consilium-split:{patient}")
    if place < test_fraction:
        return "test"
    return "val" if place < test_fraction + val_fraction else "train"


def split_word(word: str) -> str | None:
    """``train``, ``val`` or ``test`` for the words people write, else None."""
    return _SPLIT_WORDS.get(word.strip().lower())


def derived_seed(*parts: object) -> int:
    """A 63-bit seed from any parts: the same everywhere, independent for different parts."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8]) >> 1

"""Decode a site's cases once, keep what they decode to in memory-mapped files, hand out arrays.

A task's ``decode`` turns one case into named arrays: an image, perhaps its mask or its size. The arrays of one name
form a ``Column``: one flat file, so that cases may differ in size.

The cache lies in the site's own folder. Its key covers each file's path, size and times of change and the settings the
task decodes by, so a changed file or job decodes afresh; a half-written cache is never seen, since the folder is
renamed into place when complete. All entries together take no more than the site allows, see ``pruning``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from shared.cases import Sample, SiteData
from shared.config import Job
from shared.errors import SiteRefusal
from shared.imaging.errors import UnreadableImage
from shared.imaging.pruning import INDEX, WRITING, mark_used, prune, remove
from shared.imaging.scale import with_scale
from shared.imaging.stamp import stamp
from shared.sitefile import OWN_FOLDER
from shared.tasks import load_task

CACHE_VERSION = 3  # raise it when decoding changes, so that old caches are not used


def to_uint16(picture: np.ndarray) -> np.ndarray:
    """Grey values 0..1 as 0..65535: half the memory of a float, finer than any detector."""
    scaled: np.ndarray = np.rint(np.asarray(picture) * 65535).astype(np.uint16)
    return scaled


def to_float(raw: np.ndarray) -> Tensor:
    """The inverse of ``to_uint16``, as a float32 tensor."""
    return torch.from_numpy(np.asarray(raw).astype(np.float32)).mul_(1 / 65535)


class Column:
    """One array per case, all of one dtype, lying one after the other in a flat array; shapes may differ."""

    def __init__(self, flat: np.ndarray, shapes: Sequence[tuple[int, ...]], starts: np.ndarray | None = None) -> None:
        self.flat, self.shapes = flat, shapes
        lengths = np.array([math.prod(shape) for shape in shapes], dtype=np.int64)
        self.starts = np.cumsum(lengths) - lengths if starts is None else starts

    @classmethod
    def of(cls, arrays: Sequence[np.ndarray] | np.ndarray) -> Column:
        """A column in memory; one array with a leading axis counts as one array per case."""
        parts = [np.ascontiguousarray(array) for array in arrays]
        flat = np.concatenate([part.reshape(-1) for part in parts]) if parts else np.zeros(0)
        return cls(flat, [part.shape for part in parts])

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, index: int) -> np.ndarray:
        """The array of one case; a view."""
        shape, start = self.shapes[index], int(self.starts[index])
        return self.flat[start : start + math.prod(shape)].reshape(shape)

    def take(self, indices: Sequence[int]) -> np.ndarray:
        """The arrays of some cases as one with a leading axis; a copy.

        Raises:
            ValueError: their shapes differ.
        """
        if not len(indices):
            return np.zeros((0, *self.shapes[0]) if len(self) else 0, self.flat.dtype)
        return np.stack([self[index] for index in indices])

    def rows(self, indices: Sequence[int]) -> Column:
        """Some cases as a column of their own; nothing is copied."""
        return Column(self.flat, [self.shapes[i] for i in indices], self.starts[np.asarray(indices, dtype=np.int64)])


@dataclass(frozen=True)
class Skipped:
    """A case that could not be read: for the site's screen and log, never to leave the site.

    ``detail`` is the exception's: which slice or mask, and what was found there.
    """

    path: str
    code: str
    detail: str = ""


@dataclass(frozen=True)
class Dataset:
    """Decoded cases: ``samples[i]`` belongs to row i of every column. ``origin`` is what this is a subset of."""

    columns: Mapping[str, Column]
    samples: tuple[Sample, ...]
    skipped: tuple[Skipped, ...] = ()
    origin: Dataset | None = None

    @classmethod
    def of(cls, samples: Sequence[Sample], **columns: Sequence[np.ndarray] | np.ndarray) -> Dataset:
        """A data set in memory."""
        return cls({name: Column.of(arrays) for name, arrays in columns.items()}, tuple(samples))

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def whole(self) -> Dataset:
        """All splits of the data this is a split of."""
        return self if self.origin is None else self.origin  # one without cases would count as false

    def subset(self, split: str) -> Dataset:
        """The cases of one split; nothing is copied until a batch is asked for."""
        if split not in self._subsets:
            keep = [i for i, sample in enumerate(self.samples) if sample.split == split]
            columns = {name: column.rows(keep) for name, column in self.columns.items()}
            self._subsets[split] = Dataset(columns, tuple(self.samples[i] for i in keep), self.skipped, self.whole)
        return self._subsets[split]

    @cached_property
    def _subsets(self) -> dict[str, Dataset]:
        """Splits asked for before: every message of a run asks again."""
        return {}


def concatenate(parts: Sequence[Dataset]) -> Dataset:
    """Several sites' cases as one set (the pooled baseline); arrays are copied into memory."""
    if len(parts) == 1:
        return parts[0]
    full = [part for part in parts if len(part)]
    columns = {
        name: Column.of([part.columns[name][i] for part in full for i in range(len(part))])
        for name in (full[0].columns if full else {})
    }
    samples = tuple(sample for part in parts for sample in part.samples)
    return Dataset(columns, samples, tuple(skip for part in parts for skip in part.skipped))


def load_dataset(
    samples: Sequence[Sample],
    site: SiteData,
    job: Job,
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Decode ``samples`` into memory-mapped arrays in the site's cache, or open those already there.

    Cases that cannot be read are left out and listed in ``.skipped``.

    Raises:
        SiteRefusal: more than the site's ``max_unreadable`` share could not be read.
    """
    site = with_scale(samples, site, job)
    folder = site.cache or site.root / OWN_FOLDER / "cache"
    entry = folder / _key(samples, site, job)
    index, columns = _opened(entry) or _decoded(samples, site, job, entry, progress)
    skipped = tuple(Skipped(**item) for item in index["skipped"])
    if len(skipped) > site.max_unreadable * len(samples) + 1e-9:  # 29 of 100 are not above 0.29
        names = ", ".join(f"{item.path} ({item.code})" for item in skipped[:20])
        raise SiteRefusal(
            "too-many-unreadable",
            f"{len(skipped)} of {len(samples)} images cannot be read, the limit is {site.max_unreadable:.0%}: {names}"
            "; mend or remove them, or raise [limits] max_unreadable in site.toml",
        )
    return Dataset(columns, tuple(samples[i] for i in index["kept"]), skipped)


def _opened(entry: Path) -> tuple[dict[str, Any], dict[str, Column]] | None:
    """The index and the columns of an entry; None where there is none, or it is being removed, or it is not whole."""
    try:
        index = json.loads((entry / INDEX).read_text(encoding="utf-8"))
        columns = {name: _open(entry / f"{name}.raw", **facts) for name, facts in index["columns"].items()}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError, AttributeError):  # the machine went down before all of it was on the disk
        remove(entry)
        return None
    mark_used(entry)
    return index, columns


def _decoded(
    samples: Sequence[Sample], site: SiteData, job: Job, entry: Path, progress: Callable[[int, int], None] | None
) -> tuple[dict[str, Any], dict[str, Column]]:
    """What ``_opened`` gives of an entry that is made now; others make room for it."""
    _decode(samples, site, job, entry, progress)
    prune(entry.parent, site.cache_gb * 1e9, entry)
    if (found := _opened(entry)) is None:
        raise SiteRefusal("no-cache", f"{entry}: another process removed it at once; raise [cache] max_gb in site.toml")
    return found


def _open(path: Path, dtype: str, shapes: list[list[int]]) -> Column:
    size = path.stat().st_size
    if size != np.dtype(dtype).itemsize * sum(map(math.prod, shapes)):
        raise ValueError(f"{path} has {size} bytes, which is not what its index says")
    flat = np.memmap(path, dtype, mode="r") if size else np.zeros(0, dtype)  # a file without bytes cannot be mapped
    return Column(flat, [tuple(shape) for shape in shapes])


def _key(samples: Sequence[Sample], site: SiteData, job: Job) -> str:
    task = load_task(job.task)
    head = f"{CACHE_VERSION} {job.task} {task.decoded_by(job)} {sorted(site.label_map.items())} {site.root.resolve()}"
    head += f" {site.scale}"
    digest = hashlib.sha256(head.encode("utf-8", "surrogateescape"))
    stamps: dict[str, str] = {}
    for sample in samples:
        for name in sample.files:
            if name not in stamps:
                stamps[name] = stamp(site.root / name)
        what = f"{sample.id} {sample.mask} {sample.paths} {sample.boxes} {sample.values} {sample.size} {sample.fault}"
        text = f"{what} {' '.join(stamps[name] for name in sample.files)}\n"
        digest.update(text.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:32]


class _Writer:
    """The files of one cache entry while it is written: a flat file per column."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, IO[bytes]] = {}
        self.columns: dict[str, tuple[str, list[tuple[int, ...]]]] = {}

    def add(self, arrays: Mapping[str, np.ndarray]) -> None:
        for name, array in arrays.items():
            if name not in self.files:
                self.files[name] = (self.folder / f"{name}.raw").open("wb")
                self.columns[name] = (array.dtype.str, [])
            dtype, shapes = self.columns[name]
            with _written(self.folder.parent):
                self.files[name].write(np.ascontiguousarray(array, dtype).tobytes())
            shapes.append(array.shape)

    def close(self) -> None:
        for file in self.files.values():
            file.close()

    def facts(self) -> dict[str, object]:
        return {name: {"dtype": dtype, "shapes": shapes} for name, (dtype, shapes) in self.columns.items()}


def _decode(
    samples: Sequence[Sample], site: SiteData, job: Job, entry: Path, progress: Callable[[int, int], None] | None
) -> None:
    """Decode into a temporary folder beside ``entry`` and rename it; a second process that was faster wins."""
    task = load_task(job.task)
    with _written(entry.parent):
        entry.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=WRITING, dir=entry.parent))
    writer = _Writer(work)
    try:
        kept: list[int] = []
        skipped: list[dict[str, str]] = []
        for number, sample in enumerate(samples):
            try:
                writer.add(task.decode(sample, site, job))
                kept.append(number)
            except UnreadableImage as error:
                skipped.append({"path": sample.path, "code": error.code, "detail": error.detail})
            if progress:
                progress(number + 1, len(samples))
        with _written(entry.parent):
            writer.close()
            index = {"kept": kept, "skipped": skipped, "columns": writer.facts()}
            (work / INDEX).write_text(json.dumps(index), encoding="utf-8")
            try:
                os.rename(work, entry)
            except OSError:
                if not (entry / INDEX).is_file():
                    raise
    finally:
        with contextlib.suppress(OSError):  # what a full disk kept back is tried once more
            writer.close()
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def _written(folder: Path) -> Iterator[None]:
    """What cannot be written to the cache is said as that, whatever reading does meanwhile."""
    try:
        yield
    except OSError as error:
        raise SiteRefusal("no-cache", f"{folder}: cannot write the image cache: {error.strerror}") from None

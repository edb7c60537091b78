"""Decode a site's images once, keep them as one memory-mapped array, hand out batches.

The cache lies in the site's own folder. Its key covers each file's path, size and time of change and the
preprocessing, so a changed file or job decodes afresh; a half-written cache is never seen, since the folder is renamed
into place when complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shared.cases import Sample, SiteData
from shared.config import Job
from shared.errors import SiteRefusal
from shared.imaging.read import UnreadableImage, crop, fit, read_image

CACHE_VERSION = 1  # raise it when decoding changes, so that old caches are not used


@dataclass(frozen=True)
class Skipped:
    """An image that could not be read: for the site's log, never to leave the site."""

    path: str
    code: str


@dataclass(frozen=True)
class Dataset:
    """Decoded images with their samples.

    ``images`` is uint16 (n, channels, size, size), 0..65535 standing for 0..1; ``samples[i]`` belongs to ``images[i]``.
    """

    images: np.ndarray
    samples: tuple[Sample, ...]
    skipped: tuple[Skipped, ...] = ()

    def __len__(self) -> int:
        return len(self.samples)

    def subset(self, split: str) -> Dataset:
        """The images of one split; nothing is copied until a batch is asked for."""
        if split not in self._subsets:
            keep = [i for i, sample in enumerate(self.samples) if sample.split == split]
            rows = [self.images.rows[i] for i in keep] if isinstance(self.images, RowView) else keep
            base = self.images.base if isinstance(self.images, RowView) else self.images
            images = RowView(base, rows)
            self._subsets[split] = Dataset(images, tuple(self.samples[i] for i in keep), self.skipped)  # type: ignore[arg-type]
        return self._subsets[split]

    @cached_property
    def _subsets(self) -> dict[str, Dataset]:
        """Splits asked for before: every message of a run asks again."""
        return {}

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, list[tuple[int, ...]]]:
        """Images as float32 (b, channels, size, size) in [0, 1], and their targets."""
        raw = np.asarray(self.images[indices])
        images = torch.from_numpy(raw.astype(np.float32)).mul_(1 / 65535)
        return images, [self.samples[i].target for i in indices]

    def batches(self, size: int) -> Iterator[tuple[Tensor, list[tuple[int, ...]]]]:
        """All images in order."""
        for start in range(0, len(self), size):
            yield self.batch(range(start, min(start + size, len(self))))


class RowView:
    """Some rows of an array, picked when asked for: a split of a memory-mapped file without a copy."""

    def __init__(self, base: np.ndarray, rows: Sequence[int]) -> None:
        self.base, self.rows = base, np.asarray(rows, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices: Sequence[int]) -> np.ndarray:
        return self.base[self.rows[np.asarray(indices, dtype=np.int64)]]


def concatenate(parts: Sequence[Dataset]) -> Dataset:
    """Several sites' images as one set (the pooled baseline); images are copied into memory."""
    if len(parts) == 1:
        return parts[0]
    images = np.concatenate([np.asarray(part.images[range(len(part))]) for part in parts])
    samples = tuple(sample for part in parts for sample in part.samples)
    return Dataset(images, samples, tuple(skip for part in parts for skip in part.skipped))


def load_dataset(
    samples: Sequence[Sample],
    site: SiteData,
    job: Job,
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Decode ``samples`` into a memory-mapped array in the site's cache, or open the array already there.

    Unreadable images are left out and listed in ``.skipped``.

    Raises:
        SiteRefusal: more than the site's ``max_unreadable`` share could not be read.
    """
    folder = site.cache or site.root / ".consilium" / "cache"
    entry = folder / _key(samples, site, job)
    if not (entry / "index.json").is_file():
        _decode(samples, site, job, entry, progress)
    index = json.loads((entry / "index.json").read_text(encoding="utf-8"))
    skipped = tuple(Skipped(**item) for item in index["skipped"])
    if len(skipped) > site.max_unreadable * len(samples) + 1e-9:  # 29 of 100 are not above 0.29
        names = ", ".join(f"{item.path} ({item.code})" for item in skipped[:20])
        raise SiteRefusal(
            "too-many-unreadable",
            f"{len(skipped)} of {len(samples)} images cannot be read, the limit is {site.max_unreadable:.0%}: {names}"
            "; mend or remove them, or raise [limits] max_unreadable in site.toml",
        )
    kept = index["kept"]
    if not kept:
        return Dataset(np.zeros((0, job.data.channels, job.data.size, job.data.size), np.uint16), (), skipped)
    images = np.load(entry / "images.npy", mmap_mode="r", allow_pickle=False)[: len(kept)]
    return Dataset(images, tuple(samples[i] for i in kept), skipped)


def _key(samples: Sequence[Sample], site: SiteData, job: Job) -> str:
    head = f"{CACHE_VERSION} {job.data.channels} {job.data.size} {site.root.resolve()}"
    digest = hashlib.sha256(head.encode("utf-8", "surrogateescape"))
    stamps: dict[str, str] = {}
    for sample in samples:
        if sample.path not in stamps:
            try:
                status = (site.root / sample.path).stat()
                stamps[sample.path] = f"{status.st_size} {status.st_mtime_ns}"
            except OSError:
                stamps[sample.path] = "absent"
        digest.update(f"{sample.id} {stamps[sample.path]}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:32]


def _decode(
    samples: Sequence[Sample], site: SiteData, job: Job, entry: Path, progress: Callable[[int, int], None] | None
) -> None:
    """Decode into a temporary folder beside ``entry`` and rename it; a second process that was faster wins."""
    size, channels = job.data.size, job.data.channels
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".writing-", dir=entry.parent))
    except OSError as error:
        raise SiteRefusal("no-cache", f"{entry.parent}: cannot write the image cache: {error.strerror}") from None
    try:
        images = np.lib.format.open_memmap(
            work / "images.npy", mode="w+", dtype=np.uint16, shape=(max(len(samples), 1), channels, size, size)
        )
        kept: list[int] = []
        skipped: list[dict[str, str]] = []
        for number, (sample, outcome) in enumerate(_read_all(samples, site)):
            if isinstance(outcome, UnreadableImage):
                skipped.append({"path": sample.path, "code": outcome.code})
            else:
                images[len(kept)] = np.rint(fit(outcome, size, size, channels) * 65535).astype(np.uint16)
                kept.append(number)
            if progress:
                progress(number + 1, len(samples))
        images.flush()
        del images
        (work / "index.json").write_text(json.dumps({"kept": kept, "skipped": skipped}), encoding="utf-8")
        try:
            os.rename(work, entry)
        except OSError:
            if not (entry / "index.json").is_file():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _read_all(samples: Sequence[Sample], site: SiteData) -> Iterator[tuple[Sample, np.ndarray | UnreadableImage]]:
    """Each sample with its pixels or the reason why there are none; the boxes of one file share one decoding."""
    last: tuple[object, np.ndarray | UnreadableImage] = (None, UnreadableImage("not-found", ""))
    for sample in samples:
        address = (sample.path, sample.frame, sample.key)
        if address != last[0]:
            last = (address, _read(site, sample))
        outcome = last[1]
        if sample.box and not isinstance(outcome, UnreadableImage):
            try:
                outcome = crop(outcome, sample.box)
            except UnreadableImage as error:
                outcome = error
        yield sample, outcome


def _read(site: SiteData, sample: Sample) -> np.ndarray | UnreadableImage:
    try:
        more = {"key": sample.key} if sample.key else {}
        return read_image(site.root / sample.path, frame=sample.frame, **more)  # type: ignore[arg-type]
    except UnreadableImage as error:
        return error

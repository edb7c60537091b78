"""The cache of decoded images stays within what the site allows it: who was not used for longest goes first.

An entry is used again whenever a data set is opened from it. Processes that have its files mapped keep them until they
let go, since the system frees a file's blocks only then.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

INDEX = "index.json"
NAME = "[0-9a-f]{32}"  # of an entry: the key of what is in it
WRITING = ".writing-"  # begins the name of a folder that is being written, or removed
_ABANDONED = 86_400.0  # seconds after which nobody is writing any more: the process was killed


class _Entry(NamedTuple):
    used: float  # seconds since 1970
    path: Path
    bytes: int


def mark_used(entry: Path) -> None:
    """Note that an entry is in use now. A cache on a read-only disk keeps its order of writing."""
    with suppress(OSError):
        os.utime(entry / INDEX)


def prune(folder: Path, limit: float, keep: Path) -> None:
    """Remove entries of a cache ``folder`` until all of it takes ``limit`` bytes at most, or only ``keep`` is left.

    Several processes may do so at once. Nothing else that lies in the folder is touched.
    """
    entries = sorted(_entries(folder))
    total = sum(entry.bytes for entry in entries)
    for entry in entries:
        if total <= limit:
            break
        if entry.path != keep:
            remove(entry.path)
            total -= entry.bytes
    for left in folder.glob(f"{WRITING}*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _ABANDONED:
                shutil.rmtree(left, ignore_errors=True)


def _entries(folder: Path) -> Iterator[_Entry]:
    for index in folder.glob(f"*/{INDEX}"):
        if not re.fullmatch(NAME, index.parent.name):
            continue
        with suppress(OSError):  # another process removed it just now
            used = index.stat().st_mtime
            yield _Entry(used, index.parent, sum(file.stat().st_size for file in index.parent.iterdir()))


def remove(entry: Path) -> None:
    """Out of the way first, so that an entry is whole or not there: who opens it at this moment decodes anew."""
    aside = entry.with_name(f"{WRITING}{entry.name}-{os.getpid()}")
    with suppress(OSError):
        entry.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)

"""A run's journal as the store follows it: where run folders lie, what their runs are called, which lines are new."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

JOURNAL = "rounds.jsonl"
_BASELINES, _REFERENCE = "baselines", "reference"


class Line(NamedTuple):
    """An event, and where in the journal its line begins and ends, in bytes."""

    begin: int
    end: int
    event: dict[str, Any]


def lines(folder: Path, begin: int = 0) -> Iterator[Line]:
    """The events from ``begin`` on. A line that broke off is no event; the last one is that until it has ended."""
    path = folder / JOURNAL
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(begin)
        for raw in file:
            if not raw.endswith(b"\n"):
                return
            end = begin + len(raw)
            if (event := parsed(raw)) is not None:
                yield Line(begin, end, event)
            begin = end


def parsed(raw: bytes) -> dict[str, Any] | None:
    """The event of a line; None if it broke off when the disk was full or the machine went down."""
    try:
        event = json.loads(raw)
    except ValueError:  # no JSON, or no text
        return None
    return event if isinstance(event, dict) and "event" in event and "time" in event else None


def size(folder: Path) -> int:
    """Bytes of the journal; 0 where there is none."""
    path = folder / JOURNAL
    return path.stat().st_size if path.exists() else 0


def key_of(folder: Path) -> str | None:
    """What the run is called in the store, wherever its folder is moved to; None before its first event.

    It stands in the first event; of a journal by an older release it is made from that.
    """
    first = next(lines(folder), None)
    if first is None:
        return None
    if named := first.event.get("run"):
        return str(named)[:64]
    own = folder.name if parent_of(folder) is not None else ""
    return hashlib.sha256(json.dumps([own, first.event], sort_keys=True).encode()).hexdigest()[:32]


def parent_of(folder: Path) -> Path | None:
    """The run folder that this one is a baseline's or the reference network's of."""
    above = folder.parent.parent if folder.parent.name == _BASELINES else folder.parent
    inner = folder.parent.name == _BASELINES or folder.name == _REFERENCE
    return above if inner and (above / JOURNAL).exists() else None


def kind_of(folder: Path) -> str:
    """federated, pooled, local or reference."""
    if parent_of(folder) is None:
        return "federated"
    return folder.name if folder.name in ("pooled", _REFERENCE) else "local"


def top_of(folder: Path) -> Path:
    """The run folder itself, or the one that it belongs to."""
    above = parent_of(folder)
    return folder if above is None else top_of(above)


def family(folder: Path) -> Iterator[Path]:
    """A run folder and those of its baselines and its reference network; nothing where there is no run."""
    if not (folder / JOURNAL).is_file():
        return
    yield folder
    for inner in (folder / _REFERENCE, *sorted((folder / _BASELINES).glob("*"))):
        yield from family(inner)


def runs_in(folder: Path) -> Iterator[Path]:
    """All runs of a run folder, or of a folder of run folders."""
    if (folder / JOURNAL).is_file():
        yield from family(folder)
        return
    for inner in sorted(folder.iterdir() if folder.is_dir() else []):
        yield from family(inner)

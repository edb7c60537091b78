"""Which of the runs that their journals call running are not: a run that was killed could not write that it ended."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sqlalchemy import Engine

from server.database import read
from server.database.engine import base_of
from server.database.query import Row
from server.store import broke_off

ASKED_OF = 200  # runs that their journals call running, the newest
Ask = Callable[[Path], str | None]  # what a federation's server says of the run in a folder


def run_folder(db: Engine, path: str) -> Path | None:
    """Where the run of that path lies; None where it is not on this machine."""
    folder = ((base_of(db) or Path("/nowhere")) / path).resolve()
    return folder if path and folder.is_dir() else None


def state(db: Engine, row: Row, ask: Ask | None = None) -> str | None:
    """What is known better than the journal of a run that this calls running: what its federation's server says, or
    ``stopped`` where no program is at it; None where nothing is."""
    folder = run_folder(db, row["path"]) if row["status"] == "running" else None
    if folder is None:
        return None
    return (ask(folder) if ask is not None else None) or ("stopped" if broke_off(folder) else None)


def states(db: Engine, ask: Ask | None = None) -> dict[int, str]:
    """``state`` of all of them, by id."""
    rows, _ = read.runs(db, ASKED_OF, sort="-updated", filter={"status": "running"})
    known = {row["id"]: state(db, row, ask) for row in rows}
    return {id: found for id, found in known.items() if found is not None}

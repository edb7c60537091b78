"""Hands a run of the store to a tool, once or until the run is over."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from sqlalchemy import Engine

from server.database import read
from server.database.mirror import bring_in, open_store
from server.database.query import Row
from server.tracking.points import Point, points
from shared.errors import UserError

EVERY = 2.0  # seconds between looks at a run that is going on


class Tool(Protocol):
    """What takes a run's figures: each once, in the order of rounds."""

    def write(self, news: Sequence[Point]) -> None: ...

    def end(self, row: Row) -> None: ...


def run_in_store(folder: Path, store: str = "") -> tuple[Engine, int]:
    """The store of a run folder, brought up to date, and the run's id in it.

    Raises:
        UserError: there is no such run.
    """
    db = open_store(folder, store)
    bring_in(db, folder)
    id = read.find(db, folder)
    if id is None:
        raise UserError(f"{folder}: no run folder; name the --out of a `consilium simulate`, or DIR/runs/RUN")
    return db, id


def track(
    folder: Path, store: str, start: Callable[[Row], Sequence[Tool]], follow: bool, say: Callable[[str], None]
) -> int:
    """Write the run in ``folder`` to the tools that ``start`` gives for its row; gives the number of figures written.

    ``follow``: look again until the run has ended or failed.

    Raises:
        UserError: there is no such run, or a tool cannot be reached.
    """
    db, id = run_in_store(folder, store)
    try:
        tools, written = start(read.run(db, id)), set[tuple[str, int]]()
        while True:
            bring_in(db, folder)
            row = read.run(db, id)
            news = [point for point in points(db, id) if (point.name, point.step) not in written]
            news.sort(key=lambda point: (point.time, point.step, point.name))
            for tool in tools:
                tool.write(news)
            written |= {(point.name, point.step) for point in news}
            if news:
                say(f"{len(news)} figures, up to round {row['done']} of {row['rounds']}")
            if not follow or row["status"] != "running":
                break
            time.sleep(EVERY)
        for tool in tools:
            tool.end(row)
        return len(written)
    finally:
        db.dispose()

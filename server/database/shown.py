"""What is shown of a run comes from the store, where there is one."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from server.database.engine import open_database
from server.database.mirror import store_beside
from server.database.query import events
from server.database.write import follow
from server.store import Event, read_events
from shared.errors import UserError


def events_of(folder: Path, store: str = "") -> list[Event]:
    """The events of the run in ``folder`` from its store, brought up to date first; ``[]`` where there is no run.

    From the journal, which says the same, where there is no store yet, or where it cannot be read or written: a report
    can be made of a run folder that was handed on, and none fails for the database's sake.
    """
    if not store and not store_beside(folder).is_file():
        return read_events(folder)
    try:
        db = open_database(store or store_beside(folder))
        try:
            id = follow(db, folder)
            return events(db, id) if id is not None else []
        finally:
            db.dispose()
    except (SQLAlchemyError, OSError, UserError):
        return read_events(folder)

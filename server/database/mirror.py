"""Keeps the store up to date while a run goes on, and never ends the run: the journal has all that the store has."""

from __future__ import annotations

import time
from pathlib import Path

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from server.database.engine import STORE, open_database, words
from server.database.journal import JOURNAL, top_of
from server.database.write import follow, take_in
from shared.errors import UserError

RETRY = 30.0  # seconds before a database that failed is tried again: each try may wait for a lock


def store_beside(folder: Path) -> Path:
    """The store of a run folder where none is named: a file beside it, or beside the run that it belongs to."""
    return top_of(folder.resolve()).parent / STORE


def runs_folder(folder: Path) -> Path:
    """Where run folders lie: in a federation's folder in ``runs``, else where one says. A folder that merely has a
    federation.toml in it, from which a federation's is made elsewhere, is none."""
    made = (folder / "federation.toml").is_file() and (folder / "ca").is_dir()
    return folder / "runs" if made else folder


def open_store(folder: Path, store: str = "") -> Engine:
    """The store of a run folder, of a folder of run folders, or of a federation; see ``bring_in``.

    Raises:
        UserError: there is no such folder, or the store cannot be opened.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    inner = runs_folder(folder.resolve())
    return open_database(store or (store_beside(inner) if (inner / JOURNAL).exists() else inner / STORE))


def bring_in(db: Engine, folder: Path) -> tuple[list[Path], list[str]]:
    """Bring the runs of a folder, as for ``open_store``, up to date in the store: those with news, and what was wrong.

    Raises:
        UserError: the store cannot be written; it can be read all the same, as it was.
    """
    try:
        return take_in(db, runs_folder(folder.resolve()))
    except (SQLAlchemyError, OSError) as error:
        raise UserError(f"{db.url.render_as_string()}: cannot be written: {words(error)}") from None


class Mirror:
    """Follows the journal of the run in ``folder`` into ``store``, or into the store beside it where that is empty."""

    def __init__(self, folder: Path, store: str) -> None:
        self.folder, self.store = folder, store
        self.db: Engine | None = None
        self.rest = 0.0  # not tried again before this
        self.said = False

    def update(self, now: bool = False) -> str:
        """Write what is new; gives what went wrong, in words, the first time that something does.

        After a failure nothing is tried for a while, unless it must be ``now``. What was missed is made up for later.
        """
        if self.rest and time.monotonic() < self.rest and not now:
            return ""
        try:
            self.db = self.db or open_database(self.store or store_beside(self.folder))
            follow(self.db, self.folder)
        except (SQLAlchemyError, OSError, UserError) as error:
            return self._failed(words(error))
        except Exception as error:  # a fault of ours, which must not cost a night of training either
            return self._failed(f"{type(error).__name__}: {words(error)}")
        self.rest = 0.0
        return ""

    def _failed(self, why: str) -> str:
        self.rest = time.monotonic() + RETRY
        if self.said:
            return ""
        self.said = True
        return (
            f"the store was not written ({why}); the run goes on and its journal is whole. What is missing is made up "
            f"for when it can be written again, or by: consilium runs import {self.folder}"
        )

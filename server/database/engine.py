"""Opens the store: an SQLite file beside the run folders, another one, or a PostgreSQL database."""

from __future__ import annotations

import json
import sqlite3
import time
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError

from server.database.migrate import migrate
from shared.errors import UserError, how_to_install

STORE = "consilium.sqlite"
PATIENCE = 5.0  # seconds to wait for another's lock, or for PostgreSQL to answer


def store_url(store: str | Path) -> URL:
    """The database that ``--store`` names: a path is an SQLite file, ``postgresql://…`` is PostgreSQL.

    Raises:
        UserError: it names none.
    """
    if "://" not in str(store):
        return URL.create("sqlite+pysqlite", database=str(Path(store).resolve()))
    try:
        url = make_url(str(store))
    except (ArgumentError, ValueError):
        raise UserError("--store: is no URL; write a path or postgresql://USER@HOST/DATABASE") from None
    if url.get_backend_name() == "sqlite" and url.database:
        return url.set(drivername="sqlite+pysqlite", database=str(Path(url.database).resolve()))
    if url.drivername in ("postgresql", "postgres", "postgresql+psycopg"):
        return url.set(drivername="postgresql+psycopg")
    raise UserError(f"--store {url.drivername}://…: must be the path of an SQLite file, or postgresql://…")


def base_of(db: Engine) -> Path | None:
    """The folder that run folders are named from, where the store is a file beside them."""
    return Path(db.url.database).parent if db.dialect.name == "sqlite" and db.url.database else None


def open_database(store: str | Path | URL, create: bool = True) -> Engine:
    """An engine of the store with its tables up to date. Safe for threads; made new where nothing is there yet.

    Raises:
        UserError: it cannot be opened, its driver is not installed, or it is a newer release's. The message never
            holds a password.
    """
    url = store if isinstance(store, URL) else store_url(store)
    if url.get_backend_name() == "sqlite" and not create and not Path(str(url.database)).is_file():
        raise UserError(f"{url.database}: there is no store here; `consilium runs import FOLDER` makes it")
    try:
        db = _engine(url)
        migrate(db)
    except (ModuleNotFoundError, NoSuchModuleError):
        raise UserError(f"--store: PostgreSQL needs a driver; {how_to_install('postgres')}") from None
    except DBAPIError as error:
        raise UserError(f"{url.render_as_string()}: cannot be opened: {words(error)}") from None
    return db


def without_password(store: str) -> str:
    """The store as it may be written down; "" for none.

    Raises:
        UserError: there is a password in it, or it names no store.
    """
    if not store:
        return ""
    url = store_url(store)
    if url.password:
        raise UserError("--store: leave the password out, it would be written down; put it into ~/.pgpass")
    return url.render_as_string()


def words(error: BaseException) -> str:
    """What a database said was wrong, in one line, without the statement and its values."""
    cause = getattr(error, "orig", None) or error
    lines = str(cause).strip().splitlines()
    return lines[0] if lines else type(cause).__name__


def _engine(url: URL) -> Engine:
    compact: dict[str, Any] = {
        "json_serializer": lambda value: json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    }
    if url.get_backend_name() != "sqlite":
        waits = f"-c lock_timeout={int(PATIENCE * 1000)}"
        arguments = {"connect_timeout": int(PATIENCE), "options": waits}
        return create_engine(url, connect_args=arguments, pool_pre_ping=True, **compact)
    db = create_engine(url, connect_args={"timeout": PATIENCE}, **compact)
    event.listen(db, "connect", _connected)
    event.listen(db, "begin", _begin)
    return db


def _connected(connection: Any, _: object) -> None:
    """WAL: readers never wait for the writer. NORMAL: a power cut may cost the last events, which the journal has.

    The log is emptied at 200 pages (0.8 MB) instead of 1000, so that on a small disk it leaves the journal its room.
    """
    connection.isolation_level = None  # transactions begin where we say, not where the driver guesses
    _write_ahead(connection)
    for pragma in ("synchronous = NORMAL", "foreign_keys = ON", "wal_autocheckpoint = 200"):
        connection.execute(f"PRAGMA {pragma}")


def _write_ahead(connection: Any) -> None:
    """Only the first to open a new file changes its journal; whoever does so at the same moment waits for it here.

    SQLite itself does not wait: it reads the file before it changes it, and one that waits for a lock while it reads
    could wait for another that does the same, so it says SQLITE_BUSY at once, whatever the timeout.
    """
    until = time.monotonic() + PATIENCE
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
        time.sleep(0.01)


def _begin(connection: Connection) -> None:
    """A writer takes its lock at once: two that began as readers could not both go on."""
    write = connection.get_execution_options().get("write")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

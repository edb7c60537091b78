"""Makes the tables, and brings those of an older release up to date."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from sqlalchemy import Connection, Engine, inspect, text

from server.database.schema import VERSION, metadata, schema
from shared.errors import UserError

Step = Callable[[Connection], None]
# What to do to tables of version N to make them those of N + 1. New tables need no step but `metadata.create_all`.
STEPS: Mapping[int, Step] = {}
_LOCK = 0x636F6E73  # any number, of our own


def migrate(db: Engine, version: int = VERSION, steps: Mapping[int, Step] = STEPS) -> None:
    """Make the tables if there are none, else take them step by step to ``version``; all in one transaction.

    Raises:
        UserError: the tables are those of a newer release, or are not ours.
    """
    with db.connect() as connection:
        if _version(connection) == version:
            return  # without a write: a reader may be all that one is
    with db.execution_options(write=True).begin() as connection:
        alone(connection)
        found = _version(connection)
        if found is None:
            if others := set(inspect(connection).get_table_names()) & set(metadata.tables):
                raise UserError(f"{db.url}: holds a table {min(others)!r} that is not ours; name a database of its own")
            metadata.create_all(connection)
            connection.execute(schema.insert().values(version=version))
            return
        if found > version:
            raise UserError(f"{db.url}: was written by a newer Consilium; use that one, or name another with --store")
        for number in range(found, version):
            steps[number](connection)
        connection.execute(schema.update().values(version=version))


def alone(connection: Connection) -> None:
    """Until the transaction ends nobody else who asks for this goes on; SQLite has one writer at a time anyway."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})


def _version(connection: Connection) -> int | None:
    if not inspect(connection).has_table(schema.name):
        return None
    found: int | None = connection.scalar(schema.select())
    return found

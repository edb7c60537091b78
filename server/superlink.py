"""Flower's SuperLink, in a process whose database suits large models and waits for its turn longer than Flower's own.

All that SuperLink keeps is in one SQLite file with one writer at a time. On a slow disk, or with much else to do, a
writer may hold it for seconds; Flower 1.41 gives up after 5 s with an error 500, and a run whose sign of life meets
that error is taken for dead. Flower has no setting for it.

Models pass through that file in pieces of 5 MB, are there for a round and are deleted. As SQLite comes, each piece is
copied from the log to the database by itself. That what is deleted is overwritten with zeros, where the system's SQLite
does so, takes time, too, and stays: the models of single sites lie nowhere else.
"""

from __future__ import annotations

import sys

from flwr.supercore import sql_mixin
from flwr.superlink.cli import flower_superlink

PATIENCE = 25.0  # seconds; less than the 30 after which Flower's programs take a question for unanswered
PRAGMAS = {
    "busy_timeout": str(round(1000 * PATIENCE)),  # for another writer
    "wal_autocheckpoint": "16384",  # pages: 64 MB of log, not 4, are copied at once: a third less time
}


def suit_database() -> None:
    """Open the databases of this process from now on with ``PRAGMAS`` beside Flower's own."""
    pragmas = dict(sql_mixin.SQLITE_PRAGMAS) | PRAGMAS  # type: ignore[attr-defined]
    sql_mixin.SQLITE_PRAGMAS = tuple(pragmas.items())  # type: ignore[attr-defined, assignment]


def main() -> None:
    """``python -m server.superlink`` with the options of ``flower-superlink``; SIGTERM ends it."""
    suit_database()
    sys.argv[0] = "flower-superlink"
    flower_superlink()


if __name__ == "__main__":
    main()

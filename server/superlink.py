"""Flower's SuperLink, in a process whose database waits for its turn longer than Flower's own.

All that SuperLink keeps is in one SQLite file with one writer at a time. On a slow disk, or with much else to do, a
writer may hold it for seconds; Flower 1.41 gives up after 5 s with an error 500, and a run whose sign of life meets
that error is taken for dead. Flower has no setting for it.
"""

from __future__ import annotations

import sys

from flwr.supercore import sql_mixin
from flwr.superlink.cli import flower_superlink

PATIENCE = 25.0  # seconds; less than the 30 after which Flower's programs take a question for unanswered


def wait_longer() -> None:
    """Let the databases that this process opens from now on wait ``PATIENCE`` for another writer."""
    pragmas = dict(sql_mixin.SQLITE_PRAGMAS) | {"busy_timeout": str(round(1000 * PATIENCE))}  # type: ignore[attr-defined]
    sql_mixin.SQLITE_PRAGMAS = tuple(pragmas.items())  # type: ignore[attr-defined, assignment]


def main() -> None:
    """``python -m server.superlink`` with the options of ``flower-superlink``; SIGTERM ends it."""
    wait_longer()
    sys.argv[0] = "flower-superlink"
    flower_superlink()


if __name__ == "__main__":
    main()

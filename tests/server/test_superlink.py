"""SuperLink's database waits for its turn as long as we say, and suits large models."""

from __future__ import annotations

import sqlite3
import threading
import time
from pathlib import Path

import pytest
from flwr.supercore import sql_mixin
from flwr.supercore.object_store.sql_object_store import SqlObjectStore
from flwr.superlink.config_loader import get_federation_manager, get_objectstore_linkstate_factories
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from server import superlink
from server.superlink import PATIENCE, suit_database


def busy(path: Path, hold: float) -> float:
    """Let Flower's own state in ``path`` write while another writer holds the file; gives the seconds it took."""
    _, factory = get_objectstore_linkstate_factories(str(path), get_federation_manager(is_simulation=False))
    state = factory.state()
    held = threading.Event()

    def other() -> None:
        connection = sqlite3.connect(path, isolation_level=None)
        connection.execute("BEGIN IMMEDIATE")
        held.set()
        time.sleep(hold)
        connection.execute("ROLLBACK")
        connection.close()

    thread = threading.Thread(target=other)
    thread.start()
    held.wait(10)
    began = time.monotonic()
    try:
        state.create_node("owner", "name", b"key", 30.0)
        return time.monotonic() - began
    finally:
        thread.join()


def test_a_writer_that_has_to_wait_does_not_give_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In small: the patience itself is changed here, else each would take its many seconds."""
    assert dict(sql_mixin.SQLITE_PRAGMAS)["busy_timeout"] == "5000"  # else Flower has changed: see whether ours helps
    assert 5 < PATIENCE < 30  # Flower's clients give a question up then
    monkeypatch.setattr(sql_mixin, "SQLITE_PRAGMAS", sql_mixin.SQLITE_PRAGMAS)  # as it was, afterwards
    monkeypatch.setitem(superlink.PRAGMAS, "busy_timeout", "300")
    suit_database()
    with pytest.raises(OperationalError, match="database is locked"):
        busy(tmp_path / "impatient.db", 1.5)
    monkeypatch.setitem(superlink.PRAGMAS, "busy_timeout", str(round(1000 * PATIENCE)))
    suit_database()
    assert busy(tmp_path / "patient.db", 1.5) > 1


def test_the_database_is_opened_as_large_models_need_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql_mixin, "SQLITE_PRAGMAS", sql_mixin.SQLITE_PRAGMAS)
    suit_database()
    store = SqlObjectStore(str(tmp_path / "objects.db"))
    store.initialize()
    with store.session() as session:
        found = {name: session.execute(text(f"PRAGMA {name}")).scalar() for name in superlink.PRAGMAS}
        assert session.execute(text("PRAGMA journal_mode")).scalar() == "wal"
    assert found == {"busy_timeout": 25000, "wal_autocheckpoint": 16384}

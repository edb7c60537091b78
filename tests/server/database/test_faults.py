"""A store that cannot be written never ends a run, is said once, and is made up for; a journal that cannot does."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import sqlite3
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from server.database import engine, read
from server.database.engine import STORE, open_database
from server.database.mirror import bring_in, open_store
from server.store import Store, read_events, write_json
from shared.errors import UserError

NOBODY = 65534


def begin(store: Store) -> None:
    store.add("start", name="x", job="", rounds=3, version="")


def one_round(store: Store, number: int) -> None:
    row = {"site": "a", "weight": 1.0, "steps": 1, "images": 10, "loss": 0.5 + number}
    store.add("round", round=number, trained=[row], dropped=[], seconds=1.0)


def said(folder: Path) -> list[str]:
    return [event["text"] for event in read_events(folder) if event["event"] == "warning"]


def same(folder: Path) -> bool:
    """Whether the store has all that the journal has."""
    db = open_database(folder.parent / STORE, create=False)
    id = read.find(db, folder)
    events = read.events(db, id) if id is not None else []
    db.dispose()
    return events == read_events(folder)


def in_a_process(work: Callable[..., None], *arguments: object) -> None:
    """A limit, or another account, is for a process of its own; its assertions count here."""
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    process.join(120)
    assert process.exitcode == 0


def test_a_locked_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "PATIENCE", 0.1)
    store = Store(tmp_path / "run")
    begin(store)
    other = sqlite3.connect(tmp_path / STORE, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    for number in (1, 2, 3):
        one_round(store, number)
    assert len(said(tmp_path / "run")) == 1
    assert "database is locked" in said(tmp_path / "run")[0]
    assert not same(tmp_path / "run")
    other.execute("ROLLBACK")
    other.close()
    store.add("finish", seconds=3.0)
    assert same(tmp_path / "run")


def test_a_new_file_is_waited_for_while_another_makes_it(tmp_path: Path) -> None:
    """SQLite says at once that such a file is locked, and does not wait, when its journal is to be another."""
    first = sqlite3.connect(tmp_path / STORE, isolation_level=None, check_same_thread=False)
    first.execute("BEGIN IMMEDIATE")
    later = threading.Timer(0.3, first.execute, ["ROLLBACK"])
    later.start()
    db = open_database(tmp_path / STORE)
    later.join()
    with db.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
    db.dispose()
    first.close()


def test_a_new_file_that_stays_locked_is_not_waited_for_forever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "PATIENCE", 0.1)
    first = sqlite3.connect(tmp_path / STORE, isolation_level=None)
    first.execute("BEGIN IMMEDIATE")
    with pytest.raises(UserError, match="database is locked"):
        open_database(tmp_path / STORE)
    first.close()


def _opened(stores: list[Path], together: Barrier) -> None:
    for store in stores:
        together.wait(60)
        open_database(store).dispose()


def test_several_processes_make_a_new_store_together(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    stores, together = [tmp_path / f"{number}.sqlite" for number in range(20)], context.Barrier(4)
    processes = [context.Process(target=_opened, args=(stores, together)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 4


def _on_a_full_disk(folder: Path) -> None:
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    store = Store(folder)
    begin(store)
    # No file may grow beyond this: the write fails in the middle, as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, ((folder.parent / f"{STORE}-wal").stat().st_size + 10_000, hard))
    for number in range(1, 11):
        one_round(store, number)
    assert len(said(folder)) == 1
    assert not same(folder)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    store.add("finish", seconds=3.0)
    assert same(folder)


def test_a_full_disk(tmp_path: Path) -> None:
    in_a_process(_on_a_full_disk, tmp_path / "run")
    assert same(tmp_path / "run")
    with sqlite3.connect(tmp_path / STORE) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def _without_room_for_the_journal(folder: Path) -> None:
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    store = Store(folder, None)
    begin(store)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((folder / "rounds.jsonl").stat().st_size + 50, hard))
    with pytest.raises(OSError, match="File too large"):
        one_round(store, 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    again = Store(folder)
    begin(again)
    one_round(again, 1)


def test_a_journal_that_cannot_be_written_ends_the_run_and_is_gone_on_with(tmp_path: Path) -> None:
    in_a_process(_without_room_for_the_journal, tmp_path / "run")
    assert [event["event"] for event in read_events(tmp_path / "run")] == ["start", "start", "round"]
    assert same(tmp_path / "run")


@pytest.fixture
def read_only() -> Iterator[Path]:
    """A folder that may not be written, but the run folder in it may."""
    above = Path(tempfile.mkdtemp())
    (above / "run").mkdir()
    (above / "run").chmod(0o777)
    above.chmod(stat.S_IRUSR | stat.S_IXUSR | stat.S_IRGRP | stat.S_IXGRP | stat.S_IROTH | stat.S_IXOTH)
    yield above
    above.chmod(0o755)
    shutil.rmtree(above)


def _as_somebody(folder: Path) -> None:
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)  # root may write everywhere
    try:
        store = Store(folder)
        begin(store)
        one_round(store, 1)
        store.add("finish", seconds=1.0)
    finally:
        if root:
            os.seteuid(0)  # what counts the lines run writes them into the checkout when this process ends


def test_a_read_only_folder(read_only: Path) -> None:
    in_a_process(_as_somebody, read_only / "run")
    assert len(said(read_only / "run")) == 1
    assert "unable to open database file" in said(read_only / "run")[0]
    read_only.chmod(0o755)
    db = open_store(read_only / "run")
    assert bring_in(db, read_only / "run") == ([(read_only / "run").resolve()], [])
    db.dispose()
    assert same(read_only / "run")


def test_a_damaged_database_is_said_and_the_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / STORE).write_bytes(b"this is no database" * 500)
    store = Store(tmp_path / "run")
    begin(store)
    one_round(store, 1)
    assert "file is not a database" in said(tmp_path / "run")[0]
    with pytest.raises(UserError, match="file is not a database"):
        open_store(tmp_path)


def test_a_database_that_is_lost_during_a_run_is_made_anew(tmp_path: Path) -> None:
    store = Store(tmp_path / "run")
    begin(store)
    for path in tmp_path.glob(f"{STORE}*"):
        path.unlink()
    one_round(store, 1)
    db = open_store(tmp_path)
    bring_in(db, tmp_path)
    db.dispose()
    assert same(tmp_path / "run")


def test_words_that_databases_cannot_hold_are_replaced_in_the_journal_too(tmp_path: Path) -> None:
    store = Store(tmp_path / "run")
    store.add("warning", text="a\0b\udc80c\u2028d")
    assert [event["text"] for event in read_events(tmp_path / "run")] == ["a\ufffdb?c\u2028d"]
    assert same(tmp_path / "run")
    write_json(tmp_path / "x.json", {"k\udc80": "\0"})

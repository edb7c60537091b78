"""Kill -9 the server at any moment of a run: the store opens, no round is half written, and the run goes on."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sqlite3
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from server.database import read
from server.database.engine import STORE, open_database
from server.database.mirror import bring_in, open_store
from server.store import read_events
from shared.config import Job, job_from_flat
from tests.server.database.test_property import check


def play(sites: Path, flat: dict[str, object], out: Path) -> None:
    """A real run: the server's loop in this process, sites played by workers."""
    from server.rounds import Run
    from simulations.engine import LocalGrid
    from simulations.pool import WorkerPool
    from simulations.sites import node_of

    job = job_from_flat(flat)
    with WorkerPool("client.app:app", 1) as pool:
        nodes = [node_of(out / "sites", file) for file in sorted(sites.glob("*/site.toml"))]
        Run(LocalGrid(pool, nodes, job.flat()), job, out, resume=True).run()


class Left(NamedTuple):
    """The store after a kill: bytes of the journal that are in it, lines that are not, the last event it has."""

    journal: int
    missing: int
    last: str


def written(out: Path) -> int:
    """Lines of the journal."""
    path = out / "rounds.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
def test_killed_fifty_times(three_sites: Path, tiny_job: Job, tmp_path: Path) -> None:
    out, draw = tmp_path / "run", random.Random(0)
    job = tiny_job.replace(federation__rounds=100_000)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["server.rounds", "simulations.simulate", "client.app", "torch._dynamo"])
    seen: list[Left] = []
    for attempt in range(50):
        lines = written(out)
        process = context.Process(target=play, args=(three_sites, job.flat(), out))
        process.start()
        # So many events later, on a slow machine as on a fast one: at first straight after each, then at any moment.
        until, deadline = lines + (attempt % 8 + 1 if attempt < 16 else draw.randint(1, 8)), time.monotonic() + 120
        while written(out) < until:
            assert process.is_alive()
            assert time.monotonic() < deadline, "the run does not go on"
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.06) if attempt >= 16 else 0)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        seen.append(as_it_was_left(out))
        # What is missing is the one event in the midst of which it was killed, and what was missing before that.
        assert seen[-1].missing <= (seen[-2].missing if len(seen) > 1 else 0) + 1
    db = open_store(tmp_path)
    bring_in(db, tmp_path)
    id = read.find(db, out)
    assert id is not None
    check(db, id, out, "auroc", 1)
    row = read.run(db, id)
    db.dispose()
    assert row["attempts"] == 50
    assert row["done"] >= 10
    assert {"start", "survey", "round", "evaluation"} <= {
        left.last for left in seen
    }  # it was killed after each of them
    assert not any("store was not written" in str(event.get("text")) for event in read_events(out))
    assert len({left.journal for left in seen}) > 40


def as_it_was_left(out: Path) -> Left:
    """The store is sound and holds whole events only: those of the journal up to where it says it is."""
    file = out.parent / STORE
    if not file.exists():
        return Left(0, written(out), "")
    with sqlite3.connect(file) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
    db = open_database(file)
    id = read.find(db, out)
    if id is None:
        db.dispose()
        return Left(0, written(out), "")
    row, events = read.run(db, id), read.events(db, id)
    db.dispose()
    part = out.parent / "part"
    part.mkdir(exist_ok=True)
    (part / "rounds.jsonl").write_bytes((out / "rounds.jsonl").read_bytes()[: row["journal"]])
    assert events == read_events(part)
    for path in part.iterdir():
        path.unlink()
    part.rmdir()
    missing = (out / "rounds.jsonl").read_bytes()[row["journal"] :].count(b"\n")
    return Left(row["journal"], missing, str(events[-1]["event"]))

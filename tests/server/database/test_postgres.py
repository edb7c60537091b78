"""The same store in a real PostgreSQL server."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from sqlalchemy import Engine, inspect, select, text

from server.database import read
from server.database.engine import open_database
from server.database.schema import VERSION, metadata, schema
from server.database.write import follow, forget, take_in
from server.store import Event, Store, read_events
from shared.config import Job
from shared.errors import UserError
from simulations.simulate import run
from tests.server.database.journals import journals
from tests.server.database.postgres import server
from tests.server.database.test_property import check, followed_at_once, listed_by_settings, told


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with server() as url:
        yield url


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(happenings=journals)
def test_it_says_what_the_journal_says(url: str, happenings: list[Event]) -> None:
    db = open_database(url)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        folder.mkdir()
        told(folder, happenings, url)
        assert not any("store was not written" in str(e.get("text")) for e in read_events(folder))
        id = read.find(db, folder)
        assert id is not None
        check(db, id, folder)
        forget(db, id)
        again = follow(db, folder)
        assert again is not None
        check(db, again, folder)
    db.dispose()


def test_its_tables_are_those_of_sqlite(url: str, tmp_path: Path) -> None:
    found = []
    for store in (url, tmp_path / "a.sqlite"):
        db = open_database(store)
        tables = inspect(db)
        found.append({name: {c["name"] for c in tables.get_columns(name)} for name in metadata.tables})
        with db.connect() as connection:
            assert connection.scalar(select(schema.c.version)) == VERSION
        db.dispose()
    assert found[0] == found[1] == {name: set(table.c.keys()) for name, table in metadata.tables.items()}


def test_many_processes_may_open_it_at_once(url: str) -> None:
    """Tables are made once, whoever comes first."""
    admin = open_database(url)
    with admin.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("CREATE DATABASE fresh"))
    failures: list[BaseException] = []

    def opens() -> None:
        try:
            open_database(url.replace("/postgres?", "/fresh?")).dispose()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=opens) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    admin.dispose()
    assert failures == []


def test_those_who_follow_at_once_write_nothing_twice(url: str, tmp_path: Path) -> None:
    followed_at_once(url, tmp_path / "run")


def test_settings_of_the_job_are_listed_and_sorted_by(url: str, tmp_path: Path) -> None:
    listed_by_settings(url, tmp_path / "runs")


def answers(db: Engine, folder: Path) -> list[object]:
    """To every question; what a database calls its runs, and where their folders lie from it, is its own affair."""
    id = read.find(db, folder)
    assert id is not None
    questions = [read.events, read.rounds, read.site_grid, read.evaluations, read.site_metrics, read.test_sums]
    questions += [read.privacy, read.timings, read.warnings, read.surveyed]
    rows = [read.run(db, id), *read.run(db, id)["children"]]
    listed = [row for row in read.runs(db, limit=1000)[0] if row["id"] == id]
    sites = [{k: v for k, v in row.items() if k != "last_run"} for row in read.sites(db) if row["name"] in "abc"]
    own = ("id", "path", "parent", "children")
    return [
        *(question(db, id) for question in questions),
        [{k: v for k, v in row.items() if k not in own} for row in [*rows, *listed]],
        sites,
    ]


def test_a_simulation_with_baselines_is_written_there(
    url: str, three_sites: Path, tiny_job: Job, tmp_path: Path
) -> None:
    job = tiny_job.replace(federation__rounds=2)
    result = run(job, three_sites, tmp_path / "out" / "run", baselines=True, store=url)
    assert not list(tmp_path.rglob("*.sqlite"))
    db = open_database(url)
    id = read.find(db, result.folder)
    assert id is not None
    row = read.run(db, id)
    assert (row["path"], row["status"], row["done"]) == (str(result.folder.resolve()), "finished", 2)
    assert row["test_value"] == result.scores["federated"]["auroc"]
    assert {Path(child["path"]).name for child in row["children"]} == {"pooled", "local-a", "local-b", "local-c"}
    assert take_in(db, result.folder) == ([], [])
    other = open_database(tmp_path / "other.sqlite")
    take_in(other, result.folder)
    assert answers(db, result.folder) == answers(other, result.folder)
    other.dispose()
    moved = {name: sum(e["bytes"][name][1] for e in read.events(db, id, ["round"])) for name in "abc"}
    assert {name: of["up"] for name, of in read.timings(db, id)["sites"].items()} == moved
    db.dispose()


def test_a_server_that_ends_during_a_run_is_said_and_made_up_for(tmp_path: Path) -> None:
    with server() as url:
        own = Store(tmp_path / "run", url)
        own.add("start", name="x", job="", rounds=2, version="")
        own.add("round", round=1, trained=[], dropped=[], seconds=1.0)
    own.add("round", round=2, trained=[], dropped=[], seconds=1.0)
    own.add("finish", seconds=2.0)
    kinds = [event["event"] for event in read_events(tmp_path / "run")]
    assert kinds == ["start", "round", "round", "warning", "finish"]
    with server() as url:
        db = open_database(url)
        take_in(db, tmp_path / "run")
        assert read.events(db, 1) == read_events(tmp_path / "run")
        db.dispose()


def test_one_that_does_not_answer_is_said_without_the_password(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be opened") as raised:
        open_database(f"postgresql://someone:secret-word@/x?host={tmp_path}")
    assert "secret-word" not in str(raised.value)

"""Whatever happens in a run, the store and the journal say the same; nothing is lost, rounded or counted twice."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, update

from server.database import query, read
from server.database import schema as t
from server.database.engine import open_database
from server.database.write import follow, forget
from server.record import lost_replies
from server.results import curve, dropped
from server.store import Event, Store, read_events
from shared.config import Job
from tests.server.database.journals import journals

JOB = Job().replace(evaluation__best_metric="loss")  # less is better


def told(folder: Path, happenings: list[Event], store: str | None) -> None:
    """As a run tells it, each attempt by a Store of its own."""
    (folder / "job.toml").write_text(JOB.toml())
    own = Store(folder, store)
    for happening in happenings:
        facts = dict(happening)
        kind = facts.pop("kind")
        if kind == "start":
            own = Store(folder, store)
        own.add(kind, **facts)


def best_by_hand(events: list[Event], metric: str, sign: int) -> tuple[int | None, float | None]:
    """As the loop keeps it: strictly better replaces, the earlier of equals stays; once it was tested, the tested."""
    evaluations = [event for event in events if event["event"] == "evaluation"]
    value = {e["round"]: e["metrics"].get(metric, {}).get("value") for e in evaluations if e["split"] == "val"}
    tests = [event for event in evaluations if event["split"] == "test"]
    if tests:
        return tests[-1]["round"], value.get(tests[-1]["round"])
    best: tuple[int | None, float | None] = (None, None)
    for number in sorted(n for n, v in value.items() if n > 0 and v is not None):
        if best[1] is None or sign * value[number] > sign * best[1]:
            best = number, value[number]
    return best


def check(db: Engine, id: int, folder: Path, metric: str = "loss", sign: int = -1) -> None:
    """Every question has the answer that the journal gives."""
    events = read_events(folder)
    assert read.events(db, id) == events
    row = read.run(db, id)
    of_kind = {kind: [e for e in events if e["event"] == kind] for kind in {e["event"] for e in events}}
    rounds = sorted(of_kind.get("round", []), key=lambda event: event["round"])
    assert row["done"] == len(rounds)
    assert row["attempts"] == len(of_kind.get("start", []))
    assert row["warnings"] == len(of_kind.get("warning", [])) + len(of_kind.get("failed", []))
    assert row["dropped"] == len(dropped(events))
    if of_kind.get("start"):
        assert (row["best_round"], row["best_value"]) == best_by_hand(events, metric, sign)
    check_rounds(db, id, rounds)
    for split in ("val", "test"):
        check_split(db, id, events, split)
    lost = {(x.site, x.step, x.reason): x.rounds for x in lost_replies(events)}
    refused = [w for w in read.warnings(db, id) if w["kind"] == "refused"]
    assert {(w["site"], w["step"], w["reason"]): w["rounds"] for w in refused} == lost


def followed_at_once(store: str, folder: Path) -> None:
    """Several bring one journal in at the same time."""
    own = Store(folder, None)
    for number in range(30):
        own.add("round", round=number, trained=[], dropped=[{"site": "elsewhere", "reason": "no-reply"}], seconds=1.0)
    with ThreadPoolExecutor(4) as pool:
        engines = list(pool.map(lambda _: open_database(store), range(4)))
        ids = set(pool.map(lambda db: follow(db, folder), engines))
    [id] = ids
    assert id is not None
    check(engines[0], id, folder)
    for db in engines:
        db.dispose()


SHOWN = {"seed": "seed", "draw": "data.partition_seed", "rate": "train.learning_rate", "codec": "federation.codec"}
SHOWN |= {"compiled": "train.compile"}


def listed_by_settings(store: str, folder: Path) -> None:
    """The table of runs shows settings as they are and sorts numbers as numbers; a run that has lost its job.toml,
    and a setting that an earlier release did not have or kept as something else, break nothing."""
    jobs = [Job().replace(seed=seed) for seed in (9, 10, 2**31 - 1)]
    jobs[0] = jobs[0].replace(data__partition_seed=10**12, train__learning_rate=1e-5)
    jobs[1] = jobs[1].replace(federation__codec="bf16", train__compile=True, train__learning_rate=0.5)
    db = open_database(store)
    for number, job in enumerate([*jobs, None]):
        (folder / str(number)).mkdir(parents=True)
        if job is not None:
            (folder / str(number) / "job.toml").write_text(job.toml())
        Store(folder / str(number), None).add("start", name="of settings", job="", rounds=1, version="")
        assert follow(db, folder / str(number)) is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(query, "SETTINGS", SHOWN)

        def listed(sort: str) -> list[Any]:
            return [row[sort.strip("-")] for row in read.runs(db, sort=sort, filter={"search": "of settings"})[0]]

        assert listed("seed") == [9, 10, 2**31 - 1, None]
        assert listed("-seed") == [2**31 - 1, 10, 9, None]
        assert listed("-draw") == [10**12, 0, 0, None]
        assert listed("rate") == [1e-5, Job().train.learning_rate, 0.5, None]
        assert listed("codec") == ["bf16", "none", "none", None]
        assert listed("-compiled") == [True, False, False, None]
        with db.execution_options(write=True).begin() as connection:
            older = update(t.run).where(t.run.c.path.endswith("/2"))
            connection.execute(older.values(settings={"seed": "a word", "train.compile": None}))
        assert [row["seed"] for row in read.runs(db, filter={"search": "of settings"})[0]] == [None, "a word", 10, 9]
    db.dispose()


def check_rounds(db: Engine, id: int, rounds: list[Event]) -> None:
    given_ = read.rounds(db, id)
    assert [r["round"] for r in given_] == [e["round"] for e in rounds]
    for found, event in zip(given_, rounds, strict=True):
        assert (found["trained"], found["dropped"]) == (len(event["trained"]), len(event["dropped"]))
        assert (found["seconds"], found["repeated"]) == (event["seconds"], event.get("repeated", 0))
    grid = read.site_grid(db, id, first=0)
    assert grid["rounds"] == [e["round"] for e in rounds]
    for number, event in enumerate(rounds):
        last: dict[str, Any] = {row["site"]: row for row in [*event["trained"], *event["dropped"]]}
        for site, cells in zip(grid["sites"], grid["cells"], strict=True):
            cell, wanted = cells[number], last.get(site)
            assert (cell is None) == (wanted is None)
            if cell is not None and wanted is not None:
                assert cell["reason"] == wanted.get("reason")
                assert [cell[k] for k in ("weight", "steps", "images")] == [
                    wanted.get(k) for k in ("weight", "steps", "images")
                ]


def check_split(db: Engine, id: int, events: list[Event], split: str) -> None:
    """The courses that the report draws."""
    for metric in ("auroc", "loss"):
        whole = [(e["round"], e["metrics"].get(metric)) for e in read.evaluations(db, id, split)]
        assert points(whole) == plainly(curve(events, metric, split))
        of_sites = read.site_metrics(db, id, split, [metric])
        for site in {name for e in events for name in e.get("site_images", {})} | set(of_sites):
            there = [e for e in events if e["event"] == "evaluation" and site in e["sites"]]
            found = [(e["round"], e["metrics"].get(metric)) for e in of_sites.get(site, [])]
            assert points(found) == plainly(curve(there, metric, split, site))
    tests = [e for e in events if e["event"] == "evaluation" and e["split"] == split]
    if tests and split == "test":
        kept = {name: value for name, value in tests[-1].get("sums", {}).items() if name in tests[-1]["sites"]}
        assert read.test_sums(db, id) == kept


def points(found: list[tuple[int, Any]]) -> list[str]:
    rows = [(n, *((row or {}).get(k) for k in ("value", "low", "high"))) for n, row in found]
    return plainly((math.nan if x is None else x for x in row) for row in rows)


def plainly(rows: Iterable[Iterable[float]]) -> list[str]:
    """Sortable although there is NaN; -0 is 0, which SQLite does not tell apart."""
    return sorted(repr(tuple(x + 0 for x in row)) for row in rows)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(journals)
def test_the_store_says_what_the_journal_says(happenings: list[Event]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        folder.mkdir()
        told(folder, happenings, "")
        assert not any("store was not written" in str(e.get("text")) for e in read_events(folder))
        db = open_database(Path(name) / "consilium.sqlite", create=False)
        id = read.find(db, folder)
        assert id is not None
        check(db, id, folder)
        followed = read.run(db, id)
        forget(db, id)
        again = follow(db, folder)  # the database was lost and is made anew
        assert again is not None
        check(db, again, folder)
        assert {k: v for k, v in read.run(db, again).items() if k != "id"} == {
            k: v for k, v in followed.items() if k != "id"
        }
        db.dispose()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(journals, st.data())
def test_a_journal_cut_anywhere_is_gone_on_with(happenings: list[Event], data: st.DataObject) -> None:
    """Killed in the middle of a line, at any byte: what was whole is there, and the next attempt goes on."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        folder.mkdir()
        told(folder, happenings, None)
        journal = folder / "rounds.jsonl"
        whole = journal.read_bytes()
        # A share, not a number: times have more digits or fewer, and so has the journal.
        journal.write_bytes(whole[: round(data.draw(st.floats(0, 1)) * len(whole))])
        db = open_database(Path(name) / "consilium.sqlite")
        follow(db, folder)
        Store(folder).add("warning", text="resumed")
        id = read.find(db, folder)
        assert id is not None
        check(db, id, folder)
        db.dispose()


@pytest.mark.parametrize("line", ['{"event": 3}', "[1]", "null", "", "{}"])
def test_lines_that_are_no_events_are_passed_over_by_both(line: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    Store(folder).add("start", name="x", job="", rounds=1, version="")
    with (folder / "rounds.jsonl").open("a") as file:
        file.write(line + "\n")
    Store(folder).add("finish", seconds=1.0)
    db = open_database(tmp_path / "consilium.sqlite", create=False)
    id = read.find(db, folder)
    assert id is not None
    assert [event["event"] for event in read_events(folder)] == ["start", "finish"]
    assert read.events(db, id) == read_events(folder)

"""The store with 500 runs of 100 rounds at 50 sites: how long each question of the dashboard takes, in what memory.

    python -m benchmarks.store [--runs 500] [--rounds 100] [--sites 50] [--store URL] [--keep FOLDER]

Journals are invented, followed as a run's are, and thrown away. Then another process, that has the store only, asks.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from server.database import read
from server.database.engine import STORE, open_database
from server.database.write import follow
from shared.config import Job

METRICS = ("auroc", "balanced_accuracy", "accuracy", "loss")
BINS = 2000  # of the two score histograms that a site sends
LIMIT = 0.3  # seconds that a question may take


def events(number: int, rounds: int, sites: int) -> Iterator[dict[str, Any]]:
    """What a run of ``rounds`` with local differential privacy at ``sites`` tells; 2 % of the replies are dropped."""
    draw = random.Random(number)
    names = [f"hospital-{place:03}" for place in range(sites)]
    begun = 1.7e9 + 86400.0 * number
    clock = iter(range(10**9))

    def event(kind: str, **facts: Any) -> dict[str, Any]:
        return {"event": kind, "time": begun + 20.0 * next(clock), **facts}

    def figures(n: int) -> dict[str, Any]:
        rows = {}
        for name in METRICS:
            value = draw.random()
            rows[name] = {"value": value, "low": value - 0.02, "high": value + 0.02, "n": n}
        return rows

    def evaluation(round_: int, split: str) -> dict[str, Any]:
        there = [name for name in names if draw.random() > 0.02]
        facts: dict[str, Any] = {"sites": {name: figures(120) for name in there}, "metrics": figures(120 * len(there))}
        facts |= {"site_images": dict.fromkeys(there, 120), "images": 120 * len(there)}
        facts["dropped"] = [{"site": name, "reason": "no-reply"} for name in names if name not in there]
        if split == "test":
            bins = [[draw.randrange(3) if draw.random() < 0.1 else 0 for _ in range(2 * BINS)] for _ in range(8)]
            facts["sums"] = {name: {"n": 120, "histogram": draw.choice(bins), "loss": 55.5} for name in there}
        return event("evaluation", round=round_, split=split, **facts)

    def round_(number: int) -> dict[str, Any]:
        there = {name: draw.random() > 0.02 for name in names}
        own = {"weight": 800.0, "steps": 10, "images": 320}
        trained = [
            {"site": name, **own, "loss": 320 * draw.random(), "epsilon": 0.05 * number}
            for name in names
            if there[name]
        ]
        dropped = [{"site": name, "reason": "no-reply"} for name in names if not there[name]]
        moved = {name: [400_000, 400_000 if there[name] else 0] for name in names}
        return event("round", round=number, trained=trained, dropped=dropped, seconds=18.5, bytes=moved)

    places = [
        {"node": 2**63 + place, "name": name, "images": {"train": 800, "val": 120, "test": 120}}
        | {"classes": [500, 300], "skipped": 2}
        for place, name in enumerate(names)
    ]
    yield event("start", job="0" * 64, name=f"job {number}", rounds=rounds, version="1") | {"run": f"run-{number}"}
    yield event("survey", sites=places, dropped=[])
    yield evaluation(0, "val")
    for count in range(1, rounds + 1):
        yield round_(count)
        if count % 10 == 0:
            yield evaluation(count, "val")
    yield evaluation(rounds, "test")
    yield event("warning", text="a warning")
    yield event("finish", seconds=20.0 * rounds)


def fill(store: str, base: Path, runs: int, rounds: int, sites: int) -> float:
    """Follow the journals of so many runs; gives the seconds without inventing them."""
    db, spent = open_database(store), 0.0
    settings = {"privacy__dp": "local", "privacy__epsilon": 8.0, "train__class_weights": "none"}
    job = Job().replace(**settings, federation__rounds=rounds).toml()
    for number in range(runs):
        folder = base / f"run-{number}"
        folder.mkdir()
        (folder / "job.toml").write_text(job)
        with (folder / "rounds.jsonl").open("w") as file:
            file.writelines(json.dumps(event) + "\n" for event in events(number, rounds, sites))
        begun = time.monotonic()
        follow(db, folder)
        spent += time.monotonic() - begun
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
        if number % 50 == 49:
            print(f"{number + 1} runs, {spent:.0f} s", flush=True)
    db.dispose()
    return spent


def ask(store: str, runs: int) -> None:
    """Time every question on runs here and there, and print the table."""
    before = _peak()
    db = open_database(store, create=False)
    ids = [row["id"] for row in read.runs(db, limit=runs)[0]]
    some = random.Random(0).sample(ids, min(15, len(ids)))
    whole: dict[str, Callable[[], object]] = {
        "runs, newest 50": lambda: read.runs(db),
        "runs, best test figure": lambda: read.runs(db, sort="-test_value"),
        "runs, search": lambda: read.runs(db, filter={"search": "job 4"}),
        "sites of the federation": lambda: read.sites(db),
    }
    of_run: dict[str, Callable[[int], object]] = {
        "run": lambda id: read.run(db, id),
        "rounds": lambda id: read.rounds(db, id),
        "site_grid": lambda id: read.site_grid(db, id),
        "evaluations": lambda id: read.evaluations(db, id),
        "site_metrics, one": lambda id: read.site_metrics(db, id, metrics=["auroc"]),
        "site_metrics, all": lambda id: read.site_metrics(db, id),
        "test_sums": lambda id: read.test_sums(db, id),
        "privacy": lambda id: read.privacy(db, id),
        "timings": lambda id: read.timings(db, id),
        "warnings": lambda id: read.warnings(db, id),
        "surveyed": lambda id: read.surveyed(db, id),
    }
    print(f"load of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print("| question | median, ms | slowest, ms | processor, median, ms |\n|---|---|---|---|")
    worst = 0.0
    for name, question in whole.items():
        worst = max(worst, _row(name, [_time(question) for _ in range(5)]))
    for name, of in of_run.items():
        worst = max(worst, _row(name, [_time(lambda id=id, of=of: of(id)) for id in some]))
    print(f"peak memory of the process that asked: {_peak():.0f} MiB; before the first: {before:.0f}")
    print(f"slowest median: {1000 * worst:.0f} ms; allowed {1000 * LIMIT:.0f} ms")
    if worst > LIMIT:
        raise SystemExit(1)


def _peak() -> float:
    """MiB that this process had in memory at most; getrusage would count what it was forked from."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def _time(question: Callable[[], object]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    question()
    return time.perf_counter() - wall, time.process_time() - cpu


def _row(name: str, seconds: list[tuple[float, float]]) -> float:
    walls, cpus = zip(*seconds, strict=True)
    figures = statistics.median(walls), max(walls), statistics.median(cpus)
    print(f"| {name} | {' | '.join(f'{1000 * figure:.1f}' for figure in figures)} |", flush=True)
    return figures[0]


def main() -> None:
    """Fill, then ask in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    for name, default in (("runs", 500), ("rounds", 100), ("sites", 50)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--store", default="")
    parser.add_argument("--keep", type=Path, help="a folder for the SQLite file, which is asked again if it is there")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        base = given.keep or Path(temporary)
        base.mkdir(parents=True, exist_ok=True)
        store = given.store or str(base / STORE)
        if given.store or not Path(store).exists():
            seconds = fill(store, base, given.runs, given.rounds, given.sites)
            events_ = given.runs * (given.rounds + given.rounds // 10 + 6)
            print(f"filled in {seconds:.0f} s, {1000 * seconds / events_:.1f} ms an event")
        if not given.store:
            print(f"SQLite file: {Path(store).stat().st_size / 2**20:.0f} MiB")
        asking = multiprocessing.get_context("spawn").Process(target=ask, args=(store, given.runs))
        asking.start()
        asking.join()
        raise SystemExit(asking.exitcode)


if __name__ == "__main__":
    main()

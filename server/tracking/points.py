"""The figures of a run as (name, step, time, value): what every tool that follows a run understands."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from sqlalchemy import Engine

from server.database import read
from server.timing import PARTS


class Point(NamedTuple):
    """A figure: its name as in ``val/auroc``, the round, when (seconds since 1970), the value, always finite."""

    name: str
    step: int
    time: float
    value: float


def points(db: Engine, id: int) -> list[Point]:
    """Every figure of a run, by round: metrics of validation and test with their intervals, of all sites and of each;
    loss, seconds and their parts, bytes, sites used and not; epsilon of each site."""
    found = [*_rounds(db, id), *_evaluations(db, id), *_sites(db, id), *_privacy(db, id)]
    return sorted(point for point in found if math.isfinite(point.value))


def _point(name: str, row: dict[str, Any], value: float | None) -> Iterator[Point]:
    if value is not None:
        yield Point(name, int(row["round"]), float(row["time"]), float(value))


def _rounds(db: Engine, id: int) -> Iterator[Point]:
    parts = {row["round"]: row for row in read.timings(db, id)["rounds"]}
    names = {"loss": "train/loss", "trained": "sites/used", "dropped": "sites/not_used"}
    names |= {"seconds": "seconds/round", "down": "bytes/to_sites", "up": "bytes/from_sites"}
    for row in read.rounds(db, id):
        for key, name in names.items():
            yield from _point(name, row, row[key])
        for part in PARTS:
            yield from _point(f"seconds/{part}", row, parts[row["round"]][part])


def _evaluations(db: Engine, id: int) -> Iterator[Point]:
    for row in read.evaluations(db, id):
        places = {row["split"]: row["metrics"]}
        if row["server"]:
            places[f"{row['split']}/server"] = row["server"]["metrics"]
        for place, metrics in places.items():
            for metric, figure in metrics.items():
                for end, key in (("", "value"), ("/low", "low"), ("/high", "high")):
                    yield from _point(f"{place}/{metric}{end}", row, figure[key])


def _sites(db: Engine, id: int) -> Iterator[Point]:
    times = {(row["split"], row["round"]): row["time"] for row in read.evaluations(db, id)}
    for split in ("val", "test"):
        for site, rows in read.site_metrics(db, id, split).items():
            for row in rows:
                when = {"round": row["round"], "time": times[split, row["round"]]}
                for metric, figure in row["metrics"].items():
                    yield from _point(f"{split}/{metric}/site/{site}", when, figure["value"])


def _privacy(db: Engine, id: int) -> Iterator[Point]:
    times = {row["round"]: row["time"] for row in read.rounds(db, id)}
    for site, course in read.privacy(db, id)["course"].items():
        for number, epsilon in course:
            yield from _point(f"epsilon/{site or 'all'}", {"round": number, "time": times[number]}, epsilon)

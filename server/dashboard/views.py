"""What the pages need beyond the store's own answers: words for metrics and reasons, fairness, a compact grid."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Engine, func, select

from server.coverage import able_sites, whose_course
from server.database import read
from server.database import schema as t
from server.record import count, reason_words
from server.wording import metric_name, wording
from shared.config import job_from_flat
from shared.errors import UserError
from shared.tasks import TASKS
from shared.weights import whole

Row = dict[str, Any]


class Sites:
    """``read.sites``, asked again only when there is something new: over many runs it is the slowest question."""

    def __init__(self, db: Engine) -> None:
        self.db = db
        self._lock = threading.Lock()
        self._state: Any = None
        self._rows: list[Row] = []

    def rows(self) -> list[Row]:
        """The sites, each row with ``settings``, the job of its last run. Not to be changed."""
        newest = select(func.max(t.event.c.id), select(func.count()).select_from(t.run).scalar_subquery())
        with self._lock:
            with self.db.connect() as connection:
                state = tuple(connection.execute(newest).one())
            if state != self._state:
                rows = read.sites(self.db)
                jobs = {id: read.run(self.db, id)["settings"] for id in {row["last_run"] for row in rows}}
                self._rows = [row | {"settings": jobs[row["last_run"]]} for row in rows]
                self._state = state
            return self._rows


def direction(task: str, metric: str) -> int:
    """1 where more of the metric is better, -1 where less is."""
    return TASKS[task].metrics.get(metric.partition(":")[0], 1) if task in TASKS else 1


def metric_words(task: str, names: Iterable[str]) -> list[Row]:
    """How each metric is called and written: key, name, figures (not a share but a measure), direction."""
    return [
        {"key": key, "name": metric_name(key, start=True)}
        | {"figures": wording(key).figures, "direction": direction(task, key)}
        for key in names
    ]


def metrics_of(evaluations: Iterable[Mapping[str, Any]], first: str) -> list[str]:
    """The names of all metrics that there are, the one that picks the model first."""
    found = dict.fromkeys(name for row in evaluations for name in row["metrics"])
    return sorted(found, key=lambda name: name != first)


def whose(db: Engine, row: Row) -> dict[str, str]:
    """Of whom a run's figures of validation and of test are, in words; see ``server.coverage``."""
    places = [{"name": one["name"], "images": one} for one in read.surveyed(db, row["id"]) if one["reason"] is None]
    case = TASKS[row["task"]].case if row["task"] in TASKS else "image"
    try:
        common = whole(job_from_flat(row["settings"]))
    except UserError:  # of another release, or a folder that has lost its job
        common = True
    found = {}
    for split in ("val", "test"):
        told = read.told(db, row["id"], split)
        n = told[-1][1] if told else 0
        sites = [names for names, _ in (told[-1:] if split == "test" else told)]
        found[split] = whose_course(sites, able_sites(places, split, common), count(n, case))
    return found


def fairness(sites: Mapping[str, Sequence[Mapping[str, Any]]], metric: str, better: int) -> Row | None:
    """How far the sites lie apart at the last evaluation: ``worst`` and ``best`` site, ``spread`` between them.

    None where fewer than two sites have a figure.
    """
    last: list[Row] = []
    number = max((rows[-1]["round"] for rows in sites.values() if rows), default=None)
    for name, rows in sites.items():
        if rows and rows[-1]["round"] == number:
            figure = rows[-1]["metrics"].get(metric) or {}
            if figure.get("value") is not None and math.isfinite(figure["value"]):
                last.append({"site": name, "images": rows[-1]["images"], **figure})
    if len(last) < 2:
        return None
    last.sort(key=lambda row: (better * row["value"], row["site"]))
    return {"round": number, "worst": last[0], "best": last[-1], "sites": last} | {
        "spread": abs(last[-1]["value"] - last[0]["value"])
    }


def cross_site(db: Engine, row: Row, metric: str) -> Row | None:
    """The metric of the run's model and of its sites' own models at every site: {model: {site: figure}}."""
    models = {"federated": row["id"]}
    models |= {f"only {_site_of(one['path'])}": one["id"] for one in row["children"] if one["kind"] == "local"}
    if len(models) < 2:
        return None
    found: Row = {}
    for name, id in models.items():
        sites = read.site_metrics(db, id, "test", [metric])
        found[name] = {site: rows[-1]["metrics"].get(metric) for site, rows in sites.items()}
    return found


def _site_of(path: str) -> str:
    return path.rpartition("/")[2].removeprefix("local-")


CELL = ("images", "loss", "epsilon", "seconds")


def compact_grid(grid: Mapping[str, Any]) -> Row:
    """``read.site_grid`` for the page: each reason once, each cell [number of its reason or -1, *CELL], or None."""
    reasons: dict[str, int] = {}

    def cell(given: Mapping[str, Any] | None) -> list[Any] | None:
        if given is None:
            return None
        reason = given["reason"]
        return [-1 if reason is None else reasons.setdefault(reason, len(reasons)), *(given[name] for name in CELL)]

    cells = [[cell(given) for given in row] for row in grid["cells"]]
    words = [{"code": reason, "words": reason_words(reason)} for reason in reasons]
    return {"sites": grid["sites"], "rounds": grid["rounds"], "cells": cells, "reasons": words}


def with_words(rows: Iterable[Row]) -> list[Row]:
    """Warnings with ``words``: the reason of a reply that was not used, as people say it."""
    return [row | {"words": reason_words(row["reason"])} if row["kind"] == "refused" else row for row in rows]


def class_counts(counts: Sequence[int] | None, settings: Mapping[str, Any]) -> list[Row] | None:
    """Training images of each class, as far as the site tells: small cells it keeps to itself, they come as 0."""
    if not counts:
        return None
    names = [name.strip() for name in str(settings.get("data.classes", "")).split(",")]
    if len(names) != len(counts):
        names = [f"class {number}" for number in range(1, len(counts) + 1)]
    return [{"name": name, "images": count} for name, count in zip(names, counts, strict=True)]

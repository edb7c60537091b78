"""The questions that the dashboard, the reports and the commands ask of the store.

``db`` is an engine of ``server.database.engine.open_database``; ``id`` a run's. Rows are dicts of plain values, ready
for JSON; times are seconds since 1970, NaN is None. A run that is not there raises ``UserError``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, case, func, or_, select

from server.database import schema as t
from server.database.journal import key_of
from server.database.query import (
    LISTED,
    LOST,
    Row,
    beside,
    evaluated,
    exists,
    figures_of,
    plain,
    run_column,
    run_row,
    sorted_by,
    spent,
)
from server.database.query import events as events
from server.database.sites import sites as sites
from server.timing import split_time


def runs(
    db: Engine,
    limit: int = 50,
    offset: int = 0,
    sort: str = "-started",
    filter: Mapping[str, Any] | None = None,
    states: Mapping[int, str] | None = None,
) -> tuple[list[Row], int]:
    """Runs as rows of ``schema.run`` (without ``settings``) with ``lost_training`` and ``lost_evaluations``, the
    replies that were not used by what was asked for, and the settings of ``query.SETTINGS``; and how many runs there
    are in all.

    ``sort`` is one of ``query.sortable``, with ``-`` from the largest; missing values come last. ``filter`` holds
    columns and the value that each must have; of ``search`` the job's name or the path must contain it. Unless it
    names ``parent`` or ``kind``, baselines and reference networks are left out. ``states`` holds what somebody knows
    better than the journals of these runs, by their ids: it takes the place of ``status``.

    Raises:
        UserError: no such column.
    """
    known = dict(states or {})
    status = case(known, value=t.run.c.id, else_=t.run.c.status) if known else t.run.c.status
    by = sort.removeprefix("-")
    column: Any = status if by == "status" else sorted_by(by)
    wanted = dict(filter or {})
    if not {"parent", "kind"} & set(wanted):
        wanted["kind"] = "federated"
    asked = []
    if search := str(wanted.pop("search", "")):
        asked.append(or_(*(c.icontains(search, autoescape=True) for c in (t.run.c.name, t.run.c.path))))
    for name, value in wanted.items():
        held = status if name == "status" else run_column(name)
        asked.append(held.in_(value) if isinstance(value, (list, tuple)) else held == value)
    order = column.desc() if sort.startswith("-") else column.asc()
    listed = (
        select(*LISTED, *beside())
        .where(*asked)
        .order_by(order.nulls_last(), t.run.c.id.desc())
        .limit(limit)
        .offset(offset)
    )
    with db.connect() as connection:
        total = connection.scalar(select(func.count()).select_from(t.run).where(*asked))
        rows = plain(connection, listed)
    rows = [row | {name: int(row[name]) for name in LOST} for row in rows]  # PostgreSQL sums to decimals
    return [row | {"status": known.get(row["id"], row["status"])} for row in rows], int(total or 0)


def run(db: Engine, id: int) -> Row:
    """All of a run's row with ``settings``, and ``children``: the rows of its baselines and its reference network."""
    with db.connect() as connection:
        found = run_row(connection, id)
        inner = select(*LISTED).where(t.run.c.parent == id).order_by(t.run.c.path)
        return found | {"children": plain(connection, inner)}


def find(db: Engine, folder: Path) -> int | None:
    """The id of the run in a folder, by the key in its journal; None where the store does not know it."""
    with db.connect() as connection:
        found: int | None = connection.scalar(select(t.run.c.id).where(t.run.c.key == key_of(folder)))
        return found


def rounds(db: Engine, id: int) -> list[Row]:
    """The training rounds: round, time, seconds, trained, dropped (numbers of sites), images, loss (mean per image),
    down, up (bytes), repeated, and as far as the run has them ``central`` and ``secure`` as in the journal."""
    totals = [t.round_.c[name] for name in ("seconds", "trained", "dropped", "images", "loss", "down", "up")]
    asked = (
        select(t.event.c.round, t.event.c.time, *totals, t.event.c.repeated, t.event.c.facts)
        .join_from(t.event, t.round_)
        .where(t.event.c.run == id, t.event.c.kind == "round")
        .order_by(t.event.c.round)
    )
    with db.connect() as connection:
        exists(connection, id)
        found = plain(connection, asked)
    for row in found:
        facts = row.pop("facts")
        row |= {name: facts[name] for name in ("central", "secure") if name in facts}
    return found


_CELL = ("reason", "weight", "steps", "images", "loss", "epsilon", "seconds", "down", "up")


def site_grid(db: Engine, id: int, first: int = 1, last: int | None = None) -> Row:
    """Who trained when: ``sites`` (names), ``rounds`` (numbers) and ``cells``, a list a site with a cell a round.

    A cell is None where the site was not asked, else {reason, weight, steps, images, loss (per image), epsilon,
    seconds, down, up}; ``reason`` is None where the site's reply was used.
    """
    within = [t.event.c.run == id, t.event.c.kind == "round", t.event.c.round >= first]
    within += [t.event.c.round <= last] if last is not None else []
    asked = select(t.event.c.round, t.site_round.c.site, *(t.site_round.c[name] for name in _CELL))
    asked = asked.join_from(t.event, t.site_round).where(*within).order_by(t.event.c.round, t.site_round.c.position)
    with db.connect() as connection:
        exists(connection, id)
        rows = connection.execute(asked).all()
        known = connection.scalars(select(t.site.c.name).where(t.site.c.run == id).order_by(t.site.c.name)).all()
        numbers = connection.scalars(select(t.event.c.round).where(*within).order_by(t.event.c.round)).all()
    names = sorted({*known, *(row[1] for row in rows)})
    place, number = {name: i for i, name in enumerate(names)}, {n: i for i, n in enumerate(numbers)}
    cells: list[list[Row | None]] = [[None] * len(numbers) for _ in names]
    for round_, site, *values in rows:
        cell = dict(zip(_CELL, values, strict=True))
        cell["loss"] = cell["loss"] / cell["images"] if cell["loss"] is not None and cell["images"] else None
        cells[place[site]][number[round_]] = cell
    return {"sites": names, "rounds": list(numbers), "cells": cells}


def evaluations(db: Engine, id: int, split: str | None = None) -> list[Row]:
    """Evaluations of the global model over all sites, in the order of rounds: round, time, split, images, metrics
    ({name: {value, low, high, n}}), dropped ([{site, reason}]), server ({images, metrics} or None)."""
    places = select(
        t.evaluation.c.event, *(t.evaluation.c[n] for n in ("position", "place", "site", "images", "reason"))
    )
    places = places.join_from(t.event, t.evaluation).where(*evaluated(id, split), t.evaluation.c.place != "site")
    spine = select(t.event.c.id, t.event.c.round, t.event.c.time, t.event.c.split).where(*evaluated(id, split))
    whole = or_(t.metric.c.position == 0, t.evaluation.c.place == "server")
    with db.connect() as connection:
        exists(connection, id)
        events = connection.execute(spine.order_by(t.event.c.round, t.event.c.seq)).all()
        found: dict[int, Row] = {
            row.id: {"round": row.round, "time": row.time, "split": row.split, "images": None, "metrics": {}}
            | {"dropped": [], "server": None}
            for row in events
        }
        figures = figures_of(connection, [*evaluated(id, split), whole])
        for row in connection.execute(places.order_by(t.evaluation.c.event, t.evaluation.c.position)):
            own, metrics = found[row.event], figures.get((row.event, row.position), {})
            if row.place == "all":
                own |= {"images": row.images, "metrics": metrics}
            elif row.place == "server":
                own["server"] = {"images": row.images, "metrics": metrics}
            else:
                own["dropped"].append({"site": row.site, "reason": row.reason})
    return list(found.values())


def told(db: Engine, id: int, split: str) -> list[tuple[list[str], int]]:
    """The sites whose figures each evaluation is of, and how many images, in the order of rounds."""
    asked = select(t.event.c.id, t.evaluation.c.place, t.evaluation.c.site, t.evaluation.c.images)
    asked = asked.join_from(t.event, t.evaluation).where(*evaluated(id, split))
    found: dict[int, tuple[list[str], int]] = {}
    with db.connect() as connection:
        for event, place, site, images in connection.execute(asked.order_by(t.event.c.round, t.event.c.seq)):
            names, n = found.get(event, ([], 0))
            found[event] = (names + [site] * (place == "site"), int(images or 0) if place == "all" else n)
    return list(found.values())


def site_metrics(db: Engine, id: int, split: str = "val", metrics: Sequence[str] | None = None) -> dict[str, list[Row]]:
    """The global model at each site: {site: [{round, images, metrics}]}, of ``metrics`` or of all."""
    within = [*evaluated(id, split), t.evaluation.c.place == "site"]
    asked = select(t.event.c.round, t.evaluation.c.event, t.evaluation.c.position, t.evaluation.c.site)
    asked = asked.add_columns(t.evaluation.c.images).join_from(t.event, t.evaluation).where(*within)
    found: dict[str, list[Row]] = {}
    with db.connect() as connection:
        exists(connection, id)
        figures = figures_of(connection, within, metrics)
        for row in connection.execute(asked.order_by(t.evaluation.c.site, t.event.c.round, t.event.c.seq)):
            of_site = {"round": row.round, "images": row.images, "metrics": figures.get((row.event, row.position), {})}
            found.setdefault(row.site, []).append(of_site)
    return found


def test_sums(db: Engine, id: int) -> dict[str, Row]:
    """The sums that each site sent of its test images, at the last test."""
    last = select(func.max(t.event.c.seq)).where(*evaluated(id, "test")).scalar_subquery()
    asked = select(t.evaluation.c.site, t.evaluation.c.sums).join_from(t.event, t.evaluation)
    asked = asked.where(t.event.c.run == id, t.event.c.seq == last, t.evaluation.c.place == "site")
    with db.connect() as connection:
        exists(connection, id)
        rows = connection.execute(asked.order_by(t.evaluation.c.position)).all()
    return {row.site: row.sums for row in rows if row.sums is not None}


def privacy(db: Engine, id: int) -> Row:
    """What differential privacy the run gave: ``spent`` as ``server.spent.privacy_spent`` ({} without), ``allowed``
    (the job's epsilon, None where the job gives noise instead) and ``course``: {site or "": [[round, epsilon], …]},
    of "" all sites together."""
    settings = run(db, id)["settings"]
    told = select(t.site_round.c.site, t.event.c.round, t.site_round.c.epsilon).join_from(t.event, t.site_round)
    told = told.where(t.event.c.run == id, t.event.c.kind == "round", t.site_round.c.epsilon.is_not(None))
    course: dict[str, list[list[Any]]] = {}
    with db.connect() as connection:
        for site, number, epsilon in connection.execute(told.order_by(t.site_round.c.site, t.event.c.round)):
            course.setdefault(site, []).append([number, epsilon])
    central = [[row["round"], row["central"]["epsilon"]] for row in rounds(db, id) if "central" in row]
    allowed = settings.get("privacy.epsilon") or None
    return {"spent": spent(db, id), "allowed": allowed, "course": course | ({"": central} if central else {})}


def last_facts(db: Engine, id: int, kind: str, split: str | None = None) -> Row:
    """What the last event of a kind (and split) says beside what has tables of its own; {} where there is none."""
    own = [t.event.c.run == id, t.event.c.kind == kind] + ([t.event.c.split == split] if split is not None else [])
    asked = select(t.event.c.round, t.event.c.facts).where(*own).order_by(t.event.c.seq.desc()).limit(1)
    with db.connect() as connection:
        exists(connection, id)
        row = connection.execute(asked).first()
    return {} if row is None else {"round": row.round, **row.facts}


def _parts(db: Engine, id: int) -> dict[int, Row]:
    """Training, transfer and waiting of every round; see ``server.timing``."""
    asked = select(t.event.c.round, t.round_.c.seconds.label("lasted"), t.site_round.c.seconds, t.site_round.c.more)
    asked = asked.select_from(t.event).join(t.round_, t.round_.c.event == t.event.c.id)
    asked = asked.join(t.site_round, t.site_round.c.event == t.event.c.id)
    asked = asked.where(t.event.c.run == id, t.event.c.kind == "round", t.site_round.c.reason.is_(None))
    rows: dict[tuple[int, float | None], list[Row]] = {}
    with db.connect() as connection:
        for number, lasted, took, more in connection.execute(asked):
            told = {"seconds": took, "train_seconds": (more or {}).get("train_seconds")}
            rows.setdefault((number, lasted), []).append(told)
    return {number: split_time(lasted, found) for (number, lasted), found in rows.items()}


def timings(db: Engine, id: int) -> Row:
    """``seconds`` of the run, ``rounds``: [{round, seconds, train, transfer, wait, down, up}], ``sites``: {name:
    {seconds, down, up}}; None where it was not told. ``train`` … ``wait`` are seconds as of ``server.timing``."""
    moved = [func.sum(t.site_round.c[name]).label(name) for name in ("seconds", "down", "up")]
    asked = select(t.site_round.c.site, *moved).join_from(t.event, t.site_round)
    asked = asked.where(t.event.c.run == id, t.event.c.kind == "round").group_by(t.site_round.c.site)
    names = ("round", "seconds", "down", "up")
    parts, unknown = _parts(db, id), split_time(None, [])
    of_rounds = [{name: row[name] for name in names} | parts.get(row["round"], unknown) for row in rounds(db, id)]
    with db.connect() as connection:
        sites = {row.pop("site"): _whole(row) for row in plain(connection, asked.order_by(t.site_round.c.site))}
    return {"seconds": run(db, id)["seconds"], "rounds": of_rounds, "sites": sites}


def warnings(db: Engine, id: int) -> list[Row]:
    """What somebody should know, the gravest first: {kind, time, text} of kind failed and warning, then of kind
    refused {kind, time (of the last), site, step (survey, round, val, test, personal, subgroups), reason, rounds}."""
    found = []
    for event in events(db, id, ["failed", "warning"]):
        text = str(event.get("text", event.get("reason", "")))
        found.append({"kind": event["event"], "time": event["time"], "text": text})
    found.sort(key=lambda row: row["kind"] != "failed")
    return found + _refused(db, id)


# Kinds of events of which the replies that were not used have no table of their own.
_STEPS = ("survey", "personal", "subgroups")


def _refused(db: Engine, id: int) -> list[Row]:
    """Replies that were not used, put together by site, step and reason; a survey's of those that never came in."""
    of_round = select(t.event.c.seq, t.event.c.time, t.event.c.round, t.site_round.c.site, t.site_round.c.reason)
    of_round = of_round.join_from(t.event, t.site_round).where(t.event.c.run == id, t.site_round.c.reason.is_not(None))
    split = select(t.event.c.seq, t.event.c.time, t.event.c.round, t.evaluation.c.site, t.evaluation.c.reason)
    split = split.add_columns(t.event.c.split).join_from(t.event, t.evaluation)
    split = split.where(t.event.c.run == id, t.evaluation.c.place == "dropped")
    with db.connect() as connection:
        rows = [(*row, "round") for row in connection.execute(of_round)]
        rows += [tuple(row) for row in connection.execute(split)]
        others = select(t.event).where(t.event.c.run == id, t.event.c.kind.in_(_STEPS), t.event.c.dropped > 0)
        there = select(t.site.c.name).where(t.site.c.run == id, t.site.c.reason.is_(None))
        came = set(connection.scalars(there))  # if not at first, then later
        for row in connection.execute(others):
            left = [item for item in row.facts["dropped"] if row.kind != "survey" or item["site"] not in came]
            for item in left:
                rows.append((row.seq, row.time, row.round or 0, item["site"], item["reason"], row.kind))
    found: dict[tuple[str, str, str], Row] = {}
    for _, time, number, site, reason, step in sorted(rows, key=lambda row: row[0]):
        new = {"kind": "refused", "time": time, "site": site, "step": step, "reason": reason, "rounds": []}
        group = found.setdefault((site, step, reason), new)
        group["time"] = time
        group["rounds"].append(number)
    return list(found.values())


def surveyed(db: Engine, id: int) -> list[Row]:
    """The sites of a run: name, node, train, val, test (images), classes, skipped, reason (None: it takes part)."""
    names = ("name", "node", "train", "val", "test", "classes", "skipped", "reason", "surveyed")
    asked = select(*(t.site.c[name] for name in names)).where(t.site.c.run == id).order_by(t.site.c.name)
    with db.connect() as connection:
        exists(connection, id)
        return plain(connection, asked)


def _whole(row: Row) -> Row:
    """PostgreSQL sums whole numbers to decimals."""
    return {name: value if value is None or isinstance(value, float) else int(value) for name, value in row.items()}

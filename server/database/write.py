"""Follows the journals: every line of ``rounds.jsonl`` that the database has not got yet, an event a transaction."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, Table, and_, delete, func, or_, select, update

from server.database import schema as t
from server.database.engine import base_of
from server.database.journal import Line, family, key_of, kind_of, lines, parent_of, runs_in, size, top_of
from server.database.migrate import alone
from server.database.rows import evaluation_rows, round_row, site_rows, surveyed_rows
from shared.config import load_job
from shared.errors import UserError
from shared.tasks import TASKS

Row = dict[str, Any]


def follow(db: Engine, folder: Path) -> int | None:
    """Bring the database up to the journal in ``folder``; gives the run's id, None where the journal has no event.

    Raises:
        UserError: the folder is a copy of another run that is there too.
        sqlalchemy.exc.SQLAlchemyError: the database cannot be written; what was written before is whole events.
    """
    folder = folder.resolve()
    if (key := key_of(folder)) is None:
        return None
    writer = db.execution_options(write=True)
    with writer.begin() as connection:
        alone(connection)
        id, done = _place(connection, folder, key, base_of(db))
    for line in lines(folder, done):
        with writer.begin() as connection:
            # Another process may have done the same meanwhile: whoever comes second finds it done.
            at = connection.scalar(select(t.run.c.journal).where(t.run.c.id == id).with_for_update())
            if at is not None and at <= line.begin:
                _apply(connection, id, line, folder)
    return id


def take_in(db: Engine, folder: Path) -> tuple[list[Path], list[str]]:
    """Bring in every run of a run folder, or of a folder of run folders: those that had news, and what was wrong."""
    with db.connect() as connection:
        known = {row.path: row.journal for row in connection.execute(select(t.run.c.path, t.run.c.journal))}
    news, wrong = [], []
    for found in runs_in(folder.resolve()):
        path = _named(found, base_of(db))
        if path in known and known[path] == size(found):
            continue
        try:
            id = follow(db, found)
        except UserError as error:
            wrong.append(str(error))
            continue
        with db.connect() as connection:
            if connection.scalar(select(t.run.c.journal).where(t.run.c.id == id)) != known.get(path):
                news.append(found)
    return news, wrong


def forget(db: Engine, id: int) -> None:
    """Take a run out of the store, with its baselines; its folder stays as it is."""
    with db.execution_options(write=True).begin() as connection:
        connection.execute(delete(t.run).where(t.run.c.id == id))


# ---------------------------------------------------------------------- the run's row


def _place(connection: Connection, folder: Path, key: str, base: Path | None) -> tuple[int, int]:
    """The run's row, made where there is none: its id, and how far the journal is in."""
    path = _named(folder, base)
    there = connection.execute(select(t.run).where(t.run.c.key == key).with_for_update()).one_or_none()
    if there is not None and there.journal > size(folder):
        connection.execute(delete(t.run).where(t.run.c.id == there.id))  # it was cut short: begin again
        there = None
    if there is not None:
        if there.path != path:
            _moved(connection, there.id, there.path, folder, key, base)
        return there.id, there.journal
    _make_room(connection, path, folder, base)
    above = parent_of(folder)
    parent = None
    if above is not None and (named := key_of(above)) is not None:
        parent, _ = _place(connection, above, named, base)
    first = next(lines(folder)).event  # there is one: it has given the key
    row = _EMPTY | {"key": key, "path": path, "parent": parent, "kind": kind_of(folder)}
    row |= {"started": first["time"], "updated": first["time"]}
    id = _inserted(connection, t.run, row)
    # Baselines may have begun before it.
    inner = and_(t.run.c.path.startswith(path + "/", autoescape=True), t.run.c.parent.is_(None))
    connection.execute(update(t.run).where(inner).values(parent=id))
    return id, 0


_EMPTY: Row = {
    **dict.fromkeys(("name", "task", "model", "job", "version", "metric", "reason"), ""),
    **dict.fromkeys(("journal", "direction", "rounds", "attempts", "done", "sites", "dropped", "warnings"), 0),
    "status": "running",
    "settings": {},
    "seconds": 0.0,
}


def _named(folder: Path, base: Path | None) -> str:
    """What a run folder is called in the database: from the database's own folder where it lies in that."""
    return folder.relative_to(base).as_posix() if base and folder.is_relative_to(base) else folder.as_posix()


def _moved(connection: Connection, id: int, old: str, folder: Path, key: str, base: Path | None) -> None:
    before = (base or Path()) / old
    if old and before != folder and key_of(before) == key:
        raise UserError(f"{folder}: is a copy of the run in {before}, which is in the store already")
    new = _named(folder, base)
    _make_room(connection, new, folder, base)
    connection.execute(update(t.run).where(t.run.c.id == id).values(path=new))


def _make_room(connection: Connection, path: str, folder: Path, base: Path | None) -> None:
    """Runs that lay here before were moved aside, with what belongs to them, or are gone: then they keep no path."""
    within = or_(t.run.c.path == path, t.run.c.path.startswith(path + "/", autoescape=True))
    stale = connection.execute(select(t.run.c.id, t.run.c.key, t.run.c.path).where(within)).all()
    if not stale:
        return
    here = {key_of(found) for found in family(folder)}
    beside = {key_of(found): found for near in _siblings(top_of(folder)) for found in family(near)}
    for row in stale:
        if row.key not in here:
            found = beside.get(row.key)
            new = _named(found, base) if found else ""
            connection.execute(update(t.run).where(t.run.c.id == row.id).values(path=new))


def _siblings(folder: Path) -> Iterator[Path]:
    return (near for near in folder.parent.iterdir() if near.is_dir() and near != folder)


# ---------------------------------------------------------------------- one event


def _apply(connection: Connection, id: int, line: Line, folder: Path) -> None:
    event = dict(line.event)
    kind, time = str(event.pop("event")), float(event.pop("time"))
    spine: Row = {"run": id, "seq": line.begin, "kind": kind, "time": time, "repeated": 0, "round": None, "split": None}
    spine["dropped"] = len(event.get("dropped", []))
    if isinstance(event.get("round"), int):
        spine |= {"round": event.pop("round"), "split": event.pop("split", None)}
        spine["repeated"] = _replaced(connection, spine)
    changes: Row = {}
    children: list[tuple[Any, list[Row]]] = []
    if kind == "round":
        rows = site_rows(event)
        children = [(t.round_, [round_row(event, rows)]), (t.site_round, rows)]
    elif kind == "evaluation":
        places, metrics = evaluation_rows(event)
        children = [(t.evaluation, places), (t.metric, metrics)]
    elif kind == "survey":
        _survey(connection, id, line.event)
    elif kind == "start":
        changes = _started(line.event, folder)
    elif kind in ("failed", "finish"):
        changes = {"status": "failed" if kind == "failed" else "finished", "reason": str(event.get("reason", ""))}
    added = _inserted(connection, t.event, spine | {"facts": event})
    for table, rows in children:
        if rows:
            connection.execute(table.insert(), [{"event": added, **row} for row in rows])
    own = update(t.run).where(t.run.c.id == id)
    connection.execute(own.values(changes | {"journal": line.end, "updated": time, "seconds": time - t.run.c.started}))
    connection.execute(own.values(_summary(connection, id, kind)))


def _inserted(connection: Connection, table: Table, row: Row) -> int:
    key = connection.execute(table.insert().values(row)).inserted_primary_key
    assert key is not None
    return int(key[0])


def _replaced(connection: Connection, spine: Row) -> int:
    """Take the same round's earlier event out; gives how often it has been done before."""
    same = [t.event.c[name] == spine[name] for name in ("run", "kind", "round")]
    same.append(t.event.c.split == spine["split"] if spine["split"] is not None else t.event.c.split.is_(None))
    earlier = connection.execute(select(t.event.c.id, t.event.c.repeated).where(*same)).one_or_none()
    if earlier is None:
        return 0
    connection.execute(delete(t.event).where(t.event.c.id == earlier.id))
    return int(earlier.repeated) + 1


def _survey(connection: Connection, id: int, event: Row) -> None:
    rows = surveyed_rows(event)
    named = t.site.c.name.in_([row["name"] for row in rows])
    gone = or_(named, t.site.c.reason.is_(None))  # whoever takes part is named each time
    connection.execute(delete(t.site).where(t.site.c.run == id, gone))
    if rows:
        connection.execute(t.site.insert(), [{"run": id, **row} for row in rows])


def _started(event: Row, folder: Path) -> Row:
    """What the run's row says of its job; of a folder that has lost its job.toml, what the event itself says."""
    found: Row = {name: str(event.get(name, "")) for name in ("name", "job", "version")}
    found |= {"rounds": int(event.get("rounds", 0)), "status": "running", "reason": ""}
    found["attempts"] = t.run.c.attempts + 1
    try:
        job = load_job(folder / "job.toml")
    except UserError:
        return found
    direction = TASKS[job.task].metrics.get(job.best_metric, 1)
    found |= {"task": job.task, "model": job.model.name, "settings": job.flat()}
    return found | {"metric": job.best_metric, "direction": direction}


def _summary(connection: Connection, id: int, kind: str) -> Row:
    """What the table of runs shows, read again from the rows that an event of this kind has changed."""
    count, own = select(func.count()).select_from(t.event), t.event.c.run == id
    found: Row = {"dropped": connection.scalar(select(func.coalesce(func.sum(t.event.c.dropped), 0)).where(own))}
    if kind in ("warning", "failed"):
        found["warnings"] = connection.scalar(count.where(own, t.event.c.kind.in_(("warning", "failed"))))
    if kind == "round":
        found["done"] = connection.scalar(count.where(own, t.event.c.kind == kind))
    if kind == "survey":
        here = select(func.count()).select_from(t.site).where(t.site.c.run == id, t.site.c.reason.is_(None))
        found["sites"] = connection.scalar(here)
    if kind in ("start", "evaluation"):
        found |= _best(connection, id)
    return found


def _best(connection: Connection, id: int) -> Row:
    """The round that the run keeps: the one it was tested at; before that the best so far, the earlier of equals."""
    chosen = connection.execute(select(t.run.c.metric, t.run.c.direction).where(t.run.c.id == id)).one()
    whole = (
        select(t.event.c.round, t.metric.c.value, t.metric.c.low, t.metric.c.high, t.metric.c.n)
        .select_from(t.event)
        .outerjoin(
            t.metric,
            and_(t.metric.c.event == t.event.c.id, t.metric.c.position == 0, t.metric.c.name == chosen.metric),
        )
        .where(t.event.c.run == id, t.event.c.kind == "evaluation")
    )
    test = connection.execute(whole.where(t.event.c.split == "test").order_by(t.event.c.seq.desc()).limit(1)).first()
    val = whole.where(t.event.c.split == "val", t.metric.c.value.is_not(None))
    if test is not None:
        best = connection.execute(val.where(t.event.c.round == test.round)).first()
    else:
        order = ((t.metric.c.value * chosen.direction).desc(), t.event.c.round)
        best = connection.execute(val.where(t.event.c.round > 0).order_by(*order).limit(1)).first()
    found: Row = {"best_round": test.round if test else best.round if best else None}
    found["best_value"] = best.value if best else None
    names = ("value", "low", "high", "n")
    return found | {f"test_{name}": getattr(test, name) if test else None for name in names}

"""What the questions of ``server.database.read`` are made of, and a run's events given back as they came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Column, ColumnElement, Connection, Engine, Label, Numeric, Select, and_, cast, func, select

from server.database import schema as t
from server.database.rows import joined_evaluation, joined_round
from server.spent import privacy_spent
from shared.config import Job, job_from_flat
from shared.errors import UserError

Row = dict[str, Any]


def events(db: Engine, id: int, kinds: Sequence[str] = ()) -> list[Row]:
    """The run's events, of ``kinds`` or all, as ``server.store.read_events`` gives them from the journal."""
    own = [t.event.c.run == id] + ([t.event.c.kind.in_(kinds)] if kinds else [])
    with db.connect() as connection:
        exists(connection, id)
        spine = connection.execute(select(t.event).where(*own).order_by(t.event.c.seq)).all()
        seconds = select(t.round_.c.event, t.round_.c.seconds).join_from(t.event, t.round_).where(*own)
        lasted = {row.event: row.seconds for row in connection.execute(seconds)}
        trained = by_event(connection, t.site_round, own)
        places = by_event(connection, t.evaluation, own)
        figures: dict[int, dict[int, Row]] = {}
        for (event, position), metrics in figures_of(connection, own).items():
            figures.setdefault(event, {})[position] = metrics
    found = []
    for row in spine:
        event = {"event": row.kind, "time": row.time, **row.facts}
        if row.round is not None:
            event |= {"round": row.round} | ({} if row.split is None else {"split": row.split})
            event |= {"repeated": row.repeated} if row.repeated else {}
        if row.kind == "round":
            event = joined_round(event, lasted[row.id], trained.get(row.id, []))
        elif row.kind == "evaluation":
            event = joined_evaluation(event, places.get(row.id, []), figures.get(row.id, {}))
        found.append(event)
    return found


def spent(db: Engine, id: int) -> Row:
    """``server.spent.privacy_spent`` of the run, {} without differential privacy.

    It is asked with what it looks at of the rounds, not with all that a round holds.
    """
    own = [t.event.c.run == id, t.event.c.kind == "round"]
    told = select(t.site_round.c.event, t.site_round.c.site, t.site_round.c.epsilon).join_from(t.event, t.site_round)
    told = told.where(*own, t.site_round.c.epsilon.is_not(None))
    spine = select(t.event.c.id, t.event.c.repeated, t.event.c.facts).where(*own).order_by(t.event.c.seq)
    with db.connect() as connection:
        settings = run_row(connection, id)["settings"]
        found: dict[int, Row] = {
            row.id: {**row.facts, "repeated": row.repeated, "trained": []} for row in connection.execute(spine)
        }
        for event, site, epsilon in connection.execute(told.order_by(t.site_round.c.event, t.site_round.c.position)):
            found[event]["trained"].append({"site": site, "epsilon": epsilon})
    return privacy_spent(list(found.values()), job_from_flat(settings)) if settings else {}


LISTED = [column for column in t.run.c if column.name != "settings"]


def run_column(name: str) -> Column[Any]:
    """The column of this name in the table of runs.

    Raises:
        UserError: there is none that is listed.
    """
    if name not in t.run.c or name == "settings":
        raise UserError(f"{name!r}: runs have {', '.join(column.name for column in LISTED)}")
    return t.run.c[name]


# Replies that were not used, by what was asked for: names of columns and the kind of event that each counts.
LOST = {"lost_training": "round", "lost_evaluations": "evaluation"}


def lost(name: str) -> ColumnElement[int]:
    """How many replies of a kind were not used in the run of a row of the table of runs."""
    asked = select(func.coalesce(func.sum(t.event.c.dropped), 0))
    return asked.where(t.event.c.run == t.run.c.id, t.event.c.kind == LOST[name]).correlate(t.run).scalar_subquery()


# Settings of the job that the table of runs shows and sorts by, too: what the column is called, and the setting.
SETTINGS = {"seed": "seed"}


def beside() -> list[Label[Any]]:
    """What a row of the table of runs has beside the columns of ``schema.run``: of LOST and of SETTINGS."""
    # As JSON a setting comes back as what it is, whatever an earlier release kept there.
    settings = [t.run.c.settings[key].label(name) for name, key in SETTINGS.items()]
    return [*(lost(name).label(name) for name in LOST), *settings]


def sortable() -> list[str]:
    """Names of all that runs can be sorted by."""
    return [*(column.name for column in LISTED), *LOST, *SETTINGS]


def sorted_by(name: str) -> ColumnElement[Any]:
    """What runs are sorted by, of ``sortable``: a setting as the number or the word that it is.

    Raises:
        UserError: there is none of this name.
    """
    if name not in sortable():
        raise UserError(f"{name!r}: runs have {', '.join(sortable())}")
    if name in LOST:
        return lost(name)
    if name not in SETTINGS:
        return run_column(name)
    value = t.run.c.settings[SETTINGS[name]].as_string()
    # Numeric holds whole numbers of any length in PostgreSQL, too. A bool stays a word: true comes after false anyway.
    number = type(Job().flat()[SETTINGS[name]]) in (int, float)
    return cast(value, Numeric) if number else value


def lost_evaluations(connection: Connection) -> dict[str, int]:
    """Validations and tests of which a site gave no figures, by site, over all runs but baselines."""
    asked = select(t.evaluation.c.site, func.count()).join_from(t.event, t.evaluation).join(t.run)
    asked = asked.where(t.run.c.kind == "federated", t.event.c.kind == "evaluation", t.event.c.dropped > 0)
    found = connection.execute(asked.where(t.evaluation.c.place == "dropped").group_by(t.evaluation.c.site))
    return {str(site): int(n) for site, n in found}


def plain(connection: Connection, asked: Select[Any]) -> list[Row]:
    """All rows of an answer as plain dicts."""
    return [dict(row) for row in connection.execute(asked).mappings()]


def run_row(connection: Connection, id: int) -> Row:
    """The row of a run.

    Raises:
        UserError: it is not in the store.
    """
    row = connection.execute(select(t.run).where(t.run.c.id == id)).mappings().one_or_none()
    if row is None:
        raise UserError(f"run {id}: is not in the store")
    return dict(row)


def exists(connection: Connection, id: int) -> None:
    """Nothing, if the run is in the store.

    Raises:
        UserError: it is not.
    """
    if connection.scalar(select(t.run.c.id).where(t.run.c.id == id)) is None:
        raise UserError(f"run {id}: is not in the store")


def evaluated(id: int, split: str | None) -> list[Any]:
    """The conditions that pick a run's evaluations, of one split or of all."""
    within = [t.event.c.run == id, t.event.c.kind == "evaluation"]
    return [*within, t.event.c.split == split] if split is not None else within


def figures_of(connection: Connection, within: Sequence[Any], names: Sequence[str] | None = None) -> dict[Any, Row]:
    """Metrics by name, of each (event, position) of the evaluations ``within``."""
    same = and_(t.evaluation.c.event == t.metric.c.event, t.evaluation.c.position == t.metric.c.position)
    asked = select(t.metric).select_from(t.event).join(t.evaluation, t.evaluation.c.event == t.event.c.id)
    asked = asked.join(t.metric, same).where(*within)
    if names is not None:
        asked = asked.where(t.metric.c.name.in_(names))
    found: dict[Any, Row] = {}
    for row in connection.execute(asked.order_by(t.metric.c.event, t.metric.c.position, t.metric.c.rank)):
        figure = {"value": row.value, "low": row.low, "high": row.high, "n": row.n}
        found.setdefault((row.event, row.position), {})[row.name] = figure
    return found


def by_event(connection: Connection, table: Any, own: Sequence[Any]) -> dict[int, list[Any]]:
    """Rows of a table below the events, in order, by event."""
    found: dict[int, list[Any]] = {}
    asked = select(table).join_from(t.event, table).where(*own).order_by(table.c.event, table.c.position)
    for row in connection.execute(asked).mappings():
        found.setdefault(row["event"], []).append(row)
    return found

"""The sites over all runs."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Engine, and_, func, select

from server.database import schema as t
from server.database.query import Row, lost_evaluations, plain


def sites(db: Engine) -> list[Row]:
    """The sites over all runs but baselines: name, runs (that surveyed it), last_run (id), node, train, val, test,
    classes, skipped, reason and surveyed of the last run; epsilon (the last it told in that run); dropped (replies to
    training that were not used, in all), lost_evaluations (validations and tests without figures, in all); last_reason
    and last_dropped (time) of training, None if there was none."""
    whole = select(t.site.c.name, func.count().label("runs"), func.max(t.site.c.run).label("last_run"))
    whole = whole.join_from(t.site, t.run).where(t.run.c.kind == "federated").group_by(t.site.c.name)
    latest = whole.subquery()
    names = ("node", "train", "val", "test", "classes", "skipped", "reason", "surveyed")
    same = and_(t.site.c.run == latest.c.last_run, t.site.c.name == latest.c.name)
    asked = select(latest, *(t.site.c[name] for name in names)).join(t.site, same).order_by(latest.c.name)
    unused = t.site_round.c.reason.is_not(None)
    counts = select(t.site_round.c.site, func.count().label("dropped"), func.max(t.site_round.c.event).label("event"))
    counts = counts.join_from(t.site_round, t.event).join(t.run).where(t.run.c.kind == "federated")
    of_site = counts.where(unused).group_by(t.site_round.c.site).subquery()
    last = select(of_site.c.site.label("name"), of_site.c.dropped, t.site_round.c.reason.label("last_reason"))
    last = last.add_columns(t.event.c.time.label("last_dropped")).join_from(
        of_site, t.event, t.event.c.id == of_site.c.event
    )
    row_ = and_(t.site_round.c.event == of_site.c.event, t.site_round.c.site == of_site.c.site, unused)
    last = last.join(t.site_round, row_)
    with db.connect() as connection:
        found = {row["name"]: row | _NOTHING for row in plain(connection, asked)}
        for row in plain(connection, last):
            if row["name"] in found:
                found[row["name"]] |= row
        untold = lost_evaluations(connection)
        told = {id: _last_epsilon(connection, id) for id in {row["last_run"] for row in found.values()}}
    for name, own in found.items():
        own["lost_evaluations"] = untold.get(name, 0)
        own["epsilon"] = told[own["last_run"]].get(name)
    return list(found.values())


_NOTHING: Row = {"epsilon": None, "dropped": 0, "last_reason": None, "last_dropped": None}


def _last_epsilon(connection: Any, id: int) -> dict[str, float]:
    """What each site said last in a run."""
    asked = select(t.site_round.c.site, t.site_round.c.epsilon).join_from(t.event, t.site_round)
    asked = asked.where(t.event.c.run == id, t.event.c.kind == "round", t.site_round.c.epsilon.is_not(None))
    return {row.site: row.epsilon for row in connection.execute(asked.order_by(t.event.c.round))}

"""The tables. Everything that happens in a run is an ``event``; the larger ones keep their rows in tables of their own.

    run -< event -< round        one row: a training round's totals
                 -< site_round   one row a site: trained, or dropped with the reason
                 -< evaluation   one row a place (all sites, each site, the server's own images): sums, or why dropped
                 -< metric       one row a metric of an evaluation
    run -< site                  who takes part or was refused, as last surveyed

Rows of a repeated round go with its event (ON DELETE CASCADE). What has no column stands as JSON in ``facts`` or
``more``, so that an event can be given back as it came. No number is rounded; NaN is NULL, as in the journal.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
)

VERSION = 1
metadata = MetaData()
# SQLite counts rows up by itself only in a column of type INTEGER.
_Id = BigInteger().with_variant(Integer, "sqlite")
_COMPACT: dict[str, Any] = {"sqlite_with_rowid": False}  # rows lie in the order of the key: a round's sites together

schema = Table("schema", metadata, Column("version", Integer, primary_key=True, autoincrement=False))

run = Table(
    "run",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("key", Text, nullable=False, unique=True),  # named in the journal: a moved folder is the same run
    Column("path", Text, nullable=False),  # of the run folder, from the database's folder where it lies beside it
    Column("parent", _Id, ForeignKey("run.id", ondelete="CASCADE")),  # of a baseline or a reference network
    Column("kind", Text, nullable=False),  # federated, pooled, local or reference
    Column("journal", BigInteger, nullable=False),  # bytes of rounds.jsonl that are in here
    Column("name", Text, nullable=False),  # the job's
    Column("task", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("job", Text, nullable=False),  # SHA-256 of the resolved job
    Column("version", Text, nullable=False),  # of Consilium
    Column("settings", JSON, nullable=False),  # the resolved job, flat
    Column("metric", Text, nullable=False),  # that picks the best round, on validation images
    Column("direction", Integer, nullable=False),  # 1: more is better, -1: less is better
    Column("rounds", Integer, nullable=False),  # asked for
    Column("status", Text, nullable=False),  # running, finished or failed, by the last event that says so
    Column("reason", Text, nullable=False),  # why it failed
    Column("started", Double, nullable=False),  # seconds since 1970, of the first event
    Column("updated", Double, nullable=False),  # of the last event: a run that is running and old has broken off
    Column("attempts", Integer, nullable=False),  # 1 + how often it was resumed
    # What the table of runs shows and sorts by, taken from the events below with every one that is written.
    Column("done", Integer, nullable=False),  # training rounds
    Column("sites", Integer, nullable=False),  # that take part
    Column("dropped", Integer, nullable=False),  # replies that were not used
    Column("warnings", Integer, nullable=False),
    Column("seconds", Double, nullable=False),  # from the first event to the last
    Column("best_round", Integer),
    Column("best_value", Double),  # of ``metric`` on all sites' validation images
    Column("test_value", Double),  # of ``metric`` on all sites' test images
    Column("test_low", Double),
    Column("test_high", Double),
    Column("test_n", BigInteger),
    Index("run_by_parent", "parent", "started"),
    Index("run_by_path", "path"),
)

event = Table(
    "event",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("run", _Id, ForeignKey("run.id", ondelete="CASCADE"), nullable=False),
    Column("seq", BigInteger, nullable=False),  # where its line begins in the journal
    Column("kind", Text, nullable=False),
    Column("time", Double, nullable=False),  # seconds since 1970
    Column("round", Integer),
    Column("split", Text),
    Column("repeated", Integer, nullable=False),  # how often it had been done before, by attempts that broke off
    Column("dropped", Integer, nullable=False),  # replies that were not used
    Column("facts", JSON, nullable=False),
    UniqueConstraint("run", "seq"),
    Index("event_by_kind", "run", "kind", "split", "round"),
)


def _event() -> Column[int]:
    return Column("event", _Id, ForeignKey("event.id", ondelete="CASCADE"), primary_key=True, autoincrement=False)


def _position(name: str = "position") -> Column[int]:
    return Column(name, Integer, primary_key=True, autoincrement=False)


round_ = Table(
    "round",
    metadata,
    _event(),
    Column("seconds", Double),
    Column("trained", Integer, nullable=False),  # sites
    Column("dropped", Integer, nullable=False),  # sites
    Column("images", BigInteger, nullable=False),  # that were trained on
    Column("loss", Double),  # mean per image
    Column("down", BigInteger),  # bytes of arrays to the sites
    Column("up", BigInteger),  # and from them
)

site_round = Table(
    "site_round",
    metadata,
    _event(),
    _position(),
    Column("site", Text, nullable=False),
    Column("reason", Text),  # why its reply was not used; NULL: it was
    Column("weight", Double),
    Column("steps", BigInteger),
    Column("images", BigInteger),
    Column("loss", Double),  # summed over the images
    Column("epsilon", Double),  # ever spent on the site's images, by its own ledger
    Column("seconds", Double),  # from the question to the reply, where it is known
    Column("down", BigInteger),  # bytes of arrays to the site
    Column("up", BigInteger),  # and from it
    Column("more", JSON(none_as_null=True)),
    **_COMPACT,
)
Index(  # of the few that were not used, over all runs
    "site_round_dropped",
    site_round.c.site,
    site_round.c.event,
    site_round.c.reason,
    sqlite_where=site_round.c.reason.is_not(None),
    postgresql_where=site_round.c.reason.is_not(None),
)

evaluation = Table(
    "evaluation",
    metadata,
    _event(),
    _position(),
    Column("place", Text, nullable=False),  # all, site, server, or dropped
    Column("site", Text, nullable=False),  # of site and dropped; else ""
    Column("images", BigInteger),
    Column("reason", Text),  # of dropped
    Column("sums", JSON(none_as_null=True)),  # what the site sent: they add up over sites
    **_COMPACT,
)

metric = Table(
    "metric",
    metadata,
    _event(),
    _position(),  # of the evaluation's row
    _position("rank"),  # in the order of the task's metrics
    Column("name", Text, nullable=False),
    Column("value", Double),
    Column("low", Double),  # 95 % interval
    Column("high", Double),
    Column("n", BigInteger),
    **_COMPACT,
)

site = Table(
    "site",
    metadata,
    Column("run", _Id, ForeignKey("run.id", ondelete="CASCADE"), primary_key=True, autoincrement=False),
    Column("name", Text, primary_key=True),
    Column("node", Text),  # Flower's number of it: up to 2^64
    Column("train", BigInteger),  # images, as the site declares them
    Column("val", BigInteger),
    Column("test", BigInteger),
    Column("classes", JSON(none_as_null=True)),  # images of each class, as far as the site tells
    Column("skipped", BigInteger),  # images that could not be read
    Column("reason", Text),  # why it takes no part; NULL: it does
    Column("surveyed", Double, nullable=False),  # when
    **_COMPACT,
)

"""/metrics: the runs of the store and the sites, as Prometheus reads them; needs the extra ``prometheus``.

Runs that are going on, and those that changed last, so that the page stays small over hundreds of runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from sqlalchemy import Engine

from server.dashboard.federation import FederationView
from server.database import read
from server.database.going import states
from server.timing import PARTS, total_time
from shared.errors import how_to_install

if TYPE_CHECKING:
    from prometheus_client.core import Metric

RECENT = 20  # runs
TYPE = "text/plain; version=0.0.4; charset=utf-8"
_RUN = ("run", "name")
_OF_RUN = {
    "round": ("done", "Training rounds that are done."),
    "rounds": ("rounds", "Training rounds that were asked for."),
    "sites": ("sites", "Sites that take part."),
    "dropped_replies": ("dropped", "Replies of sites that were not used, of whatever was asked."),
    "warnings": ("warnings", "Warnings of the run."),
    "seconds": ("seconds", "From the first event of the run to the last."),
    "updated_timestamp_seconds": ("updated", "When the last news of the run came, seconds since 1970."),
    "best_round": ("best_round", "The best round so far by validation, or the one that was kept."),
}


class Missing(Exception):
    """The extra is not installed."""


def page(db: Engine, view: FederationView | None) -> bytes:
    """Everything in Prometheus' text format.

    Raises:
        Missing: prometheus-client is not installed.
    """
    try:
        from prometheus_client import CollectorRegistry, generate_latest
    except ImportError:
        raise Missing(f"Prometheus' client is not installed; {how_to_install('prometheus')}") from None
    registry = CollectorRegistry()
    registry.register(_Collector(db, view))
    return generate_latest(registry)


class _Collector:
    """Reads the store when it is asked."""

    def __init__(self, db: Engine, view: FederationView | None) -> None:
        self.db, self.view = db, view

    def describe(self) -> Iterable[Metric]:
        """Nothing is read at registering."""
        return []

    def collect(self) -> Iterable[Metric]:
        """The families, built anew."""
        rows, _ = read.runs(self.db, limit=RECENT, sort="-updated")
        going, _ = read.runs(self.db, limit=RECENT, sort="-updated", filter={"status": "running"})
        rows = list({row["id"]: row for row in [*going, *rows]}.values())
        yield from self._counts()
        for name, (column, about) in _OF_RUN.items():
            family = _gauge(f"consilium_run_{name}", about, _RUN)
            for row in rows:
                if row[column] is not None:
                    family.add_metric(_labels(row), row[column])
            yield family
        yield from self._figures(rows)
        yield from self._costs(rows)
        yield from self._sites()

    def _counts(self) -> Iterable[Any]:
        family = _gauge("consilium_runs", "Runs in the store.", ("status",))
        known = states(self.db, self.view.state if self.view else None)
        for status in ("running", "finished", "failed", "stopped", *(("unknown",) if self.view else ())):
            family.add_metric([status], read.runs(self.db, limit=1, filter={"status": status}, states=known)[1])
        yield family

    def _figures(self, rows: list[dict[str, Any]]) -> Iterable[Any]:
        names = (*_RUN, "metric", "split", "site")
        families = {
            key: _gauge(f"consilium_run_metric{end}", f"The global model's last figure of its metric{about}.", names)
            for key, end, about in (("value", "", ""), ("low", "_low", ", lower end"), ("high", "_high", ", upper end"))
        }
        for row in rows:
            for split in ("val", "test"):
                whole = read.evaluations(self.db, row["id"], split)[-1:]
                places = {"": whole[0]["metrics"]} if whole else {}
                for site, found in read.site_metrics(self.db, row["id"], split, [row["metric"]]).items():
                    places[site] = found[-1]["metrics"]
                for site, metrics in places.items():
                    for key, family in families.items():
                        if (value := metrics.get(row["metric"], {}).get(key)) is not None:
                            family.add_metric([*_labels(row), row["metric"], split, site], value)
        yield from families.values()

    def _costs(self, rows: list[dict[str, Any]]) -> Iterable[Any]:
        moved = _gauge("consilium_run_bytes", "Bytes of arrays that went to the sites and came.", (*_RUN, "direction"))
        spent = _gauge("consilium_run_time_seconds", "Seconds of the rounds, by part.", (*_RUN, "part"))
        for row in rows:
            rounds = read.timings(self.db, row["id"])["rounds"]
            for direction in ("down", "up"):
                moved.add_metric([*_labels(row), direction], sum(one[direction] or 0 for one in rounds))
            parts = total_time([{part: one[part] for part in PARTS} for one in rounds])
            for part, value in parts.items():
                if value is not None:
                    spent.add_metric([*_labels(row), part], value)
        yield moved
        yield spent

    def _sites(self) -> Iterable[Any]:
        epsilon = _gauge("consilium_site_epsilon", "Epsilon that a site said last it had spent.", ("site",))
        lost = _gauge(
            "consilium_site_dropped_replies", "Replies of a site to training that were not used, in all.", ("site",)
        )
        for row in read.sites(self.db):
            lost.add_metric([row["name"]], row["dropped"])
            if row["epsilon"] is not None:
                epsilon.add_metric([row["name"]], row["epsilon"])
        yield epsilon
        yield lost
        if self.view is not None:
            online = _gauge("consilium_site_online", "1 where a site is connected to the server.", ("site",))
            look = self.view.look()
            for name, site in look["sites"].items():
                online.add_metric([name], float(site["online"]))
            yield online
            if look["certificate"] is not None:
                days = _gauge("consilium_certificate_days", "Days that the server's certificate still holds.", ())
                days.add_metric([], look["certificate"])
                yield days


def _labels(row: dict[str, Any]) -> list[str]:
    return [str(row["id"]), row["name"] or row["path"]]


def _gauge(name: str, about: str, labels: Iterable[str]) -> Any:
    from prometheus_client.core import GaugeMetricFamily

    return GaugeMetricFamily(name, about, labels=list(labels))

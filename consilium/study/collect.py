"""What the cells of a study reached, read from their run folders: a row per trained model, nothing computed anew."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from consilium.study.plan import BASELINES, FEDERATED, TRIVIAL, Plan
from consilium.study.run import Outcome
from server.results import curve
from server.store import Event, read_events
from shared.config import Job
from shared.tasks import TASKS
from shared.weights import keeps_own

POOLED, ALONE = "pooled", "alone"
REACH = 0.98  # of the pooled model's best validation figure: what rounds and bytes are counted to


@dataclass(frozen=True)
class Row:
    """A model of one seed.

    ``value`` on all test images together with its interval; ``sites`` on each site's own, of those that have a figure.
    Where each site has a model of its own in the end, ``value`` and ``personal`` are these, ``sites`` the common one.
    ``alone``: the models of single sites, each on its own site's images, have no ``value``. ``validation`` is the
    figure that picked the round, ``at_sites`` that of the same round within each site, in the mean over their images;
    where each site has a model of its own, both are of these.
    ``steps`` and ``examples`` are of training, over all sites; ``bytes`` the arrays that training and validation sent
    both ways. ``to_target`` is (rounds, bytes) until the validation figure reached the target.
    """

    setting: str
    method: str
    seed: int
    metric: str
    sign: int
    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    validation: float = math.nan
    at_sites: float = math.nan
    sites: dict[str, float] = field(default_factory=dict)
    personal: dict[str, float] = field(default_factory=dict)
    n: int = 0
    steps: int = 0
    examples: int = 0
    rounds: int = 0
    bytes: int = 0
    to_target: tuple[float, float] = (math.nan, math.nan)
    epsilon: float = math.nan
    level: str = ""

    @property
    def own(self) -> dict[str, float]:
        """What each site ends up with: its personal model where the method makes one, else the common one."""
        return {site: self.personal.get(site, value) for site, value in self.sites.items()}

    @property
    def mean(self) -> float:
        """The mean over the sites."""
        return math.fsum(self.own.values()) / len(self.own) if self.own else math.nan

    @property
    def worst(self) -> float:
        """The figure of the site that fares worst."""
        return self.sign * min((self.sign * value for value in self.own.values()), default=math.nan)

    @property
    def worst_site(self) -> str:
        """Which that is."""
        return min(self.own, key=lambda site: self.sign * self.own[site], default="")


@dataclass(frozen=True)
class Failure:
    """A cell that failed, and why."""

    title: str
    reason: str


@dataclass(frozen=True)
class Found:
    """All rows of a study. ``about`` says what a setting’s trivial model is, ``cases`` what its samples are called.

    ``jobs`` and ``served`` go by setting and method: a job of it; and what follows the name of the baselines that it is
    held against, where methods differ in what is trained (a learning rate, a length).
    """

    plan: Plan
    rows: tuple[Row, ...]
    failures: tuple[Failure, ...]
    about: dict[str, str]
    cases: dict[str, str]
    jobs: dict[tuple[str, str], Job]
    served: dict[tuple[str, str], str]

    def of(self, setting: str, method: str) -> dict[int, Row]:
        """The rows of a method by seed."""
        return {row.seed: row for row in self.rows if row.setting == setting and row.method == method}

    def values(self, setting: str, method: str, what: str = "value") -> dict[int, float]:
        """One of the figures of a method's rows, by seed, where there is one."""
        found = {seed: float(getattr(row, what)) for seed, row in self.of(setting, method).items()}
        return {seed: value for seed, value in found.items() if math.isfinite(value)}

    def compared_by(self, setting: str) -> str:
        """The figure by which the methods of a setting are compared: ``value``, on all test images, or, where one of
        them ends with a model for each site, ``mean``, each site's on its own images: scores of different models have
        no common order, and over all sites they show who sees which classes rather than who tells them apart."""
        methods = [method for name, method in self.jobs if name == setting]
        return "mean" if any(self.own_models(setting, method) for method in methods) else "value"

    def own_models(self, setting: str, method: str) -> bool:
        """Whether a method ends with a model for each site."""
        return (job := self.jobs.get((setting, method))) is not None and keeps_own(job)

    def compared(self, setting: str, method: str) -> dict[int, float]:
        """That figure of a method, by seed."""
        return self.values(setting, method, self.compared_by(setting))

    def baseline(self, setting: str, method: str, which: str) -> str:
        """The name under which the baseline ``which`` (pooled, alone) that a method is held against has its rows."""
        return which + self.served.get((setting, method), "")


def collect(plan: Plan, outcomes: Sequence[Outcome]) -> Found:
    """Read every cell; the models that are not a federation's first, since the target comes from them."""
    baselines = {one.cell.id: one for one in outcomes if one.cell.kind == BASELINES}
    rows: list[Row] = []
    pooled: dict[str, Row] = {}
    for one in baselines.values():
        for which, row in _baseline_rows(one):
            if which == POOLED:
                pooled[one.cell.id] = row
            rows.append(row)
    about: dict[str, str] = {}
    for one in outcomes:
        if one.cell.kind == TRIVIAL and one.state == "done" and (scores := one.result.get("trivial")):
            about[one.cell.setting] = str(scores["about"])
            rows += _trivial_rows(one, scores, plan)
        elif one.cell.kind == FEDERATED and one.state == "done":
            rows.append(_federated_row(one, plan, pooled.get(one.cell.baseline)))
    failures = [Failure(one.cell.title, one.reason) for one in outcomes if one.state == "failed"]
    jobs = {(one.cell.setting, one.cell.method): one.cell.job for one in outcomes if one.cell.kind == FEDERATED}
    cases = {one.cell.setting: TASKS[one.cell.job.task].case for one in outcomes}
    served = {
        (one.cell.setting, one.cell.method): _suffix(baselines[one.cell.baseline])
        for one in outcomes
        if one.cell.kind == FEDERATED
    }
    return Found(plan, tuple(rows), tuple(failures), about, cases, jobs, served)


def _suffix(baseline: Outcome) -> str:
    return f" ({baseline.cell.method})" if baseline.cell.method else ""


def _facts(one: Outcome) -> dict[str, Any]:
    metric = one.cell.job.best_metric
    sign = TASKS[one.cell.job.task].metrics[metric]
    return {"setting": one.cell.setting, "seed": one.cell.seed, "metric": metric, "sign": sign}


def _figure(scores: Mapping[str, Any], metric: str) -> float:
    value = scores.get(metric)
    return math.nan if value is None else float(value)


def _scored(scores: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """What a row takes from the scores of ``run_scores``; where sites end up with models of their own, these count."""
    own = scores.get("personal") or scores
    low, high = (own.get("intervals") or {}).get(metric) or (None, None)
    return {
        "value": _figure(own, metric),
        "low": math.nan if low is None else float(low),
        "high": math.nan if high is None else float(high),
        "sites": _sites(scores, metric),
        "personal": _sites(scores.get("personal") or {}, metric),
        "n": int((own.get("n") or {}).get(metric, 0)),
    }


def _sites(scores: Mapping[str, Any], metric: str) -> dict[str, float]:
    found = {name: _figure(part, metric) for name, part in (scores.get("sites") or {}).items()}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _budget(scores: Mapping[str, Any], events: list[Event]) -> dict[str, Any]:
    rounds = [event for event in events if event["event"] == "round"]
    trained = scores.get("personal") or scores  # each site's own model takes further steps
    sent = sum(sum(pair) for event in rounds for pair in event.get("bytes", {}).values())
    return {
        "steps": int(trained["gradient_steps"]),
        "examples": int(trained["images_seen"]),
        "rounds": int(scores["rounds"]),
        "bytes": int(sent),
    }


def _best(events: list[Event], metric: str, sign: int) -> dict[str, Any]:
    """The best validation figure after training began, which picked the round; and that round's within each site."""
    values = {number: value for number, value, _, _ in curve(events, metric) if number and math.isfinite(value)}
    if not values:
        return {}
    best = max(values, key=lambda number: sign * values[number])
    event = next(e for e in events if e["event"] == "evaluation" and e["split"] == "val" and e["round"] == best)
    return {"validation": values[best], "at_sites": _at_sites(event, metric)}


def _best_own(events: list[Event], metric: str) -> dict[str, Any]:
    """The same of the models that each site ends with, where it makes one and tells how that does."""
    found = next(
        (event["validation"] for event in events if event["event"] == "personal" and "validation" in event), None
    )
    value = ((found or {}).get("metrics", {}).get(metric) or {}).get("value")
    return {} if found is None or value is None else {"validation": value, "at_sites": _at_sites(found, metric)}


def _at_sites(event: Mapping[str, Any], metric: str) -> float:
    """The mean over the sites that have the figure, each counted by its validation images; of the pooled model none."""
    found = {site: (figures.get(metric) or {}).get("value") for site, figures in event["sites"].items()}
    images = {site: event["site_images"][site] for site, value in found.items() if value is not None}
    return math.fsum(found[site] * n for site, n in images.items()) / sum(images.values()) if images else math.nan


def _baseline_rows(one: Outcome) -> list[tuple[str, Row]]:
    """The pooled model, and all single-site models together; of a cell that failed, what there is."""
    facts, found = _facts(one), []
    metric, sign = facts["metric"], facts["sign"]
    if pooled := one.result.get("pooled"):
        events = read_events(one.run / "baselines" / "pooled")
        more = _scored(pooled, metric) | _budget(pooled, events) | {"bytes": 0}
        found.append((POOLED, Row(**facts, method=POOLED + _suffix(one), **more, **_best(events, metric, sign))))
    if local := one.result.get("local"):
        own = {site: _sites(scores, metric).get(site, math.nan) for site, scores in local.items()}
        own = {site: value for site, value in own.items() if math.isfinite(value)}
        first = next(iter(local.values()))
        budget = _budget(first, []) | {"bytes": 0}
        found.append((ALONE, Row(**facts, method=ALONE + _suffix(one), sites=own, **budget)))
    return found


def _trivial_rows(one: Outcome, scores: Mapping[str, Any], plan: Plan) -> list[Row]:
    """Nothing in it is drawn: the same for every seed, unless each seed has its own sites."""
    facts = _facts(one)
    own = [cell.seed for cell in plan.cells if cell.kind == TRIVIAL and cell.setting == one.cell.setting]
    seeds = plan.seeds if len(own) == 1 else (one.cell.seed,)
    more = _scored(scores, facts["metric"])
    return [Row(**(facts | {"seed": seed}), method=TRIVIAL, **more) for seed in seeds]


def _federated_row(one: Outcome, plan: Plan, pooled: Row | None) -> Row:
    facts, scores = _facts(one), one.result["federated"]
    metric, sign = facts["metric"], facts["sign"]
    events = read_events(one.run)
    target = plan.target
    if target is None and pooled is not None:
        target = pooled.validation * (REACH if sign > 0 else 1 / REACH)
    return Row(
        **facts,
        method=one.cell.method,
        **_scored(scores, metric),
        **_budget(scores, events),
        **(_best(events, metric, sign) | _best_own(events, metric)),
        to_target=_to_target(events, metric, sign, math.nan if target is None else target),
        epsilon=float(scores.get("privacy", {}).get("epsilon", math.nan)),
        level=plan.levels[one.cell.setting, one.cell.method],
    )


def _to_target(events: list[Event], metric: str, sign: int, target: float) -> tuple[float, float]:
    """Rounds and bytes until a validation figure was as good as ``target``; infinite if none was, NaN without one."""
    if math.isnan(target):
        return math.nan, math.nan
    reached = [number for number, value, _, _ in curve(events, metric) if sign * value >= sign * target]
    if not reached:
        return math.inf, math.inf
    until = [event for event in events if event["event"] == "round" and event["round"] <= reached[0]]
    return float(reached[0]), float(sum(sum(pair) for event in until for pair in event.get("bytes", {}).values()))

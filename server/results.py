"""result.json: the figures of a run, taken from its stored events and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from server.spent import privacy_spent
from server.store import Event, read_events
from server.timing import split_time, total_time
from shared.config import Job, load_job
from shared.intervals import Estimate
from shared.tasks import Sums, add_sums
from shared.tasks.classification.calibration import figures
from shared.tasks.classification.metrics import histograms

Scores = dict[str, Any]


def run_scores(folder: Path) -> Scores:
    """What a run reached on the test images: metrics by name, with intervals, counts and the same per site.

    ``{"auroc": .98, …, "images": 812, "intervals": {"auroc": [low, high], …}, "n": {"auroc": 812, …},
    "sites": {name: the same}, "personal": {the same, of each site's own model, and as "validation" on those images},
    "rounds", "best_round", "gradient_steps", "images_seen", "seconds", "dropped"}``
    """
    events = read_events(folder)
    rounds = [event for event in events if event["event"] == "round"]
    test = [event for event in events if event["event"] == "evaluation" and event["split"] == "test"]
    scores: Scores = {}
    if test:
        last = test[-1]
        scores = _everywhere(last)
        scores["best_round"] = last["round"]
        if calibrated := _calibration(last.get("sums", {}), load_job(folder / "job.toml")):
            scores["calibration"] = calibrated
        if last.get("operating_point"):
            scores["operating_point"] = last["operating_point"]
        if "server" in last:
            scores["server"] = _scores(last["server"], last["server_images"])
    scores |= _best(events) | _subgroups(events)
    scores["rounds"] = len(rounds)
    scores["gradient_steps"] = sum(item["steps"] for event in rounds for item in event["trained"])
    scores["images_seen"] = sum(item["images"] for event in rounds for item in told(event))
    if own := [event for event in events if event["event"] == "personal"]:
        scores["personal"] = _personal(own[-1], scores, load_job(folder / "job.toml"))
    scores["seconds"] = round(events[-1]["time"] - events[0]["time"], 1) if events else 0.0
    parts = [split_time(event.get("seconds"), event["trained"]) for event in rounds]
    scores["time"] = {name: None if value is None else round(value, 3) for name, value in total_time(parts).items()}
    scores["dropped"] = dropped(events)
    spent = privacy_spent(rounds, load_job(folder / "job.toml"))
    return scores | ({"privacy": spent} if spent else {})


def _best(events: list[Event]) -> Scores:
    """``best``: the round that was kept, the rule by which it was picked, its validation figure, what was looked at."""
    found = [event for event in events if event["event"] == "kept"]
    names = ("round", "rule", "metric", "direction", "value", "considered", "without")
    return {"best": {name: found[-1][name] for name in names}} if found else {}


def _subgroups(events: list[Event]) -> Scores:
    """``subgroups``: the test figures of each group that some site tells of, as those of all images; and what was asked
    of whom."""
    found = [event for event in events if event["event"] == "subgroups"]
    if not found:
        return {}
    groups: Scores = {}
    for name, row in found[-1]["groups"].items():
        if row["images"]:
            own = {key: row[key] for key in ("dimension", "label")} | {"told_by": sorted(row["sites"])}
            point = {"operating_point": row["operating_point"]} if row.get("operating_point") else {}
            groups[name] = _scores(row["metrics"], row["images"]) | own | point
    asked = list(dict.fromkeys(row["dimension"] for row in found[-1]["groups"].values()))
    return {"subgroups": {"asked": asked, "silent": found[-1]["silent"], "groups": groups}}


def cross_site(scores: Mapping[str, Any], metric: str) -> Scores:
    """Each site's own model and the federated one on every site's test images: ``models`` holds, by model and site,
    [value, low, high, n] of the metric; {} where no site's own model was trained."""
    models = {"federated": scores["federated"]} | {f"only {name}": own for name, own in scores.get("local", {}).items()}
    if len(models) < 2:
        return {}
    sites = sorted(scores["federated"].get("sites", {}))
    cells: Scores = {
        model: {
            site: [part.get(metric), *part["intervals"].get(metric, [None, None]), part["n"].get(metric, 0)]
            for site, part in sorted(own.get("sites", {}).items())
        }
        for model, own in models.items()
    }
    return {"metric": metric, "sites": sites, "models": cells}


def scores_of(metrics: Mapping[str, Estimate], images: int) -> Scores:
    """The same form from metrics that were computed here and now."""
    return _scores({name: vars(estimate) for name, estimate in metrics.items()}, images)


def _personal(event: Event, scores: Scores, job: Job) -> Scores:
    """Each site's own model on its own test images, beside the common model on the same."""
    found = _everywhere(event)
    if "validation" in event:
        found["validation"] = _everywhere(event["validation"])
    more = job.federation.finetune_steps * len(event["sites"])
    if job.federation.local == "ditto":  # a second model beside the common one, step by step
        more += scores["gradient_steps"]
    return found | {
        "best_round": event["round"],
        "rounds": scores["rounds"],
        "gradient_steps": scores["gradient_steps"] + more,
        "images_seen": scores["images_seen"] + more * job.train.batch_size,  # sites do not tell of these steps
    }


def _calibration(sites: Mapping[str, Sums], job: Job) -> dict[str, Any]:
    """Calibration error and Brier score of each class over all sites' test images; nothing where none is scored."""
    if not any(sums.get("positives") for sums in sites.values()):
        return {}
    return figures(list(zip(job.classes, *histograms(add_sums(sites.values()), job), strict=True)))


def _everywhere(event: Mapping[str, Any]) -> Scores:
    """The figures of all sites together, and under ``sites`` of each."""
    sites = {name: _scores(rows, event["site_images"][name]) for name, rows in event["sites"].items()}
    return _scores(event["metrics"], event["images"]) | {"sites": sites}


def _scores(metrics: Mapping[str, Mapping[str, Any]], images: int) -> Scores:
    scores: Scores = {name: row["value"] for name, row in metrics.items()}
    scores["images"] = images
    scores["intervals"] = {name: [row["low"], row["high"]] for name, row in metrics.items()}
    scores["n"] = {name: row["n"] for name, row in metrics.items()}
    return scores


def told(round_: Event) -> list[dict[str, Any]]:
    """Who tells ``loss`` and ``images`` of a round: every site, or under secure aggregation all of them together."""
    return [round_["secure"]] if "secure" in round_ else list(round_.get("trained", []))


def dropped(events: list[Event]) -> list[dict[str, Any]]:
    """Every reply that was not used: when, whose, why."""
    found = []
    for event in events:
        for item in event.get("dropped", []):
            found.append({"round": event.get("round", 0), "step": event["event"], **item})
    return found


def curve(
    events: list[Event], metric: str, split: str = "val", site: str | None = None
) -> list[tuple[int, float, float, float]]:
    """(round, value, low, high) of a metric of the global model, over all sites or at one; NaN where there is none."""
    points = []
    for event in events:
        if event["event"] == "evaluation" and event["split"] == split:
            rows = event["metrics"] if site is None else event["sites"].get(site, {})
            row = rows.get(metric, {})
            values = [row.get(key) for key in ("value", "low", "high")]
            points.append((event["round"], *(math.nan if value is None else value for value in values)))
    return points

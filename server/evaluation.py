"""Testing a model at the sites: the sums of each, what they make together, and what was chosen by them.

Every evaluation is one event. It holds the operating point, too: chosen on the validation sums, and on the test sums
only reported (``server.operating``). The functions are the second half of ``server.rounds.Run``, which they are given.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from flwr.app import ArrayRecord, MessageType, RecordDict
from torch import Tensor

from server.admission import Dropped, Place, admit_groups, admit_sums
from server.coverage import missing_words, of_event, whose
from server.operating import choose, chosen_before, report
from server.record import reason_words
from server.store import read_events, write_pictures
from server.wire import Content
from server.wording import metric_name
from shared.intervals import Estimate
from shared.subgroups import groups_of
from shared.tasks import TASKS, Sums, add_sums
from shared.weights import REFERENCE, whole

if TYPE_CHECKING:
    from server.rounds import Run

Arrays = dict[str, Tensor]


def evaluate(run: Run, arrays: Arrays, number: int, split: str) -> dict[str, Estimate]:
    """Metrics of ``arrays`` over all sites' images of ``split``, stored with each site's sums."""
    task, job = run.task, run.job
    able = _able(run, split)
    content = run.line.addressed(_content(run, arrays, number, split), arrays, number)
    sums, dropped = _ask(run, MessageType.EVALUATE, content, able, number, split)
    total = add_sums([run.template, *sums.values()])
    metrics: dict[str, Estimate] = task.summarise(total, job)
    facts: dict[str, Any] = {"round": number, "split": split, "metrics": rows(metrics), "dropped": dropped}
    facts |= _of_sites(run, total, sums)
    if split == "test":
        facts["sums"] = sums
        point = report(chosen_before(read_events(run.folder), number), total, sums, job)
    else:
        point = choose(total, job)
        if point:
            point["whose"] = whose(sums, [place.name for place in able])
    if point:
        facts["operating_point"] = point
    if run.heldout is not None and whole(job):
        own = task.collect(run._model_of(arrays), run.heldout, job, run.device)
        facts["server"] = rows(task.summarise(own, job))
        facts["server_images"] = own["n"]
    if hasattr(task, "show") and whole(job):
        pictures = task.show(run._model_of(arrays), job)
        facts["pictures"] = write_pictures(run.folder / "pictures", pictures, f"{split}-{number:06}")
    run.store.add("evaluation", **facts)
    return metrics


def evaluate_personal(run: Run, arrays: Arrays, number: int) -> None:
    """Let each site make its own model of the one that was kept, validate and test it; stored beside the common one's.

    The validation figures are what one method that ends so may be chosen by before another, see ``consilium.study``.
    """
    weights = [float(weight) for weight in run.class_weights]
    able = [place for place in run.places if place.images["train"]]
    facts: dict[str, Any] = {}
    lost: dict[str, dict[str, str]] = {}  # by site; of two reasons the later
    for split in ("val", "test"):
        asked = [place for place in able if place.images[split] or split == "test"]  # all make and save theirs
        content = _content(run, arrays, number, split, **{"class-weights": weights})
        sums, dropped = _ask(run, "evaluate.personal", content, asked, number, split)
        total = add_sums([run.template, *sums.values()])
        lost |= {item["site"]: item for item in dropped}
        found = {"metrics": rows(run.task.summarise(total, run.job))} | _of_sites(run, total, sums)
        facts |= {"validation": found} if split == "val" else found | {"sums": sums}
    run.store.add("personal", round=number, dropped=list(lost.values()), **facts)


def _able(run: Run, split: str) -> list[Place]:
    """The sites with images of the split; where parts of the model stay home, only those that trained them."""
    return [place for place in run.places if place.images[split] and (place.images["train"] or whole(run.job))]


def _of_sites(run: Run, total: Sums, sums: dict[str, Sums]) -> dict[str, Any]:
    sites = {name: rows(run.task.summarise(part, run.job)) for name, part in sums.items()}
    return {"images": total["n"], "sites": sites, "site_images": {name: part["n"] for name, part in sums.items()}}


def _content(run: Run, arrays: Arrays, number: int, split: str, **more: Any) -> RecordDict:
    """A message with a model to test, and with what it is measured by, if anything."""
    content = RecordDict({"arrays": ArrayRecord(arrays), "config": run._config(number, split=split, **more)})
    if run.reference:
        content[REFERENCE] = ArrayRecord(run.reference)
    return content


def _ask(
    run: Run, kind: str, content: Content, places: list[Place], number: int, split: str
) -> tuple[dict[str, Sums], list[dict[str, str]]]:
    """The sums of every site that has images of the split and whose reply is in order, and the others' reasons."""
    sums: dict[str, Sums] = {}
    dropped: list[dict[str, str]] = []
    for place, reply in run._exchange(kind, content, places, number):
        try:
            sums[place.name] = admit_sums(reply, run.template, run.task, run.job, place.images[split])
        except Dropped as reason:
            dropped.append({"site": place.name, "reason": str(reason)})
    return {name: part for name, part in sums.items() if part["n"]}, dropped


def rows(metrics: dict[str, Estimate]) -> dict[str, dict[str, Any]]:
    """Metrics as an event holds them."""
    return {name: vars(estimate) for name, estimate in metrics.items()}


# ---------------------------------------------------------------------- which round is kept


def better(value: float, best: float, sign: int) -> bool:
    """Whether ``value`` replaces ``best``: a figure where there was none, or one that is strictly better.

    ``sign``: 1 where more is better, -1 where less is. A round without the figure (NaN) is never best.
    """
    return not math.isnan(value) and (math.isnan(best) or sign * value > sign * best)


def keep(run: Run) -> None:
    """Write down which round is kept and how it was chosen: the rule in words, what it looked at, what it found; and
    a warning where sites that have validation images told none of the figures it was chosen by."""
    metric, case = run.job.best_metric, TASKS[run.job.task].case
    courses = {
        event["round"]: event
        for event in read_events(run.folder)
        if event["event"] == "evaluation" and event["split"] == "val" and event["round"]
    }
    able = [place.name for place in _able(run, "val")]
    chosen = courses.get(run.best.round, {}) if not math.isnan(run.best.value) else {}
    of_whom = of_event(chosen, able, case) if chosen else "all sites"
    direction = TASKS[run.job.task].metrics[metric]
    rule = (
        f"{'largest' if direction > 0 else 'smallest'} {metric_name(metric)} over the validation {case}s of {of_whom} "
    )
    rule += "together; of equals the earlier; a round without the figure is passed over"
    considered = {number: event["metrics"].get(metric, {}).get("value") for number, event in courses.items()}
    found = {"rule": rule, "metric": metric, "direction": direction, "value": run.best.value}
    found |= {"considered": sorted(considered), "without": sorted(r for r, v in considered.items() if v is None)}
    run.store.add("kept", round=run.best.round, **found)
    why = {item["site"]: reason_words(item["reason"]) for item in chosen.get("dropped", [])}
    if chosen and (text := missing_words(chosen, able, case, why)):
        run.store.add("warning", text=text)


# ---------------------------------------------------------------------- subgroups


def evaluate_subgroups(run: Run, arrays: Arrays, number: int) -> None:
    """The test figures of the job's subgroups, from the sites that tell of them; an event of its own."""
    told: dict[str, dict[str, Sums]] = {}
    dropped: list[dict[str, str]] = []
    asked = _able(run, "test")
    for place, reply in run._exchange("evaluate.subgroups", _content(run, arrays, number, "test"), asked, number):
        try:
            told[place.name] = admit_groups(reply, run.template, run.task, run.job, place.images["test"])
        except Dropped as reason:
            dropped.append({"site": place.name, "reason": str(reason)})
    chosen = chosen_before(read_events(run.folder), number)
    found = {
        name: _group(run, facts, {site: sums[name] for site, sums in told.items() if sums[name]["n"]}, chosen)
        for name, facts in groups_of(run.job).items()
    }
    silent = sorted(site for site, sums in told.items() if not any(part["n"] for part in sums.values()))
    run.store.add("subgroups", round=number, split="test", groups=found, silent=silent, dropped=dropped)


def _group(run: Run, facts: tuple[str, str], parts: dict[str, Sums], chosen: dict[str, Any]) -> dict[str, Any]:
    """One group over the sites that tell of it: its images at each, its sums added up, and the figures of these."""
    total = add_sums([run.template, *parts.values()])
    row: dict[str, Any] = {"dimension": facts[0], "label": facts[1], "images": total["n"], "metrics": {}}
    row["sites"] = {site: sums["n"] for site, sums in parts.items()}
    if parts:
        row |= {"metrics": rows(run.task.summarise(total, run.job)), "sums": total}
        point = report(chosen, total, {}, run.job).get("classes", {})
        if tested := {name: facts["test"] for name, facts in point.items() if "test" in facts}:
            row["operating_point"] = tested
    return row

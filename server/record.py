"""A run as the report tells it: what its folder holds, and words for what became of the sites' replies."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from server.coverage import able_sites, whose_course
from server.database.shown import events_of
from server.results import run_scores
from server.store import Event
from server.wording import number, with_interval
from shared.config import Job, job_from_flat, load_job
from shared.errors import CODES
from shared.tasks import TASKS, Sums, add_sums
from shared.weights import REFERENCE, whole

# Why a reply was not used: the words of server/admission.py, and the codes of sites that decline.
REASONS = {
    "no-reply": "the site did not answer in time",
    "site-error": "the site’s program failed",
    "app-did-not-load": "the site’s program could not be started",
    "site-gone": "the site was no longer connected",
    "site-crashed": "the site’s program broke off",
    "wrong-records": "the reply was not in the agreed form",
    "bad-name": "the site’s name is not one that a site may have",
    "wrong-names": "the reply’s parts have other names than asked for",
    "undecodable": "the reply could not be decoded",
    "wrong-shape": "a part of the reply has the wrong size",
    "wrong-dtype": "a part of the reply has the wrong number type",
    "wrong-sums": "the counts in the reply contradict each other or name more images than there are",
    "no-loss": "the reply names no loss, by which this job weighs the sites",
    "bad-variance": "a variance in the reply is negative",
    "too-far": "the site’s change of the model is larger than the job allows",
    "other-job": "the site runs another job",
    "other-frozen-weights": "the site starts from other pretrained weights",
    "unnamed": "the site gave no readable reason",
    "bad-shares": "too few of the others’ shares of the site’s seed were right",
    **CODES,
}
DECLINED = "site-declined: "

# What models and places are called in the report.
FEDERATED, POOLED, ONLY, SERVER = "Federated", "All data in one place", "Only ", "server’s own images"
PERSONAL = "Each site’s own"  # model, made of the federated one: on its own test images


@dataclass(frozen=True)
class Record:
    """A run as it lies in its folder. ``scores`` is result.json, or the same taken from the events where it lacks.

    ``reference`` holds the events of the network that this run's model is measured by, if there is one.
    """

    folder: Path
    job: Job
    events: list[Event]
    baselines: dict[str, list[Event]]
    scores: dict[str, Any]
    reference: list[Event]

    @property
    def metric(self) -> str:
        """The metric that picked the model, and that the pictures show."""
        return self.job.best_metric

    @property
    def sign(self) -> int:
        """1 where a larger value of ``metric`` is better, -1 where a smaller one is."""
        return self.direction(self.metric)

    def direction(self, metric: str) -> int:
        """1 where a larger value of any metric is better, -1 where a smaller one is."""
        return TASKS[self.job.task].metrics.get(metric.partition(":")[0], 1)

    @property
    def case(self) -> str:
        """What one sample is called."""
        return TASKS[self.job.task].case

    @cached_property
    def survey(self) -> Event:
        """Who answered before the first round, and who did not."""
        return self._last("survey") or {"sites": [], "dropped": []}

    @cached_property
    def test(self) -> Event | None:
        """The final evaluation, if the run came so far."""
        return self._last("evaluation", "test")

    @cached_property
    def pictures(self) -> list[Shown]:
        """What the model drew at first, midway and at its best, where it draws."""
        drawn = [event for event in self.events if event.get("pictures")]
        course = [event for event in drawn if event["split"] == "val"]
        best = [event for event in drawn if event["split"] == "test"][-1:]
        chosen = [("first", course[0]), ("midway", course[len(course) // 2])] if len(course) > 1 else []
        found: dict[int, Shown] = {}
        for when, event in chosen + [("kept", event) for event in best or course[-1:]]:
            found[event["round"]] = Shown(when, event["round"], _files(self.folder, event))
        return list(found.values())

    @cached_property
    def rounds(self) -> dict[int, Event]:
        """The training rounds; of a round that was repeated, the last."""
        return {event["round"]: event for event in self.events if event["event"] == "round"}

    @cached_property
    def test_sums(self) -> Sums:
        """The sums behind the test figures, added over the sites."""
        return add_sums((self.test or {}).get("sums", {}).values())

    @property
    def sites(self) -> list[str]:
        """The sites of the run, in the order of the survey."""
        return [str(site["name"]) for site in self.survey["sites"]]

    @property
    def models(self) -> dict[str, dict[str, Any]]:
        """Scores of every trained model, by what it is called in the report."""
        own = self.scores["federated"]
        found = {FEDERATED: own} | ({PERSONAL: own["personal"]} if "personal" in own else {})
        found |= {POOLED: self.scores["pooled"]} if "pooled" in self.scores else {}
        return found | {f"{ONLY}{name}": scores for name, scores in self.scores.get("local", {}).items()}

    @property
    def worst(self) -> str:
        """The site where the federated model does worst on the test images; nothing where there are not several."""
        sites = {name: s for name, s in self.scores["federated"].get("sites", {}).items() if has(s, self.metric)}
        return min(sites, key=lambda name: self.sign * sites[name][self.metric]) if len(sites) > 1 else ""

    def whose(self, split: str) -> str:
        """Of whom the figures of validation or test are: all sites, or those that told theirs; see ``coverage``."""
        rounds = {e["round"]: e for e in self.events if e["event"] == "evaluation" and e["split"] == split}
        told = list(rounds.values())[-1:] if split == "test" else list(rounds.values())
        n = (told[-1]["images"] or 0) if told else 0
        able = able_sites(self.survey["sites"], split, whole(self.job))
        return whose_course([event["sites"] for event in told], able, count(n, self.case))

    def metrics(self, parts: bool = False) -> list[str]:
        """The metrics of the test, the one that picked the model first; ``parts``: those of single classes instead.

        Those that no model has a figure of are left out, but never the first.
        """
        found = [name for name in self.scores["federated"].get("n", {}) if (":" in name) == parts]
        models = self.models.values()
        there = [name for name in found if name == self.metric or any(has(scores, name) for scores in models)]
        return sorted(there, key=lambda name: name != self.metric)

    def best_first(self, models: dict[str, dict[str, Any]]) -> list[str]:
        """Names of models, from the best test figure to the worst; those without one last."""

        def order(name: str) -> float:
            return -self.sign * models[name][self.metric] if has(models[name], self.metric) else math.inf

        return sorted(models, key=order)

    def _last(self, kind: str, split: str = "") -> Event | None:
        found = [e for e in self.events if e["event"] == kind and (not split or e.get("split") == split)]
        return found[-1] if found else None


class Shown(NamedTuple):
    """Pictures by name that the model of a round drew, and when that was."""

    when: str
    round: int
    files: dict[str, Path]


def _files(folder: Path, event: Event) -> dict[str, Path]:
    """The pictures of an evaluation by name; only PNG files that lie in the run folder."""
    end = f"-{event['split']}-{event['round']:06}"
    paths = {Path(name).stem.removesuffix(end): (folder / name).resolve() for name in event["pictures"]}
    root = folder.resolve()
    return {
        name: path
        for name, path in paths.items()
        if path.suffix == ".png" and path.is_relative_to(root) and path.is_file()
    }


class Lost(NamedTuple):
    """Replies that were not used, of one site in one step (survey, round, val, test) for one reason."""

    site: str
    step: str
    reason: str
    rounds: list[int]


def lost_replies(events: list[Event]) -> list[Lost]:
    """Every reply that was not used, put together by site, step and reason; a survey's of those that never came in."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    surveys = [event for event in events if event["event"] == "survey"]
    in_it = {str(place["name"]) for place in surveys[-1]["sites"]} if surveys else set()
    for event in events:
        step = str(event["split"] if event["event"] == "evaluation" else event["event"])
        for item in event.get("dropped", []):
            if step == "survey" and str(item["site"]) in in_it:
                continue
            groups.setdefault((str(item["site"]), step, str(item["reason"])), []).append(event.get("round", 0))
    return [Lost(*key, rounds) for key, rounds in groups.items()]


def read_record(folder: Path, store: str = "") -> Record:
    """Read a run from its store and its folder; a run by ``flwr run`` has no result.json."""
    others = {"pooled": folder / "baselines" / "pooled"} if (folder / "baselines" / "pooled").is_dir() else {}
    others |= {path.name.removeprefix("local-"): path for path in sorted(folder.glob("baselines/local-*"))}
    if (folder / "result.json").exists():
        scores = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    else:
        scores = {"federated": run_scores(folder)}
    own = folder / "job.toml"
    job = load_job(own) if own.exists() else job_from_flat(scores["job"])
    baselines = {name: events_of(path, store) for name, path in others.items()}
    reference = events_of(folder / REFERENCE, store)
    return Record(folder, job, events_of(folder, store), baselines, scores, reference)


# ---------------------------------------------------------------------- words


def has(scores: dict[str, Any], metric: str) -> bool:
    """Whether there is a figure of ``metric``; a site without one of the classes has no AUROC."""
    return number(scores.get(metric)) != "–"


def value_of(scores: dict[str, Any], metric: str) -> str:
    """The figure of a metric with its interval; a dash where there is none."""
    if not has(scores, metric):
        return "–"
    low, high = scores["intervals"][metric]
    return with_interval(scores[metric], low, high, metric)


def count(n: int, what: str, several: str = "") -> str:
    """``1 site``, ``1,200 images``."""
    return f"{n:,} {what if n == 1 else several or f'{what}s'}"


def spans(rounds: Iterable[int]) -> str:
    """``1, 4–7`` for 1, 4, 5, 6, 7."""
    found: list[list[int]] = []
    for one in sorted(set(rounds)):
        if found and one == found[-1][1] + 1:
            found[-1][1] = one
        else:
            found.append([one, one])
    return ", ".join(f"{a}" if a == b else f"{a}–{b}" for a, b in found)


def reason_words(reason: str) -> str:
    """A reason in plain words; one that is not known as it stands."""
    return REASONS.get(str(reason).removeprefix(DECLINED), str(reason))

"""What a person sees while a run is on: bars on a terminal or in a notebook, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from server.record import reason_words
from shared.config import Job

Observer = Callable[[str, dict[str, Any]], None]


@contextlib.contextmanager
def showing(job: Job, wanted: bool = True, console: Console | None = None) -> Iterator[Observer | None]:
    """An observer for ``simulations.simulate.run`` that shows its events; None if not wanted.

    Of events with ``past`` only the figures are taken: they were shown before.
    """
    console = console or Console()
    if not wanted:
        yield None
    elif console.is_terminal or console.is_jupyter:
        with _bars(job, console) as observer:
            yield observer
    else:
        yield _Lines(job, console)


@contextlib.contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar that hears (done, of all), on a terminal; nothing elsewhere."""
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task(what, total=None)

        def show(done: int, of: int) -> None:
            bars.update(bar, completed=done, total=of)

        yield show


class _Facts:
    """The last known figures of each run, from its events."""

    def __init__(self, job: Job) -> None:
        self.metric, self.rounds = job.best_metric, job.federation.rounds
        self.steps: dict[str, int] = {}
        self.score: dict[str, str] = {}
        self.sites: dict[str, str] = {}
        self.silent: set[tuple[str, ...]] = set()  # who gives no figures and why; said once, not in every evaluation

    def hear(self, name: str, event: dict[str, Any]) -> None:
        if event["event"] == "round":
            self.steps[name] = self.steps.get(name, 0) + sum(item["steps"] for item in event["trained"])
            asked = len(event["trained"]) + len(event["dropped"])
            self.sites[name] = f"{len(event['trained'])}/{asked} sites"
        elif event["event"] == "evaluation":
            row = event["metrics"].get(self.metric) or {"n": 0}
            self.score[name] = f"{self.metric} {row['value']:.3f}" if row["n"] else f"{self.metric} –"

    def describe(self, name: str) -> str:
        return f"{self.sites.get(name, '')} {self.steps.get(name, 0):>5} steps  {self.score.get(name, '')}"

    def evaluated(self, name: str, event: dict[str, Any]) -> str:
        """A line of an evaluation: of the test, whose round is an earlier one, without the steps that were taken."""
        if event["split"] == "test":
            return f"{name}: kept round {event['round']} of {self.rounds}: test {self.score[name]}"
        return f"{name}: round {event['round']}/{self.rounds} {self.describe(name).strip()}"

    def remarks(self, name: str, event: dict[str, Any]) -> Iterator[str]:
        """What a person should know at once: who is there, who was dropped and why, warnings."""
        kind, round_ = event["event"], event.get("round", 0)
        if kind == "start" and "resumed_after" in event:
            yield f"{name}: goes on after round {event['resumed_after']} of {self.rounds}"
        if kind == "survey" and name == "federated":
            for site in event["sites"]:
                skipped = f", {site['skipped']} unreadable" if site["skipped"] else ""
                images = site["images"]
                counts = f"{images['train']} training, {images['val']} validation, {images['test']} test images"
                yield f"{site['name']}: {counts}{skipped}"
        for item in event.get("dropped", []):
            site, reason = str(item["site"]), str(item["reason"])
            why = f"{reason} ({reason_words(reason)})"
            if kind != "evaluation":
                yield f"{name}: {kind} {round_}: {site} not used: {why}"
            elif (name, site, event["split"], reason) not in self.silent:
                self.silent.add((name, site, event["split"], reason))
                split = {"val": "validation"}.get(event["split"], event["split"])
                yield f"{name}: {site} gives no {split} figures: {why}"
        if kind == "warning":
            yield f"{name}: {event['text']}"


@contextlib.contextmanager
def _bars(job: Job, console: Console) -> Iterator[Observer]:
    columns = (
        TextColumn("{task.description:<16}", markup=False),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    facts, lock, bars = _Facts(job), threading.Lock(), {}
    with Progress(*columns, console=console, refresh_per_second=4) as progress:

        def observe(name: str, event: dict[str, Any]) -> None:
            with lock:
                if name not in bars:
                    bars[name] = progress.add_task(name, total=job.federation.rounds, facts="reading images")
                facts.hear(name, event)
                done = event["round"] if event["event"] == "round" else None
                progress.update(bars[name], completed=done, facts=facts.describe(name))
                for line in () if event.get("past") else facts.remarks(name, event):
                    progress.console.print(line, style="yellow", highlight=False, markup=False)

        yield observe


class _Lines:
    """One line per validation, at most one a second per run, and every remark."""

    def __init__(self, job: Job, console: Console) -> None:
        self.console, self.rounds, self.facts = console, job.federation.rounds, _Facts(job)
        self.said: dict[str, float] = {}
        self.held: list[str] | None = []  # of baselines, until it was said which sites there are
        self.lock = threading.Lock()

    def __call__(self, name: str, event: dict[str, Any]) -> None:
        with self.lock:
            self.facts.hear(name, event)
            if event.get("past"):
                return
            for line in self.facts.remarks(name, event):
                self._print(name, line)
            if name == "federated" and event["event"] in ("survey", "failed"):
                self._release()
            last = event.get("round") == self.rounds or event.get("split") == "test"
            if event["event"] == "evaluation" and (last or time.monotonic() - self.said.get(name, 0.0) > 1):
                self.said[name] = time.monotonic()
                self._print(name, self.facts.evaluated(name, event))

    def _release(self) -> None:
        held, self.held = self.held or [], None
        for line in held:
            self._print("", line)

    def _print(self, name: str, text: str) -> None:
        if self.held is not None and name != "federated":
            self.held.append(text)
            return
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

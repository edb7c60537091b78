"""What a person sees while a run is on: bars on a terminal or in a notebook, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from shared.config import Job

Observer = Callable[[str, dict[str, Any]], None]


@contextlib.contextmanager
def showing(job: Job, wanted: bool = True, console: Console | None = None) -> Iterator[Observer | None]:
    """An observer for ``simulations.simulate.run`` that shows its events; None if not wanted."""
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
        self.metric = job.best_metric
        self.steps: dict[str, int] = {}
        self.score: dict[str, str] = {}
        self.sites: dict[str, str] = {}

    def hear(self, name: str, event: dict[str, Any]) -> None:
        if event["event"] == "round":
            self.steps[name] = self.steps.get(name, 0) + sum(item["steps"] for item in event["trained"])
            asked = len(event["trained"]) + len(event["dropped"])
            self.sites[name] = f"{len(event['trained'])}/{asked} sites"
        elif event["event"] == "evaluation":
            row = event["metrics"].get(self.metric)
            if row and row["n"]:
                where = "test " if event["split"] == "test" else ""
                self.score[name] = f"{where}{self.metric} {row['value']:.3f}"

    def describe(self, name: str) -> str:
        return f"{self.sites.get(name, '')} {self.steps.get(name, 0):>5} steps  {self.score.get(name, '')}"


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
                for line in _remarks(name, event):
                    progress.console.print(line, style="yellow", highlight=False, markup=False)

        yield observe


class _Lines:
    """One line per validation, at most one a second per run, and every remark."""

    def __init__(self, job: Job, console: Console) -> None:
        self.console, self.rounds, self.facts = console, job.federation.rounds, _Facts(job)
        self.said: dict[str, float] = {}
        self.lock = threading.Lock()

    def __call__(self, name: str, event: dict[str, Any]) -> None:
        with self.lock:
            self.facts.hear(name, event)
            for line in _remarks(name, event):
                self._print(line)
            last = event.get("round") == self.rounds or event.get("split") == "test"
            if event["event"] == "evaluation" and (last or time.monotonic() - self.said.get(name, 0.0) > 1):
                self.said[name] = time.monotonic()
                self._print(f"{name}: round {event['round']}/{self.rounds} {self.facts.describe(name).strip()}")

    def _print(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def _remarks(name: str, event: dict[str, Any]) -> Iterator[str]:
    """What a person should know at once: who is there, who was dropped and why, warnings."""
    if event["event"] == "survey" and name == "federated":
        for site in event["sites"]:
            skipped = f", {site['skipped']} unreadable" if site["skipped"] else ""
            images = site["images"]
            counts = f"{images['train']} training, {images['val']} validation, {images['test']} test images"
            yield f"{site['name']}: {counts}{skipped}"
    for item in event.get("dropped", []):
        yield f"{name}: {event['event']} {event.get('round', 0)}: {item['site']} not used: {item['reason']}"
    if event["event"] == "warning":
        yield f"{name}: {event['text']}"

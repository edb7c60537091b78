"""What a person sees of a study: bars on a terminal, a line for each cell elsewhere; at the end the tables."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from consilium.study.collect import Found
from consilium.study.compare import spread
from consilium.study.plan import Cell, Plan
from consilium.study.run import Observer
from consilium.study.tables import methods_of, title_of
from consilium.study.verdict import Verdict, with_sd
from server.wording import metric_name, number
from shared.terminal import wrapped


@contextlib.contextmanager
def showing_cells(plan: Plan, console: Console | None = None) -> Iterator[Observer]:
    """An observer for ``run_cells`` that shows what it hears."""
    console = console or Console()
    if console.is_terminal:
        with _bars(plan, console) as observe:
            yield observe
    else:
        yield _Lines(plan, console)


class _Lines:
    """A line for each cell that ended."""

    def __init__(self, plan: Plan, console: Console) -> None:
        self.total, self.console = len(plan.cells), console
        self.ended = self.kept = 0
        self.began: dict[str, float] = {}
        self.score: dict[str, str] = {}

    def __call__(self, cell: Cell, what: str, more: Any) -> None:
        if what == "started":
            self.began[cell.id] = time.monotonic()
        elif what == "news":
            self.score[cell.id] = _score(cell, more)
        else:
            self.ended += 1
            if what == "kept":
                told = "finished before"
            elif what == "failed":
                told = f"FAILED: {more}"
            else:
                seconds = time.monotonic() - self.began[cell.id]
                told = f"{self.score.get(cell.id) or 'done'} ({seconds:.0f} s)"
            line = f"[{self.ended}/{self.total}] {cell.title}: {told}"
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)


@contextlib.contextmanager
def _bars(plan: Plan, console: Console) -> Iterator[Observer]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    bars: dict[str, TaskID] = {}
    with Progress(*columns, console=console, refresh_per_second=4) as progress:
        whole = progress.add_task("cells", total=len(plan.cells), facts="")

        def observe(cell: Cell, what: str, more: Any) -> None:
            if what == "started":
                title = cell.title[:48]
                bars[cell.id] = progress.add_task(
                    f"  {title}", total=cell.job.federation.rounds, facts="reading images"
                )
            elif what == "news":
                progress.update(bars[cell.id], completed=more[0], facts=_score(cell, more))
            else:
                if cell.id in bars:
                    progress.remove_task(bars.pop(cell.id))
                progress.advance(whole)
                if what == "failed":
                    line = f"FAILED {cell.title}: {more}"
                    progress.console.print(line, style="yellow", highlight=False, markup=False)

        yield observe


def _score(cell: Cell, news: tuple[int, int, float | None]) -> str:
    return "" if news[2] is None else f"validation {metric_name(cell.job.best_metric)} {number(news[2])}"


def print_study(found: Found, told: Sequence[Verdict], folder: Path) -> None:
    """For each setting its table and the recommendation, then what failed and where the page is; each sentence as
    wide as the terminal."""
    console = Console()

    def say(text: str, indent: str = "") -> None:
        for line in wrapped(text, indent):
            console.print(line, highlight=False, markup=False, soft_wrap=True)

    if found.plan.quick:
        say(f"ATTENTION: {found.plan.caution}")
    for setting in found.plan.settings:
        if names := methods_of(found, setting):
            console.print(_table(found, setting, names))
        for one in told:
            if one.setting == setting:
                for line in (*one.lines, *one.hospitals, *(f"ATTENTION: {text}" for text in one.warnings)):
                    say(f"{f'[{one.level}] ' if one.level else ''}{line}")
    for failure in found.failures:
        say(f"FAILED {failure.title}: {failure.reason}")
    say(f"page: {folder / 'study.html'}")
    say(f"figures: {folder / 'study.csv'}, {folder / 'sites.csv'}", "  ")


def _table(found: Found, setting: str, names: Sequence[str]) -> Table:
    metric = next(row.metric for row in found.rows if row.setting == setting)
    table = Table(title=escape(setting), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("method", overflow="fold")
    for head in (metric_name(metric), "worst site", "seeds"):
        table.add_column(escape(head), justify="right", no_wrap=True)
    for name in names:
        rows = found.of(setting, name)
        whole = spread(list(found.values(setting, name).values()))
        worst = spread([row.worst for row in rows.values()])
        seeds = f"{len(rows)}/{len(found.plan.seeds)}"
        table.add_row(escape(title_of(found, setting, name)), with_sd(whole, metric), with_sd(worst, metric), seeds)
    return table

"""The table a run ends with."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from server.database.mirror import store_beside
from server.record import reason_words, value_of
from server.wording import metric_name, privacy_words
from shared.config import Job
from shared.tasks import TASKS
from simulations.result import Result

Rows = dict[str, dict[str, Any]]
NAME, MOST = (
    24,
    4,
)  # at least so wide is the column of names, if a name asks for it; at most so many metrics stand beside


def print_result(result: Result) -> None:
    """Print each model's test figures over all sites, then the federated model's per site, and where the report is."""
    scores, job = result.scores, result.job
    federated = scores["federated"]
    models = {"federated": federated}
    models |= {"each site's own": federated["personal"]} if "personal" in federated else {}
    models |= {"pooled": scores["pooled"]} if "pooled" in scores else {}
    models |= {f"only {name}": row for name, row in scores.get("local", {}).items()}
    console = Console()
    if not federated.get("images", 0):
        console.print("no test image at any site: there is no test figure", highlight=False)
    else:
        known = dict.fromkeys([job.best_metric, *TASKS[job.task].metrics])
        metrics = [name for name in known if name in federated["n"]]
        case = TASKS[job.task].case
        own = federated.get("personal", {}).get("sites", {})
        shown = _fitting(metrics, [models, federated["sites"], own], console.width - len(case) - 6)
        console.print(_table("model", escape(f"{job.name}: all sites' test {case}s"), case, shown, models))
        console.print(_table("site", _at_each(job), case, shown, federated["sites"]))
        if own:
            console.print(_table("site", "each site's own model on its test images", case, shown, own))
        note = f"95 % intervals in brackets; each model took {federated['gradient_steps']} gradient steps"
        note = note if len(models) > 1 else note.replace("each", "the")
        if own:
            note += f", with the sites' own {federated['personal']['gradient_steps']}"
        less = [metric_name(name) for name in shown if TASKS[job.task].metrics[name] < 0]
        note += f"; less is better: {', '.join(less)}" if less else ""
        console.print(note + ("; more metrics in the report" if len(shown) < len(metrics) else ""), highlight=False)
    if "privacy" in federated:
        console.print(privacy_words(federated["privacy"]), highlight=False)
    for line in _lost(federated["dropped"]):
        console.print(line, highlight=False, markup=False)
    console.print(f"report: {result.report}", highlight=False, markup=False, soft_wrap=True)
    if (store := store_beside(result.folder)).exists():
        told = f"to look at it in a browser: consilium dashboard --store {os.path.relpath(store)}"
        console.print(told, highlight=False, markup=False, soft_wrap=True)


def _lost(dropped: list[dict[str, Any]]) -> list[str]:
    """Replies that were not used: a site without figures in an evaluation may well have trained."""
    found = Counter(
        (item["site"], "evaluation" if item["step"] == "evaluation" else "training", item["reason"]) for item in dropped
    )
    return [
        f"{'without figures' if step == 'evaluation' else 'not used'}: {site}, {count} "
        f"{'time' if count == 1 else 'times'}: {reason} ({reason_words(reason)})"
        for (site, step, reason), count in found.items()
    ]


def _at_each(job: Job) -> str:
    kept = {"norm": ", with its own normalisation layers", "head": ", with its own head"}
    return f"the federated model at each site{kept.get(job.federation.local, '')}"


def _fitting(metrics: list[str], tables: list[Rows], width: int) -> list[str]:
    """As many of the metrics, from the first, as fit side by side; at least one."""
    names = max((len(name) for rows in tables for name in rows), default=0)
    left = width - min(max(names, len("model")), NAME)
    shown: list[str] = []
    for metric in metrics[:MOST]:
        cells = [value_of(row, metric) for rows in tables for row in rows.values()]
        left -= max(map(len, [metric_name(metric), *cells])) + 3
        if shown and left < 0:
            break
        shown.append(metric)
    return shown


def _table(what: str, title: str, case: str, metrics: list[str], rows: Rows) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(what, overflow="fold")
    for metric in metrics:
        table.add_column(escape(metric_name(metric)), justify="right", no_wrap=True)
    table.add_column(f"{case}s", justify="right", no_wrap=True)
    for name, row in rows.items():
        cells = [escape(value_of(row, metric)) for metric in metrics]
        table.add_row(escape(name), *cells, f"{row.get('images', 0):,}")
    return table

"""The table a run ends with."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from simulations.result import Result


def print_result(result: Result) -> None:
    """Print each model's test figures over all sites, then the federated model's per site, and where the report is."""
    scores = result.scores
    federated = scores["federated"]
    models = {"federated": federated}
    models |= {"pooled": scores["pooled"]} if "pooled" in scores else {}
    models |= {f"only {name}": row for name, row in scores.get("local", {}).items()}
    tested = federated.get("images", 0)
    metrics = [name for name in federated.get("intervals", {}) if ":" not in name and name not in ("loss", "accuracy")]
    console = Console()
    if not tested:
        console.print("no test image at any site: there is no test figure", highlight=False)
    else:
        console.print(_table("model", escape(f"{scores['job']['name']}: all sites' test images"), metrics, models))
        console.print(_table("site", "the federated model at each site", metrics, federated["sites"]))
        note = f"95 % intervals in brackets; each model took {federated['gradient_steps']} gradient steps"
        console.print(note if len(models) > 1 else note.replace("each", "the"), highlight=False)
    for (site, reason), count in Counter((item["site"], item["reason"]) for item in federated["dropped"]).items():
        console.print(f"not used: {site}, {count} times: {reason}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"report: {result.report}", highlight=False, markup=False, soft_wrap=True)


def _table(what: str, title: str, metrics: list[str], rows: dict[str, dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(what, overflow="fold")
    for metric in metrics:
        table.add_column(metric.replace("_", " "), justify="right", no_wrap=True)
    table.add_column("images", justify="right", no_wrap=True)
    for name, row in rows.items():
        table.add_row(escape(name), *(_cell(row, metric) for metric in metrics), str(row.get("images", 0)))
    return table


def _cell(row: dict[str, Any], metric: str) -> str:
    value = row.get(metric)
    if value is None:
        return "–"
    low, high = row["intervals"][metric]
    return f"{value:.3f} ({low:.3f}–{high:.3f})"

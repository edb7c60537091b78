"""The table a run ends with."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from simulations.result import Result


def print_result(result: Result) -> None:
    """Print each model's test figures over all sites and per site, and where the report is."""
    scores = result.scores
    best = result.job.evaluation.best_metric
    metrics = [name for name in scores["federated"].get("intervals", {}) if ":" not in name and name != "loss"]
    models = {"federated": scores["federated"]}
    models |= {"pooled": scores["pooled"]} if "pooled" in scores else {}
    models |= {f"only {name}": row for name, row in scores.get("local", {}).items()}
    table = Table(
        title=f"{scores['job']['name']}: test images of all sites, best round by validation {best}",
        title_justify="left",
    )
    table.add_column("model")
    for metric in metrics:
        table.add_column(f"{metric} [95 %]", justify="right")
    table.add_column("n", justify="right")
    table.add_column("steps", justify="right")
    for name, row in models.items():
        cells = [_cell(row, metric) for metric in metrics]
        table.add_row(name, *cells, str(row.get("n", {}).get("accuracy", 0)), str(row["gradient_steps"]))
    console = Console()
    console.print(table)
    console.print(f"report: {result.report}", highlight=False, soft_wrap=True)


def _cell(row: dict[str, object], metric: str) -> str:
    value = row.get(metric)
    if value is None:
        return "–"
    low, high = row["intervals"][metric]  # type: ignore[index]
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"

"""`consilium track` and `consilium report`: a run in other people's tools, and on paper."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from consilium.cli_runs import STORE_HELP


@click.command(short_help="Show a run in MLflow or TensorBoard.")
@click.argument("run", type=Path)
@click.option("--mlflow", "uri", help="Tracking server, as http://127.0.0.1:5000; or sqlite:///FILE.")
@click.option("--experiment", default="consilium", show_default=True, help="MLflow's experiment.")
@click.option("--tensorboard", "logs", type=Path, help="Folder for TensorBoard's event files.")
@click.option("--follow", is_flag=True, help="Go on until the run is over.")
@click.option("--store", default="", envvar="CONSILIUM_STORE", help=STORE_HELP)
def track(run: Path, uri: str | None, experiment: str, logs: Path | None, follow: bool, store: str) -> None:
    """Write the figures of the run folder RUN to MLflow, to TensorBoard, or to both.

    They need more packages; in the folder of the source: `pip install --constraint constraints.txt --editable
    '.[mlflow,tensorboard]'`. What goes there is what the store has: figures by round, settings, names of sites, the
    report; never an image. Prometheus reads the dashboard's /metrics.
    """
    from server.tracking.follow import track as write
    from shared.errors import UserError

    if uri is None and logs is None:
        raise UserError("name where to: --mlflow URI, --tensorboard FOLDER, or both")

    def start(row: dict[str, Any]) -> Sequence[Any]:
        tools: list[Any] = []
        if uri is not None:
            from server.tracking.mlflow import Mlflow

            tools.append(Mlflow(uri, experiment, run, row))
        if logs is not None:
            from server.tracking.tensorboard import TensorBoard

            tools.append(TensorBoard(logs, row))
        return tools

    count = write(run, store, start, follow, click.echo)
    click.echo(f"{count} figures of {run} are in {' and '.join(str(place) for place in (uri, logs) if place)}")


@click.command(short_help="Write the report of a run anew, also as PDF.")
@click.argument("run", type=Path)
@click.option("--pdf", is_flag=True, help="Also report.pdf; needs Chromium on this machine.")
@click.option("--store", default="", envvar="CONSILIUM_STORE", help=STORE_HELP)
def report(run: Path, pdf: bool, store: str) -> None:
    """Write report.html of the run folder RUN from its store, and with --pdf the same as pages to print."""
    from server.report import write_report
    from shared.errors import UserError

    if not (run / "rounds.jsonl").is_file():
        raise UserError(f"{run}: no run folder; name the --out of a `consilium simulate`, or DIR/runs/RUN")
    page = write_report(run, store)
    click.echo(page)
    if pdf:
        from server.report_pdf import write_pdf

        click.echo(write_pdf(page))

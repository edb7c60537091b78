"""The command `consilium study`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from simulations.ready import ready_study


@click.command()
@click.argument("study", type=ready_study)
@click.option("--data", type=Path, help="Folder of the images, or that the data folders of STUDY lie in.")
@click.option("--out", type=Path, help="Folder for everything the study writes.  [default: studies/NAME]")
@click.option("--workers", type=click.IntRange(1), help="Processor cores to use.  [default: all]")
@click.option("--quick", is_flag=True, help="Two seeds and 4 rounds of each cell: does all of it run?")
def study(study: Path, data: Path | None, out: Path | None, workers: int | None, quick: bool) -> None:
    """Compare settings, seeds, partitions and privacy levels on this machine: STUDY says which; see docs/studies.md.

    Each combination is a run of `simulate`, several at a time. Ends with a recommendation, study.html and study.csv.
    Ctrl-C stops it; the same command goes on: what is finished is not run again. Exit code 1: a cell failed.
    """
    from consilium.study.plan import read_plan

    plan = read_plan(study, data, quick)
    from consilium.study.files import write_study
    from consilium.study.run import check_jobs, run_cells
    from consilium.study.show import print_study, showing_cells

    check_jobs(plan)
    folder = out or Path("studies") / (plan.name + ("-quick" if quick else ""))
    text = study.read_text(encoding="utf-8")
    try:
        with showing_cells(plan) as observe:
            outcomes = run_cells(plan, text, folder, workers, observe)
    except KeyboardInterrupt:
        click.echo("what is finished is kept; to go on, type the same again", err=True)
        raise
    found, told = write_study(plan, outcomes, text, folder)
    print_study(found, told, folder)
    sys.exit(1 if found.failures else 0)

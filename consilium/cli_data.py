"""The commands on images: `consilium cohort` and `consilium site`."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import click

from shared.errors import UserError
from shared.settings import FORMATS
from simulations.cohorts import COHORTS
from simulations.ready import ready_job


@click.group()
def cohort() -> None:
    """Invented hospitals with real files, to try things on."""


@cohort.command("make")
@click.argument("directory", type=Path)
@click.option("--kind", default="chest", show_default=True, help=f"What is invented: {', '.join(COHORTS)}.")
@click.option("--sites", type=click.IntRange(1, 1000), help="Hospitals.  [default: the kind's own number]")
@click.option("--patients", type=click.IntRange(1), help="Patients per site.  [default: the kind's own number]")
@click.option("--seed", type=int, default=0, show_default=True)
def cohort_make(directory: Path, kind: str, sites: int | None, patients: int | None, seed: int) -> None:
    """Write images of phantoms as files of several hospitals whose scanners differ.

    Same arguments, same files to the byte; a cohort that is already there is left as it is.
    """
    from shared.config import nearest

    if kind not in COHORTS:
        raise UserError(f"--kind {kind}: must be one of {', '.join(COHORTS)}{nearest(kind, COHORTS)}")
    from consilium.progress import counting

    given = {key: value for key, value in {"sites": sites, "patients": patients}.items() if value is not None}
    try:
        with counting("drawing patients") as progress:
            made = import_module(COHORTS[kind]).make(directory, seed=seed, progress=progress, **given)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from None
    for folder in made:
        files = sum(path.is_file() for path in folder.rglob("*"))
        click.echo(f"{folder}: {files} files")


@click.group()
def site() -> None:
    """For the hospital: check the images before joining, see what the privacy budget is."""


@site.command("check")
@click.argument("file", type=Path, required=False)
@click.option("--data", type=Path, help="A folder of images, where there is no site.toml yet.")
@click.option(
    "--format",
    "form",
    default="auto",
    show_default=True,
    help=f"{', '.join(FORMATS)}; dicom: any DICOM file below the folder, labels not needed.",
)
@click.option("--job", "job_file", type=ready_job, help="Check labels against this job's classes.")
@click.option(
    "--limit", type=float, help="Largest share of unreadable files that is still fit.  [default: site.toml's, or 0.05]"
)
@click.option("--offline", is_flag=True, help="Do not ask the server of site.toml's [server].")
def site_check(
    file: Path | None, data: Path | None, form: str, job_file: Path | None, limit: float | None, offline: bool
) -> None:
    """Look at all that a site needs to join: images, privacy rules, machine, key, the way to the server.

    FILE is a site.toml. Each line begins with OK, ATTENTION or STOP, and the latter two say what to do. Every image is
    read; nothing of it is sent. The server of [server], if there is one, is asked for its name and version.

    Exit code 0: fit. Exit code 1: refused, and why. Exit code 2: the question was wrong.
    """
    from client.check import check_site

    if file is None:
        report = check_site(file, data, form, job_file, limit)
        for line in report.lines():
            click.echo(line)
        sys.exit(0 if report.fit else 1)
    from client.preflight import Finding, Level, after, before, verdict
    from shared.config import load_job

    found: list[Finding] = []

    def show(finding: Finding) -> None:
        found.append(finding)
        for line in finding.styled():
            click.echo(line)

    job = load_job(job_file) if job_file else None
    for finding in before(file, job, offline):
        show(finding)
    report = check_site(file, data, form, job_file, limit)
    for line in report.details():
        click.echo(line)
    for finding in after(report, file, job):
        show(finding)
    click.echo(verdict(found, report.refused))
    sys.exit(1 if report.refused or any(finding.level is Level.STOP for finding in found) else 0)


@site.command("budget")
@click.argument("file", type=Path)
@click.option("--plot", type=Path, metavar="FILE.html", help="Also write a figure of epsilon over time.")
@click.option("--verify", is_flag=True, help="Check that no entry of the ledger was changed or removed.")
@click.option("--seal", default="", help="With a seal that --verify gave earlier: check that it is still there.")
def site_budget(file: Path, plot: Path | None, verify: bool, seal: str) -> None:
    """How much privacy was spent on a site's images, by which runs, and what is left.

    FILE is a site.toml. Exit code 0: all is well. Exit code 1: the ledger is broken. Exit code 2: the question was
    wrong.
    """
    from consilium.cli_site import budget

    lines, whole = budget(file, plot, verify, seal)
    for line in lines:
        click.echo(line)
    sys.exit(0 if whole else 1)

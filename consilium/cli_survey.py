"""`consilium survey`: what the sites' images are like, before anything is trained."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from simulations.ready import ready_job

if TYPE_CHECKING:
    from server.survey import Survey
    from shared.config import Job
    from shared.tasks import Sums


@click.command()
@click.argument("job", type=ready_job)
@click.option("--data", type=Path, required=True, help="Folder of the sites' images, as for simulate.")
@click.option("--out", type=Path, metavar="FILE.json", help="Write the sums there, of each site and together.")
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Worker processes.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a setting of the job.")
def survey(job: Path, data: Path, out: Path | None, workers: int, settings: tuple[str, ...]) -> None:
    """Ask every site how many images of which class it has, of about how many patients, and how grey they are.

    Each site answers within its own rules: small counts are 0, and a site may decline, which is said. A site whose
    images look unlike the others' is named, with the setting that helps (docs/harmonisation.md). Exit code 1 if none
    answers.
    """
    from shared.config import load_job

    loaded = load_job(job, settings)
    from simulations.survey import survey_folder

    found = survey_folder(loaded, data, workers)
    _print(found, loaded)
    if out:
        _write(found, loaded, out)
        click.echo(f"written: {out}")
    sys.exit(0 if found.sites else 1)


def _together(found: Survey) -> Sums:
    from shared.tasks import add_sums

    return add_sums(found.sites.values())


def _print(found: Survey, job: Job) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from shared.cases import SPLITS
    from shared.statistics import split_of
    from shared.tasks import TASKS

    facts = TASKS[job.task]
    names = [*job.classes, *job.labels]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=f"{escape(job.name)}: {facts.counted} by class")
    table.add_column("site", overflow="fold", min_width=min(max(map(len, found.sites), default=0), 20))
    for head in ("split", f"{facts.case}s", "patients", *names, "grey ± sd"):
        table.add_column(escape(head), justify="left" if head == "split" else "right", no_wrap=True)
    rows = dict(found.sites) | ({"all": _together(found)} if len(found.sites) > 1 else {})
    for site, sums in rows.items():
        for split in SPLITS:
            part = split_of(sums, split)
            counts = [f"{count:,}" for count in part.classes[: len(names)]]
            grey = f"{part.mean:.2f} ± {part.sd:.2f}" if sum(part.grey) else "–"
            table.add_row(
                escape(site) if split == SPLITS[0] else "", split, f"{part.images:,}", part.patients, *counts, grey
            )
    console = Console()
    if rows:
        console.print(table)
        console.print("grey values, dark to bright:", highlight=False)
        for site, sums in rows.items():
            whole = [sum(bins) for bins in zip(*(split_of(sums, split).grey for split in SPLITS), strict=True)]
            console.print(f"  {site:<20} {_bars(whole)}", highlight=False, markup=False, soft_wrap=True)
        note = "grey values from 0 to 1 as the network gets them, padding included; counts a site holds back are 0"
        console.print(note, highlight=False, soft_wrap=True)
    for line in _warnings(found, job):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    from server.record import reason_words

    for name, reason in found.dropped:
        console.print(
            f"no answer from {name}: {reason_words(reason)} ({reason})", highlight=False, markup=False, soft_wrap=True
        )


def _warnings(found: Survey, job: Job) -> list[str]:
    """Who looks unlike the others and what to set; where grey values differ, a scale for Nyúl's rule, too."""
    from server.likeness import landmarks, unlike

    items = unlike(found.sites, job)
    lines = [f"ATTENTION {item}" for item in items]
    if any("zscore" in item.setting for item in items):
        scale = landmarks(_together(found))
        lines.append(f'for data.harmonise = "nyul", of the grey values of all: data.landmarks = "{scale}"')
    return lines


def _bars(histogram: list[int]) -> str:
    """A histogram as a row of bars, the highest full."""
    return "".join(" ▁▂▃▄▅▆▇█"[-(-8 * height // max(max(histogram), 1))] for height in histogram)


def _write(found: Survey, job: Job, out: Path) -> None:
    from server.likeness import unlike
    from server.store import write_json
    from shared import __version__
    from shared.errors import UserError

    dropped = [{"site": name, "reason": reason} for name, reason in found.dropped]
    content: dict[str, object] = {"version": __version__, "job": job.flat(), "job_sha256": job.sha256}
    content |= {"sites": found.sites, "together": _together(found), "dropped": dropped}
    content["unlike"] = [item._asdict() for item in unlike(found.sites, job)]
    try:
        write_json(out, content)
    except OSError as error:
        raise UserError(f"--out {out}: cannot write there: {error.strerror}") from None

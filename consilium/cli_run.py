"""The commands of a real federation: `consilium server`, `consilium run`, and `consilium site start` and `approve`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from consilium.cli_data import site
from consilium.cli_runs import STORE_HELP
from simulations.ready import ready_job


@click.group()
def server() -> None:
    """For the coordinator: run the federation's server."""


@server.command("start")
@click.argument("folder", type=Path)
def server_start(folder: Path) -> None:
    """Run the server of the federation that `consilium provision` set up in FOLDER; Ctrl-C ends it.

    It keeps Flower's SuperLink, its executor and the gateway running, and takes up new sites, revoked ones and renewed
    certificates by itself.
    """
    from server.running import start

    start(folder, _say)


@server.command("status")
@click.argument("folder", type=Path)
def server_status(folder: Path) -> None:
    """Does the server run, which sites are connected, how long is its certificate valid? Exit code 1: not well."""
    from server.status import status

    lines, well = status(folder)
    for line in lines:
        click.echo(line)
    sys.exit(0 if well else 1)


@click.command()
@click.argument("job", type=ready_job, required=False)
@click.option("--federation", "folder", type=Path, required=True, help="The folder that `consilium provision` set up.")
@click.option("--heldout", type=Path, help="site.toml of images the server itself holds, to be evaluated on as well.")
@click.option("--store", default="", envvar="CONSILIUM_STORE", help=STORE_HELP)
@click.option("--seed", type=int, help="Shorthand for --set seed=N.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a setting of JOB; repeatable.")
@click.option("--detach", is_flag=True, help="Submit, say the run's name, and leave it to itself.")
@click.option("--attach", metavar="RUN", help="Follow a run that was submitted before.")
@click.option("--resume", metavar="RUN", help="Go on with a run that broke off, after its last whole round.")
@click.option("--stop", metavar="RUN", help="End a run.")
def run(
    job: Path | None,
    folder: Path,
    heldout: Path | None,
    store: str,
    seed: int | None,
    settings: tuple[str, ...],
    detach: bool,
    attach: str | None,
    resume: str | None,
    stop: str | None,
) -> None:
    """Train JOB at the hospitals of a federation whose server is started, and follow it.

    Ctrl-C only stops following: the run goes on, and --attach follows it again. Everything of a run lies in
    FOLDER/runs/RUN. Exit code 1: the run failed or was stopped.
    """
    from consilium.federated import Runs

    runs = Runs(folder)
    given = [job is not None, attach is not None, resume is not None, stop is not None]
    if sum(given) != 1:
        raise click.UsageError("give one of: JOB, --attach RUN, --resume RUN, --stop RUN")
    if stop is not None:
        click.echo(runs.stop(stop))
        return
    if job is not None:
        name = runs.submit(job, [*settings, *([f"seed={seed}"] if seed is not None else [])], heldout, store)
    elif resume is not None:
        name = runs.resume(resume)
    else:
        name = str(attach)
    click.echo(f"run {name}; its files: {runs.path(name)}")
    if detach:
        click.echo(f"to follow it: consilium run --federation {folder} --attach {name}")
        return
    sys.exit(runs.follow(name))


@site.command("start")
@click.argument("file", type=Path)
def site_start(file: Path) -> None:
    """Take part in the federation that FILE, a site.toml, names in [server]; Ctrl-C ends it.

    Connections go outwards only. A site that was cut off joins again by itself.
    """
    from client.node import start

    start(file, _say)


@site.command("approve")
@click.argument("file", type=Path)
@click.argument("bundle", required=False)
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--full", is_flag=True, help="Show every line that differs, not only which files.")
def site_approve(file: Path, bundle: str | None, yes: bool, full: bool) -> None:
    """Which programs did a server send that this site refused to run; how do they differ; may one run from now on?

    FILE is a site.toml, BUNDLE the beginning of a program's SHA-256. Without BUNDLE those that wait are listed.
    """
    from client.bundles import Bundles
    from shared.sitefile import read_site

    read_site(file)
    bundles = Bundles(file.resolve().parent)
    if bundle is None:
        for digest, path in bundles.waiting().items():
            click.echo(f"{digest[:12]}  {path.stat().st_size / 1e6:.1f} MB  refused; {file} does not know it")
        if not bundles.waiting():
            click.echo("no program waits: all that came was the one that is installed here")
        return
    digest, found = bundles.find(bundle)
    click.echo(f"program {digest}\ndiffers from the installed one in {len(found)} files:")
    for difference in found:
        added = sum(line.startswith("+") and not line.startswith("+++") for line in difference.lines)
        removed = sum(line.startswith("-") and not line.startswith("---") for line in difference.lines)
        click.echo(f"  {difference.what:<8} {difference.path}  (+{added} -{removed} lines)")
        for line in difference.lines if full else []:
            click.echo(f"    {line}")
    if not yes:
        click.confirm("May it run here, with all that it can read on this machine?", abort=True)
    bundles.approve(digest)
    click.echo("approved: it runs from the next message on")


def _say(text: str) -> None:
    click.echo(text)
    sys.stdout.flush()

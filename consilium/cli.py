"""The command ``consilium``. Every command is a few lines over a function; torch is imported only where one trains."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from consilium.cli_dashboard import dashboard
from consilium.cli_data import cohort, site
from consilium.cli_federation import provision, site_fingerprint, site_keygen
from consilium.cli_log import site_log
from consilium.cli_run import run, server
from consilium.cli_runs import STORE_HELP, runs
from consilium.cli_ship import card, export, registry
from consilium.cli_study import study
from consilium.cli_survey import survey
from consilium.cli_track import report, track
from consilium.cli_trained import audit, explain, generate, predict
from consilium.cli_tune import tune
from shared import __version__
from shared.errors import UserError
from shared.terminal import wrapped
from simulations.ready import ready_job, ready_jobs

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def main() -> None:
    """Entry point: a person's mistake is one line and exit code 2, a failed run exit code 1, Ctrl-C 130."""
    try:
        commands(standalone_mode=False)
    except UserError as error:
        click.echo(f"consilium: {error}", err=True)
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("consilium: stopped", err=True)
        sys.exit(130)
    except Exception as error:
        if type(error).__name__ != "RunFailed":
            raise
        click.echo(f"consilium: the run failed: {error}", err=True)
        sys.exit(1)


@click.group(context_settings=SETTINGS)
@click.version_option(__version__, prog_name="consilium")
def commands() -> None:
    """Federated learning for medical imaging: hospitals train one model together, no image leaves any of them.

    \b
    Researcher, to play many hospitals on one machine:
      consilium cohort make demo/cohort
      consilium survey JOB.toml --data demo/cohort
      consilium simulate JOB.toml --data demo/cohort --baselines
      consilium study STUDY.toml --data demo/cohort
    \b
    Coordinator of a real federation:
      consilium provision federation.toml --out DIR
      consilium server start DIR
      consilium run JOB.toml --federation DIR
    \b
    Hospital data manager, to see whether all is fit to join, to join, and to see what left:
      consilium site check SITE.toml
      consilium site start SITE.toml
      consilium site log SITE.toml
      consilium audit RUN --site SITE.toml
    \b
    Whoever has a trained model, the folder RUN that simulate wrote:
      consilium predict RUN IMAGES --out FOLDER
      consilium explain RUN --image FILE --out FILE.png
      consilium export RUN --out FOLDER

    A job is a TOML file, or the name of one that comes with Consilium: `consilium job --ready` lists these,
    `consilium job --keys` explains every setting, `consilium models` lists the networks.
    """


@commands.command()
@click.argument("job", type=ready_job)
@click.option(
    "--data", type=Path, required=True, help="Folder of the sites' images; see docs/researcher.md for layouts."
)
@click.option("--out", type=Path, help="Folder for everything the run writes.  [default: runs/NAME]")
@click.option(
    "--baselines", is_flag=True, help="Also train each site alone and all pooled, with the same gradient steps."
)
@click.option("--cross-site", is_flag=True, help="Also train each site alone and test every model at every site.")
@click.option("--workers", type=click.IntRange(1), help="Worker processes.  [default: one per core]")
@click.option("--devices", default="", metavar="LIST", help="Where they compute: cpu, or a list such as cuda:0,cuda:1.")
@click.option("--per-device", type=click.IntRange(1), help="How many workers share a GPU.  [default: 1]")
@click.option("--engine", type=click.Choice(["local", "ray"]), default="local", help="ray: workers on a Ray cluster.")
@click.option("--address", default="", help="With --engine ray: the cluster's address, or auto.  [default: Ray here]")
@click.option("--seed", type=int, help="Shorthand for --set seed=N.")
@click.option("--heldout", type=Path, help="site.toml of images the server itself holds, to be evaluated on as well.")
@click.option("--store", default="", envvar="CONSILIUM_STORE", help=STORE_HELP)
@click.option("--cache", type=Path, help="Folder for decoded images, for runs to share.  [default: within --out]")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a setting of the job; repeatable."
)
def simulate(
    job: Path, data: Path, out: Path | None, seed: int | None, settings: tuple[str, ...], **options: Any
) -> None:
    """Train JOB on this machine, every site played by a worker process; ends with a table and a report.

    The result is the same whatever the number of workers: same job, same data, same seed, same model to the bit.
    """
    from shared.config import load_job

    loaded = load_job(job, [*settings, *([f"seed={seed}"] if seed is not None else [])])
    from consilium.notebook import run
    from consilium.tables import print_result
    from simulations.simulate import run_folder

    try:
        result = run(loaded, data, out, **options)
    except KeyboardInterrupt:
        folder = run_folder(loaded, out)
        kept = f"; what there was is in {folder}; the same command keeps it aside and begins anew"
        click.echo(f"consilium: stopped{kept if folder.exists() else ''}", err=True)
        sys.exit(130)
    print_result(result)


@commands.command()
@click.argument("job", type=ready_job, required=False)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a setting; repeatable.")
@click.option("--keys", is_flag=True, help="Explain every setting with its default and allowed values.")
@click.option("--ready", is_flag=True, help="List the jobs that come with Consilium; a name stands for the file.")
def job(job: Path | None, settings: tuple[str, ...], keys: bool, ready: bool) -> None:
    """Print JOB resolved, every setting with its value, and the hash that stands in every result of it."""
    if ready:
        for name, purpose in ready_jobs().items():
            click.echo("\n".join([name, *wrapped(f"    {purpose}", "    ")]))
        return
    from shared.config import Job, job_from_flat, knobs, load_job, parse_override

    if keys:
        for key, item in knobs().items():
            meta = item.metadata
            allowed = f" ({' | '.join(meta['choices'])})" if meta["choices"] else ""
            lines = [
                *wrapped(f"{key} = {item.default!r}{allowed}", "        "),
                *wrapped(f"    {meta['help']}", "    "),
            ]
            click.echo("\n".join(lines))
        return
    loaded = load_job(job, settings) if job else job_from_flat(Job().flat() | dict(map(parse_override, settings)))
    click.echo(loaded.toml().rstrip())
    click.echo(f"\n# sha256 {loaded.sha256}")


@commands.command(short_help="List the networks there are.")
@click.argument("task", required=False, default="")
def models(task: str) -> None:
    """List the networks there are, of TASK or of every task: parameters, and the shape of one case as it goes in."""
    from consilium.models import lines

    for line in lines(task):
        click.echo(line)


@commands.command()
def strategies() -> None:
    """List the federated strategies by name, and the choices that each axis of a strategy has."""
    from consilium.strategies import lines

    for line in lines():
        click.echo(line)


commands.add_command(cohort)
commands.add_command(site)
commands.add_command(survey)
commands.add_command(tune)
commands.add_command(study)
commands.add_command(server)
commands.add_command(run)
commands.add_command(runs)
commands.add_command(predict)
commands.add_command(generate)
commands.add_command(explain)
site.add_command(site_log)
commands.add_command(audit)
commands.add_command(export)
commands.add_command(card)
commands.add_command(registry)
commands.add_command(provision)
site.add_command(site_keygen)
site.add_command(site_fingerprint)
commands.add_command(dashboard)
commands.add_command(track)
commands.add_command(report)

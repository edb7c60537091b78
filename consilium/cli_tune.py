"""`consilium tune`: what a machine can do with a job."""

from __future__ import annotations

from pathlib import Path

import click

from simulations.ready import ready_job


@click.command()
@click.argument("job", type=ready_job)
@click.option("--data", type=Path, required=True, help="Folder of the sites' images, as for simulate.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a setting of JOB; repeatable.")
def tune(job: Path, data: Path, settings: tuple[str, ...]) -> None:
    """Find what suits JOB on this machine, and print the words to add to `consilium simulate`.

    Measured are the largest batch that fits into memory, float32 against bfloat16 where the machine computes in it, and
    the number of workers. The batch size stays the job's, so that what is learnt does: one that does not fit is
    computed in parts.
    """
    import tempfile

    from shared.config import load_job
    from simulations.tuning import tune as measured

    with tempfile.TemporaryDirectory() as folder:
        advice = measured(load_job(job, settings), data, Path(folder), click.echo)
    click.echo(f"largest batch that fits: {advice.largest}")
    click.echo(f"\nconsilium simulate {job} --data {data} {advice.line()}")

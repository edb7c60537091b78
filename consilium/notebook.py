"""``run`` with the progress display, for notebooks and scripts."""

from __future__ import annotations

from pathlib import Path

from consilium.progress import showing
from shared.config import Job, load_job
from simulations import simulate
from simulations.result import Result


def run(
    job: Job | str | Path,
    data: str | Path,
    out: str | Path | None = None,
    *,
    workers: int | None = None,
    baselines: bool = False,
    cross_site: bool = False,
    heldout: str | Path | None = None,
    progress: bool = True,
    store: str = "",
    devices: str = "",
    per_device: int | None = None,
    engine: str = "local",
    address: str = "",
) -> Result:
    """Simulate ``job`` on the sites in ``data`` and show progress; see ``simulations.simulate.run``."""
    job = job if isinstance(job, Job) else load_job(job)
    with showing(job, progress) as observe:
        return simulate.run(
            job,
            data,
            out,
            workers=workers,
            baselines=baselines,
            cross_site=cross_site,
            heldout=heldout,
            observe=observe,
            store=store,
            devices=devices,
            per_device=per_device,
            engine=engine,
            address=address,
        )

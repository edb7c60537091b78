"""``run`` with the progress display, for notebooks and scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

from consilium.progress import showing
from shared.config import Job, load_job
from simulations import simulate
from simulations.ready import ready_job
from simulations.result import Result


def run(
    job: Job | str | Path,
    data: str | Path,
    out: str | Path | None = None,
    *,
    progress: bool = True,
    **options: Unpack[simulate.Options],
) -> Result:
    """Simulate ``job`` on the sites in ``data`` and show progress.

    ``options`` are those of ``simulations.simulate.run``, such as ``baselines=True`` or ``workers=4``.
    """
    job = job if isinstance(job, Job) else load_job(ready_job(job))
    with showing(job, progress) as observe:
        return simulate.run(job, data, out, observe=observe, **options)

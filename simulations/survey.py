"""Survey the sites of a folder on this machine: the real client and its rules, no training."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from server.survey import Survey, survey
from shared.config import Job
from shared.tasks import load_task
from simulations.engine import LocalGrid
from simulations.pool import WorkerPool
from simulations.sites import find_sites, node_of


def survey_folder(job: Job, data: Path, workers: int = 1) -> Survey:
    """What the sites found in ``data`` tell of their images for ``job``.

    Raises:
        UserError: bad input, in one line.
    """
    load_task(job.task).check(job)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="consilium-survey-") as name:
        folder = Path(name)
        files = find_sites(data, job, folder)
        with WorkerPool("client.app:app", workers) as pool:
            nodes = [node_of(folder / "sites", file) for file in files]
            return survey(LocalGrid(pool, nodes, job.flat()), job)

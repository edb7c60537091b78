"""What a federated model must be held against: each site alone, and all images in one place, trained as long."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from server.rounds import Run
from shared.config import Job, Scalar, job_from_flat
from shared.settings_federation import nothing_shared
from shared.sitefile import read_site
from simulations.engine import grid_of
from simulations.pool import WorkerPool
from simulations.sites import node_of

if TYPE_CHECKING:  # Ray takes a second to import, and few need it
    from simulations.ray_pool import RayPool

POOLED = "pooled"


def baselines_of(
    pool: WorkerPool | RayPool, files: Sequence[Path], jury: Run, store: str, pooled: bool
) -> dict[str, Run]:
    """A federation of one for each site alone and, if wanted, for all sites pooled.

    Each is tested on all sites' test images, by ``jury``.
    """
    alone = job_of_one(jury)
    homes = jury.folder
    named = {read_site(file).name: file for file in files}
    runs: dict[str, Run] = {}
    # Of a site that is not in the federation the pooled model has nothing either.
    models = {POOLED: [named[place.name] for place in jury.places]} if pooled else {}
    # No site's name has a blank in it, so that a site called "pooled" is not taken for the pooled baseline.
    models |= {f"only {place.name}": [named[place.name]] for place in jury.places if place.images["train"]}
    for model, chosen in models.items():
        label = model.replace("only ", "local-")
        node = node_of(homes / label, chosen[0], label, chosen[1:])
        grid = grid_of(pool, [node], alone, homes / label, 1)
        runs[model] = Run(grid, alone, homes / label, jury=jury, reference=jury.reference, store=store)
    return runs


def job_of_one(jury: Run) -> Job:
    """The job of a model that nobody shares: per round as many gradient steps as all sites of ``jury`` together take,
    with the same batch size, augmentation and schedule; no bound on a round, which goes as far and takes as long."""
    job = jury.job
    # Sites that train in epochs take steps by their size: in a round with a share of the sites, as many in the mean.
    each = [job.local_steps(place.images["train"]) for place in jury.places if place.images["train"]]
    sites = len(jury.sample(1))
    if job.federation.order == "buffered":  # a round ends with so many replies
        sites = min(sites, job.federation.buffer)
    per_round = round(sites * sum(each) / max(len(each), 1))
    length: dict[str, Scalar] = {
        "federation.round_timeout": min(job.federation.round_timeout * max(sites, 1), 1e7),
        "train.local_steps": max(per_round, 1),
        "train.local_epochs": 0.0,
        "federation.min_sites": 1,
        "federation.fraction": 1.0,
    }
    return job_from_flat(job.flat() | nothing_shared() | length | _privacy_of_one(job))


def _privacy_of_one(job: Job) -> dict[str, Scalar]:
    """What privacy is left to a node alone: it has nobody to be summed with, nor to be hidden among."""
    alone: dict[str, Scalar] = {"privacy.secure_aggregation": False}
    if job.privacy.dp == "distributed":  # it adds all of the noise itself
        return alone | {"privacy.dp": "local"}
    if job.privacy.dp == "central":
        return alone | {"privacy.dp": "none", "privacy.epsilon": 0.0, "privacy.noise_multiplier": 0.0}
    return alone

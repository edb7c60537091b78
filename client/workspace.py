"""A site at work: its decoded images, its model, its log.

What is costly is kept in this process for the next message: the opened data sets and the built network.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from flwr.app import Context, Message
from torch import Tensor, nn

from client.counts import Told, tell
from client.policy import Policy, read_policy, require, together
from client.sitelog import write_log as write_log
from shared.config import Job, Scalar
from shared.errors import SiteRefusal
from shared.imaging.dataset import Dataset, concatenate, load_dataset
from shared.samples import read_samples
from shared.sitefile import read_site
from shared.tasks import load_task
from shared.training import pick_device
from shared.weights import REFERENCE, home_names


@dataclass(frozen=True)
class Workspace:
    """What one message works on."""

    name: str
    home: Path
    data: Dataset
    policy: Policy
    told: dict[str, Told]
    files: tuple[Path, ...] = ()  # the site.toml of every site whose images these are


def find_sites(node: dict[str, Scalar], run: dict[str, Scalar]) -> tuple[str, Path, list[Path]]:
    """Name, home and site.toml files of a node, from what the engine or the hospital configured.

    ``site`` in the node's config names the site.toml (several, one a line, are pooled). Flower's own
    simulation engine gives nodes only a number: then the run's ``run.sites`` folder holds one site.toml per number.
    """
    if "site" in node:
        files = [Path(part) for part in str(node["site"]).splitlines()]
    elif run.get("run.sites"):
        files = sorted(Path(str(run["run.sites"])).glob("*/site.toml"))
        number = int(node["partition-id"])
        if number >= len(files):
            raise SiteRefusal("no-site", f"{run['run.sites']} holds {len(files)} sites, this is number {number + 1}")
        files = [files[number]]
    else:
        raise SiteRefusal("no-site", "no site file: start the node with --node-config 'site=\"/path/to/site.toml\"'")
    home = Path(str(node["home"])) if "home" in node else files[0].parent
    name = str(node.get("name", "")) or read_site(files[0]).name
    return name, home, files


def run_name(context: Context) -> str:
    """Which run a message belongs to; a resumed one keeps its name, though Flower gives it another number.

    Raises:
        SiteRefusal: the name is not one that a run may have.
    """
    name = str(context.run_config.get("run.id") or context.run_id)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]{0,63}", name):
        raise SiteRefusal("bad-configuration", f"run.id = {name!r}: not a name that a run may have")
    return name


def open_workspace(node: dict[str, Scalar], run: dict[str, Scalar], job: Job) -> Workspace:
    """The node's workspace, decoding its images if that was not done before.

    Raises:
        SiteRefusal: the site cannot take part, or its rules do not grant the job; says why.
        UserError: the site's file is wrong.
    """
    name, home, files = find_sites(node, run)
    stamps = tuple((str(file), file.stat().st_mtime_ns if file.exists() else 0) for file in files)
    return Workspace(name, home, *_open_data(stamps, str(home), job, times_looked(home)), tuple(files))


def look_again(node: dict[str, Scalar], run: dict[str, Scalar]) -> None:
    """From now on look at the node's tables and files anew, as a run begins: a patient may have been taken out."""
    home = str(find_sites(node, run)[1])
    _looked[home] += 1
    if _looked[home] > 1:  # what an earlier run opened is not asked for again
        _open_data.cache_clear()


def times_looked(home: Path) -> int:
    """How often ``look_again`` was called for the node of this home."""
    return _looked[str(home)]


_looked: Counter[str] = Counter()


@lru_cache(maxsize=256)
def _open_data(
    files: tuple[tuple[str, int], ...], home: str, job: Job, looked: int
) -> tuple[Dataset, Policy, dict[str, Told]]:
    """The images of all the site files, once every one's rules grant the job; how they may be told of."""
    paths = [Path(file) for file, _ in files]
    sites = [read_site(path, Path(home)) for path in paths]
    policies = [read_policy(path) for path in paths]
    for policy in policies:  # before images are decoded: with fewer patients than this it is refused in any case
        require(policy, job, policy.min_patients)
    parts = [load_dataset(read_samples(site, job), site, job) for site in sites]
    for policy, part in zip(policies, parts, strict=True):
        require(policy, job, len({sample.patient for sample in part.subset("train").samples}))
    data = concatenate(parts)
    policy = together(policies, [len(part.subset("train")) for part in parts])
    return data, policy, tell(data, job, policy)


@lru_cache(maxsize=2)
def open_model(job: Job) -> nn.Module:
    """The job's network; every message first puts the weights it was sent into it."""
    model: nn.Module = load_task(job.task).build_model(job)
    return model


def measured(model: nn.Module, message: Message, job: Job) -> nn.Module:
    """The model on its device, with the network that it is measured by, if any."""
    if REFERENCE in message.content.array_records:
        reference = message.content.array_records[REFERENCE].to_torch_state_dict()
        model.get_submodule(REFERENCE).load_state_dict(reference)
    return model.to(pick_device(job))


@lru_cache(maxsize=2)
def own_start(job: Job) -> dict[str, Tensor]:
    """What stays at a site as the job's network begins with it; the opened network may hold another site's by now."""
    model: nn.Module = load_task(job.task).build_model(job)
    state = model.state_dict()
    return {name: state[name].detach().clone() for name in home_names(model, job)}

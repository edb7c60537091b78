"""A run folder opened for use: its job, and its network with the weights it ended with."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from server.store import read_events
from shared import __version__
from shared.config import Job, load_job
from shared.errors import UserError
from shared.sitefile import OWN_FOLDER
from shared.tasks import load_task
from shared.training import pick_device
from shared.weights import REFERENCE, frozen_digest, keeps_own, put, whole

OWN_FILE = f"{OWN_FOLDER}/personal/RUN.safetensors"
WEIGHTS = {"best": "model.safetensors", "last": "last.safetensors"}


class TrainedModel(NamedTuple):
    """A network ready to predict, on its device; ``facts`` is what its file says of it: job, round, version, model."""

    job: Job
    task: ModuleType
    model: nn.Module
    device: torch.device
    facts: dict[str, str]
    file: Path


def open_run(run: Path, weights: str = "best", device: str = "auto", parts: Path | None = None) -> TrainedModel:
    """The network of a run folder with its ``best`` or ``last`` weights, on ``device``.

    ``parts`` is a site's own model of this run, which is taken instead.

    Raises:
        UserError: no run folder, no such weights yet, weights that are not of this job, or of a part of it only.
    """
    if weights not in WEIGHTS:
        raise UserError(f"--weights {weights}: must be one of {', '.join(WEIGHTS)}")
    if not (run / "job.toml").is_file():
        raise UserError(f"{run}: no run folder, there is no job.toml in it; name the --out of a `consilium simulate`")
    job = load_job(run / "job.toml")
    task = load_task(job.task)
    task.check(job)
    where = pick_device(job.replace(train__device=device))
    if parts is None and not whole(job):
        kept = {"norm": "normalisation layers", "head": "head"}[job.federation.local]
        raise UserError(
            f"{run}: each site kept its own {kept} (federation.local), so the run has no whole model; at a site, give "
            f"its own: consilium predict, explain or export with --site-parts {OWN_FILE}"
        )
    file = parts or run / WEIGHTS[weights]
    arrays, facts = _read_weights(file)
    if facts.get("job") != job.sha256 and (parts or facts.get("version") == __version__):
        raise UserError(f"{file}: was trained by another job than {run / 'job.toml'}, which was changed since")
    build = _with_own if parts else _with_weights
    model = build(job, task, arrays, facts, file)
    return TrainedModel(job, task, model.to(where).eval(), where, facts, file)


def facts_of(trained: TrainedModel) -> dict[str, Any]:
    """Which model it is, of which round of which job: for what stands beside everything made with it."""
    return {
        "version": __version__,
        "weights": str(trained.file.resolve()),
        "round": int(trained.facts.get("round", 0)),
        "task": trained.job.task,
        "model": trained.job.model.name,
        "job_sha256": trained.job.sha256,
    }


def _read_weights(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file written by ``server.store.write_model``, and its facts."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        other = next((name for name, path in WEIGHTS.items() if (file.parent / path).is_file()), None)
        hint = f"there is --weights {other}" if other else "the run has not finished a round"
        raise UserError(f"{file}: no such file; {hint}")
    try:
        with safe_open(file, "pt") as content:
            facts = json.loads((content.metadata() or {}).get("consilium", "{}"))
            return {name: content.get_tensor(name) for name in content.keys()}, facts  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file}: not a file of weights ({error})") from None


def empty(job: Job, task: ModuleType, names: Iterable[str]) -> nn.Module:
    """The network that is about to get arrays of these names."""
    model: nn.Module = task.build_like(job, names) if hasattr(task, "build_like") else task.build_model(job)
    return model


def _with_own(job: Job, task: ModuleType, arrays: dict[str, Tensor], facts: dict[str, str], file: Path) -> nn.Module:
    """The job's network as a site saved it, all of it: see ``client.personal``."""
    model = empty(job.replace(model__weights="", model__freeze="none"), task, arrays)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith(f"{REFERENCE}.")}
    if {name: value.shape for name, value in state.items()} != {name: value.shape for name, value in arrays.items()}:
        raise UserError(f"{file}: is no site's own model of this run; give a {OWN_FILE}")
    model.load_state_dict(arrays, strict=False)  # but for the reference, which judges and does not answer
    return model


def whose(run: Path, parts: Path | None) -> str:
    """Lines that say which model is used, where a run made one for each site or did not finish; else nothing."""
    lines = []
    if parts is not None:
        lines.append(f"uses the site's own model: {parts}")
    elif (run / "job.toml").is_file() and keeps_own(load_job(run / "job.toml")):
        lines.append(f"uses the common model; each site has one of its own, see --site-parts {OWN_FILE}")
    events = read_events(run)
    if events and not any(event["event"] == "finish" for event in events):
        done = max((event["round"] for event in events if event["event"] == "round"), default=0)
        lines.append(f"ATTENTION: the run in {run} did not finish, it came to round {done}; its model was not tested")
    return "\n".join(lines)


def _with_weights(
    job: Job, task: ModuleType, arrays: dict[str, Tensor], facts: dict[str, str], file: Path
) -> nn.Module:
    """The job's network with ``arrays`` in it.

    Where the backbone was frozen the file holds the head alone: then the backbone is built as it was at the sites,
    from the same published weights or the same file, and must have the digest that the run noted.
    """
    frozen = job.model.freeze == "backbone"
    model = task.build_model(job) if frozen else empty(job.replace(model__weights=""), task, arrays)
    try:
        put(model, arrays, job)
    except ValueError as error:
        raise UserError(f"{file}: does not fit {job.model.name} of its job: {error}") from None
    if frozen and facts.get("frozen", "") not in ("", frozen_digest(model, job)):
        raise UserError(
            f"{file}: holds the head only, and model.weights = {job.model.weights!r} is not the backbone it was "
            "trained on"
        )
    return model

"""What is a site's own: the parts of the model that stay home, its personal model, and the file it is saved in."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import torch
from flwr.app import Context, Message
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from client.corrections import pulled_to
from client.local_round import train_round
from client.memory import Memory, write_arrays
from client.workspace import Workspace, measured, own_start, run_name, write_log
from shared import __version__
from shared.config import Job
from shared.errors import SiteRefusal
from shared.imaging.dataset import Dataset
from shared.intervals import NOTHING
from shared.sitefile import OWN_FOLDER
from shared.tasks import TASKS, load_task
from shared.training import pick_device, train
from shared.weights import REFERENCE, digest, exchanged, home_names, put

Arrays = dict[str, Tensor]


@torch.no_grad()
def put_home(model: nn.Module, job: Job, memory: Memory, before: int) -> None:
    """Put into the model what of it stays at the site, as it was before round ``before``, or as all sites began."""
    names = home_names(model, job)
    if not names:
        return
    held, state = memory.load("home", before) or own_start(job), model.state_dict()
    for name in names:
        state[name].copy_(held[name])


def take_home(model: nn.Module, job: Job) -> dict[str, Arrays]:
    """What of the model stays at the site, as it is now, for its memory."""
    names = home_names(model, job)
    if not names:
        return {}
    state = model.state_dict()
    return {"home": {name: _at_home(state[name]) for name in names}}


def _at_home(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def train_beside(
    model: nn.Module,
    job: Job,
    workspace: Workspace,
    memory: Memory,
    common: Arrays,
    round_: int,
    class_weights: list[float],
) -> dict[str, Arrays]:
    """Ditto: a round of the site's own model, pulled to the ``common`` one it was sent; for its memory.

    The model that is trained by all has left ``model`` by now. The personal one takes the same number of steps.
    """
    if job.federation.local != "ditto":
        return {}
    put(model, memory.load("personal", round_) or common, job)
    held = memory.load("personal-moments", round_) if job.train.keep_optimizer else None
    trained = train_round(model, job, workspace, round_, class_weights, held, pulled_to(model, job, common))
    kept = {"personal": exchanged(model, job)}
    return kept | ({"personal-moments": trained.moments} if job.train.keep_optimizer else {})


def own_model(model: nn.Module, job: Job, workspace: Workspace, message: Message, context: Context) -> None:
    """Turn ``model`` into the site's own of the common one that was sent: as it was saved before, or made and saved."""
    common = message.content.array_records["arrays"].to_torch_state_dict()
    put(model, common, job)
    facts = {
        "job": job.sha256,
        "round": str(message.content["config"]["round"]),
        "version": __version__,
        "model": job.model.name,
        "site": workspace.name,
        "of": digest(common),
        "data": _cases(workspace.data),
    }
    path = personal_file(workspace.home, run_name(context))
    if _read(model, path, facts):
        return
    _make(model, job, workspace, message, context)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith(f"{REFERENCE}.")}
    write_arrays(path, {name: _at_home(value) for name, value in state.items()}, facts)
    write_log(workspace.home, f"this site's own model of round {facts['round']} lies in {path}; it does not leave")


def _cases(data: Dataset) -> str:
    """SHA-256 of which cases there are and what is learnt from them: a patient may be taken out while a run pauses."""
    return hashlib.sha256("\n".join(map(repr, data.samples)).encode("utf-8", "surrogateescape")).hexdigest()


def _read(model: nn.Module, path: Path, facts: dict[str, str]) -> bool:
    """Whether the site's own model of just these ``facts`` lies in the file; then it is put into ``model``."""
    try:
        with safe_open(path, "pt") as file:
            if json.loads((file.metadata() or {}).get("consilium", "{}")) != facts:
                return False
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError):  # none, or what a crash left of one
        return False
    model.load_state_dict(arrays, strict=False)  # but for the reference, which judges and does not answer
    return True


def _make(model: nn.Module, job: Job, workspace: Workspace, message: Message, context: Context) -> None:
    """Its own parts are those of the round that was kept; so is its personal model, if it has one; else it is
    fine-tuned, if the job asks for it."""
    memory = Memory(workspace.home, run_name(context), job)
    after = int(message.content["config"]["round"]) + 1  # type: ignore[arg-type]
    put_home(model, job, memory, after)
    if job.federation.local == "ditto" and (held := memory.load("personal", after)):
        put(model, held, job)
    if job.federation.finetune_steps:
        _finetune(model, job, workspace, message)


def _finetune(model: nn.Module, job: Job, workspace: Workspace, message: Message) -> None:
    """Go on from the common model on the site's own images, with a fresh optimiser; where that is not better on the
    site's own validation images, or leads nowhere, take back the common one."""
    asked = job.federation
    before = {name: _at_home(value) for name, value in model.state_dict().items()}
    common = _validated(model, job, workspace, message)
    begin = asked.rounds * job.local_steps(workspace.told["train"].images)
    rate = job.train.learning_rate * asked.finetune_rate
    try:
        train(
            model,
            load_task(job.task),
            workspace.data.subset("train"),
            job.replace(train__learning_rate=rate, train__warmup=0.0),
            site=workspace.name,
            first_step=begin,
            steps=asked.finetune_steps,
            class_weights=list(message.content["config"]["class-weights"]),  # type: ignore[arg-type]
            total=asked.finetune_steps,
            begin=begin,
        )
    except SiteRefusal as refusal:
        write_log(workspace.home, f"not fine-tuned, the common model stays: {refusal}")
        model.load_state_dict(before)
        return
    own = _validated(model, job, workspace, message)
    better = own > common  # without a figure, too, the common model stays: one class alone is soon overlearnt
    told = f"{job.best_metric} on this site's validation images {abs(own):.3f}, of the common model {abs(common):.3f}"
    if math.isnan(own) or math.isnan(common):
        told = f"this site's validation images give no {job.best_metric} (none, or of one class alone)"
    write_log(workspace.home, f"fine-tuned: {told}: {'kept' if better else 'the common model stays'}")
    if not better:
        model.load_state_dict(before)


def _validated(model: nn.Module, job: Job, workspace: Workspace, message: Message) -> float:
    """The job's figure of the model on the site's own validation images, more is better; NaN where there is none."""
    data = workspace.data.subset("val")
    if not len(data):
        return math.nan
    task = load_task(job.task)
    sums = task.collect(measured(model, message, job), data, job, pick_device(job))
    found = task.summarise(sums, job).get(job.best_metric, NOTHING)
    return float(TASKS[job.task].metrics[job.best_metric] * found.value)


def personal_file(home: Path, run: str) -> Path:
    """Where a site's own model of a run lies."""
    return home / OWN_FOLDER / "personal" / f"{run}.safetensors"

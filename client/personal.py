"""What is a site's own: the parts of the model that stay home, its personal model, and the file it is saved in."""

from __future__ import annotations

from pathlib import Path

import torch
from flwr.app import Context, Message
from torch import Tensor, nn

from client.corrections import pulled_to
from client.local_round import train_round
from client.memory import Memory, write_arrays
from client.workspace import Workspace, own_start, run_name, write_log
from shared import __version__
from shared.config import Job
from shared.sitefile import OWN_FOLDER
from shared.tasks import load_task
from shared.training import train
from shared.weights import REFERENCE, exchanged, home_names, put

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
    state = model.state_dict()
    home = {name: _at_home(state[name]) for name in home_names(model, job)}
    return {"home": home} if home else {}


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


def make_personal(model: nn.Module, job: Job, workspace: Workspace, message: Message, context: Context) -> Path:
    """Turn ``model``, which holds the common weights of the round that was kept, into the site's own; save it.

    Its own parts are those of that round; so is its personal model, if it has one; else it is fine-tuned, if the job
    asks for it: ``federation.finetune_steps`` at a constant rate, with a fresh optimiser.
    """
    config, asked = message.content["config"], job.federation
    round_ = int(config["round"])  # type: ignore[arg-type]
    memory = Memory(workspace.home, run_name(context), job)
    put_home(model, job, memory, round_ + 1)
    if asked.local == "ditto" and (held := memory.load("personal", round_ + 1)):
        put(model, held, job)
    if asked.finetune_steps:
        rate = job.train.learning_rate * asked.finetune_rate
        train(
            model,
            load_task(job.task),
            workspace.data.subset("train"),
            job.replace(train__schedule="constant", train__warmup=0.0, train__learning_rate=rate),
            site=workspace.name,
            first_step=asked.rounds * job.local_steps(workspace.told["train"].images),
            steps=asked.finetune_steps,
            class_weights=list(config["class-weights"]),  # type: ignore[arg-type]
        )
    path = personal_file(workspace.home, run_name(context))
    facts = {"job": job.sha256, "round": str(round_), "version": __version__, "model": job.model.name}
    state = {name: value for name, value in model.state_dict().items() if not name.startswith(f"{REFERENCE}.")}
    write_arrays(path, {name: _at_home(value) for name, value in state.items()}, facts | {"site": workspace.name})
    write_log(workspace.home, f"this site's own model of round {round_} lies in {path}; it does not leave")
    return path


def personal_file(home: Path, run: str) -> Path:
    """Where a site's own model of a run lies."""
    return home / OWN_FOLDER / "personal" / f"{run}.safetensors"

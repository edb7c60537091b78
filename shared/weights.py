"""What is exchanged: which tensors of a model travel, and how they are put back."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from shared.config import Job
from shared.errors import UserError
from shared.tasks import load_task

# torch's layers, torchvision's frozen ones and our own have no base in common, but all are called so.
_NORM = re.compile(r"Norm(\dd)?$")
REFERENCE = "reference"  # the submodule that holds the network a model is measured by, see shared.tasks


def exchanged_names(model: nn.Module, job: Job) -> list[str]:
    """Names of the parameters and buffers that travel, in the model's order: all, or the head of a frozen backbone;
    less what ``federation.local`` leaves at home.

    A reference network (``REFERENCE``) is no part of what is trained: it travels on its own, with each evaluation.

    Raises:
        UserError: the job leaves normalisation layers at home and the model has none, or nothing is left to travel.
    """
    return names_in(model.state_dict(), model, job)


def names_in(state: Mapping[str, Tensor], model: nn.Module, job: Job) -> list[str]:
    """``exchanged_names`` for who has the model's ``state`` at hand: gathering it is most of the work."""
    names = [name for name in state if not name.startswith(f"{REFERENCE}.")]
    if job.model.freeze == "backbone":
        prefix = load_task(job.task).head_prefix(job)
        names = [name for name in names if name.startswith(prefix)]
    stays = set(home_names(model, job))
    if stays and stays.issuperset(names):
        raise UserError(f"federation.local = {job.federation.local!r}: nothing of {job.model.name} is left to travel")
    return [name for name in names if name not in stays]


def home_names(model: nn.Module, job: Job) -> list[str]:
    """Names of the parameters and buffers that each site keeps for itself, in the model's order; see ``STAYS``.

    Raises:
        UserError: there are none, though the job asks for it.
    """
    choose = STAYS.get(job.federation.local)
    if choose is None:
        return []
    chosen = choose(model, job)
    names = [name for name in model.state_dict() if name in chosen and not name.startswith(f"{REFERENCE}.")]
    if not names:
        raise UserError(
            f"federation.local = {job.federation.local!r}: {job.model.name} has no such layer; use 'head' or 'ditto'"
        )
    return names


def keeps_own(job: Job) -> bool:
    """Whether each site ends with a model of its own, which it saves."""
    return job.federation.local != "nothing" or job.federation.finetune_steps > 0


def whole(job: Job) -> bool:
    """Whether what travels is a whole model, or, with a frozen backbone, completes one that is known."""
    return job.federation.local not in STAYS


def _norms(model: nn.Module, job: Job) -> set[str]:
    """All of the normalisation layers, statistics included: FedBN (Li et al. 2021), for any kind of them."""
    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if _NORM.search(type(module).__name__)
        for name in module.state_dict()
    }


def _head(model: nn.Module, job: Job) -> set[str]:
    """The head: FedPer (Arivazhagan et al. 2019)."""
    prefix = load_task(job.task).head_prefix(job)
    return {name for name in model.state_dict() if name.startswith(prefix)}


# What stays at the site, by ``federation.local``. A personal model beside the common one (Ditto) keeps nothing back.
STAYS: dict[str, Callable[[nn.Module, Job], set[str]]] = {"norm": _norms, "head": _head}


def trained_names(model: nn.Module, job: Job) -> list[str]:
    """Those of ``exchanged_names`` that are trained by gradients: neither statistics nor frozen weights."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return [name for name in exchanged_names(model, job) if name in trained]


def control_scale(job: Job, images: int) -> float:
    """How far a round of plain gradient descent goes along a gradient of norm 1: what bounds on a change make of it.

    ``images`` are those that the site trains on.
    """
    return job.train.learning_rate * job.local_steps(images)


def exchanged(model: nn.Module, job: Job) -> dict[str, Tensor]:
    """Copies on the CPU of what travels; dtypes are kept, integer counters included."""
    state = model.state_dict()
    return {
        name: state[name].detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name in names_in(state, model, job)
    }


@torch.no_grad()
def put(model: nn.Module, arrays: Mapping[str, Tensor], job: Job) -> None:
    """Copy ``arrays`` into the model.

    Raises:
        ValueError: names or shapes are not exactly those this model exchanges.
    """
    state = model.state_dict()
    names = names_in(state, model, job)
    if set(arrays) != set(names):
        raise ValueError("the exchanged names differ from this model's")
    for name in names:
        if state[name].shape != arrays[name].shape:
            raise ValueError(f"{name} has another shape than in this model")
        state[name].copy_(arrays[name])


def finite(tensors: Mapping[str, Tensor]) -> bool:
    """Whether no number of the tensors, which lie in main memory, is infinite or NaN."""
    # NumPy's is ten times as fast as torch's
    return all(np.isfinite(value.detach().numpy()).all() for value in tensors.values() if value.is_floating_point())


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes."""
    sha = hashlib.sha256()
    for name, tensor in tensors.items():
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def frozen_digest(model: nn.Module, job: Job) -> str:
    """Digest of what is frozen, which must be the same at every site; '' if all is trained, wherever it stays."""
    state = model.state_dict()
    travels = {*names_in(state, model, job), *home_names(model, job)}
    stays = {
        name: tensor for name, tensor in state.items() if name not in travels and not name.startswith(f"{REFERENCE}.")
    }
    return digest(stays) if stays else ""

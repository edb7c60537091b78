"""What is exchanged: which tensors of a model travel, and how they are put back."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from shared.config import Job
from shared.tasks import load_task

REFERENCE = "reference"  # the submodule that holds the network a model is measured by, see shared.tasks


def exchanged_names(model: nn.Module, job: Job) -> list[str]:
    """Names of the parameters and buffers that travel, in the model's order: all, or the head of a frozen backbone.

    A reference network (``REFERENCE``) is no part of what is trained: it travels on its own, with each evaluation.
    """
    names = [name for name in model.state_dict() if not name.startswith(f"{REFERENCE}.")]
    if job.model.freeze == "backbone":
        prefix = load_task(job.task).head_prefix(job)
        names = [name for name in names if name.startswith(prefix)]
    return names


def exchanged(model: nn.Module, job: Job) -> dict[str, Tensor]:
    """Copies on the CPU of what travels; dtypes are kept, integer counters included."""
    state = model.state_dict()
    return {
        name: state[name].detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name in exchanged_names(model, job)
    }


@torch.no_grad()
def put(model: nn.Module, arrays: Mapping[str, Tensor], job: Job) -> None:
    """Copy ``arrays`` into the model.

    Raises:
        ValueError: names or shapes are not exactly those this model exchanges.
    """
    state = model.state_dict()
    names = exchanged_names(model, job)
    if set(arrays) != set(names):
        raise ValueError("the exchanged names differ from this model's")
    for name in names:
        if state[name].shape != arrays[name].shape:
            raise ValueError(f"{name} has another shape than in this model")
        state[name].copy_(arrays[name])


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes."""
    sha = hashlib.sha256()
    for name, tensor in tensors.items():
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def frozen_digest(model: nn.Module, job: Job) -> str:
    """Digest of what does not travel, which must be the same at every site; '' if everything travels."""
    travels = set(exchanged_names(model, job))
    stays = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name not in travels and not name.startswith(f"{REFERENCE}.")
    }
    return digest(stays) if stays else ""

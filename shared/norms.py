"""BatchNorm under differential privacy: it mixes the images of a batch, so a model with it is refused or converted."""

from __future__ import annotations

import math

from torch import nn

from shared.config import Job
from shared.errors import UserError

_PRIVATE = ("local", "distributed")


def is_private(job: Job) -> bool:
    """Whether the sites bound and noise the gradients of single images or patients (DP-SGD)."""
    return job.privacy.dp in _PRIVATE


def without_batch_norm(model: nn.Module, job: Job) -> nn.Module:
    """The model, with GroupNorm in place of every BatchNorm that would train, if the job is private and says so.

    A frozen BatchNorm, whose statistics come from published weights, stays: see ``shared.training.set_mode``. The new
    layers keep scale and shift of the old; its statistics are lost.

    Raises:
        UserError: a private job has a BatchNorm that would train, and does not say what to do with it.
    """
    if not is_private(job):
        return model
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and any(p.requires_grad for p in module.parameters())
    ]
    if found and job.privacy.batch_norm == "refuse":
        raise UserError(
            f"model.name = {job.model.name!r}: its {len(found)} BatchNorm layers mix the images of a batch, which "
            'privacy.dp forbids; set privacy.batch_norm = "group" to replace them, or model.freeze = "backbone"'
        )
    for name, old in found:
        path, _, own = name.rpartition(".")
        new = nn.GroupNorm(_groups(old.num_features), old.num_features)
        new.load_state_dict({"weight": old.weight.detach().clone(), "bias": old.bias.detach().clone()})
        setattr(model.get_submodule(path), own, new)
    return model


def _groups(channels: int) -> int:
    return math.gcd(32, channels)

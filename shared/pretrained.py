"""Weights to start from: a file of ours or of torch, or torchvision's published weights by name."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from shared.config import Job
from shared.errors import UserError

_SUFFIXES = (".safetensors", ".pt", ".pth")


def is_file_of_weights(text: str) -> bool:
    """Whether ``model.weights`` names a file rather than published weights."""
    return Path(text).suffix in _SUFFIXES or Path(text).is_file()


def load_weights(
    model: nn.Module, job: Job, head: str | tuple[str, ...], given: dict[str, Tensor] | None = None
) -> None:
    """Copy the weights of ``job.model.weights`` (``given``, if they were read already) into ``model``.

    All of the backbone must fit; the head (names that start with ``head``) is taken where it fits. What the file holds
    beyond the model (an auxiliary classifier, running statistics where ours has GroupNorm) is passed over.

    Raises:
        UserError: no such file or published weights, or they do not fit.
    """
    given = {_new_name(name): value for name, value in (given or read_weights(job)).items()}
    path, first = next(
        ((name, module) for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Conv3d))),
        ("", None),  # a network of signals
    )
    weight = given.get(f"{path}.weight")
    if first and weight is not None and weight.ndim == 4 and weight.shape[1] == 3 and first.in_channels == 1:
        # The sum over the colour channels answers a grey image as the original would answer it shown in colour.
        given[f"{path}.weight"] = weight.sum(1, keepdim=True)
    own = model.state_dict()
    fits = {name: name in given and given[name].shape == value.shape for name, value in own.items()}
    # Older files lack the counters, which nothing depends on.
    wrong = [
        name for name, fit in fits.items() if not (fit or name.startswith(head) or name.endswith("batches_tracked"))
    ]
    if wrong:
        raise UserError(
            f"model.weights = {job.model.weights!r}: does not fit {job.model.name}: {len(wrong)} layers are missing or "
            f"of another shape, first {wrong[0]}"
        )
    model.load_state_dict({name: given[name] if fits[name] else own[name] for name in own})


def _new_name(name: str) -> str:
    """DenseNet's published files write norm.1 where the module is norm1 (torchvision renames them as it loads)."""
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", name)


def read_weights(job: Job, published: str = "") -> dict[str, Tensor]:
    """The weights ``job.model.weights`` names; ``published`` is what torchvision calls the model, if not as we do."""
    text = job.model.weights
    if not is_file_of_weights(text):
        return _published(text, job, published or job.model.name)
    try:
        if Path(text).suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(text))
        return dict(torch.load(text, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        raise UserError(f"model.weights = {text!r}: no such file") from None
    except Exception as error:
        raise UserError(f"model.weights = {text!r}: not a file of weights ({type(error).__name__})") from None


def _published(text: str, job: Job, model: str) -> dict[str, Tensor]:
    import torchvision

    try:
        known = torchvision.models.get_model_weights(model)
    except ValueError:
        raise UserError(
            f"model.weights = {text!r}: {job.model.name} has no published weights; give a file or take a torchvision "
            "model"
        ) from None
    name = text.rpartition(".")[2]
    if name not in known.__members__:
        raise UserError(
            f"model.weights = {text!r}: no such file, and {job.model.name} has {', '.join(known.__members__)}"
        )
    try:
        return dict(known[name].get_state_dict(progress=False, check_hash=True))
    except OSError as error:
        raise UserError(
            f"model.weights = {text!r}: could not be fetched ({type(error).__name__}); download "
            f"{known[name].url.rpartition('/')[2]} where there is a network and give its path"
        ) from None

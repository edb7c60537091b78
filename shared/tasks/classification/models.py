"""Classifiers. To add one: write a function that returns the network, and one line in ``MODELS``."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from shared.cases import derived_seed
from shared.config import Job, nearest
from shared.errors import UserError
from shared.tasks import Part


class MeanAndMax(nn.Module):
    """Mean and maximum of each channel over the image: (n, c, height, width) -> (n, 2c, 1, 1).

    A finding of a few pixels moves the maximum at once, the mean hardly.
    """

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)], 1)


class Cnn(nn.Sequential):
    """Three stages of two 3x3 convolutions with GroupNorm, for images of any size; the first has a stride.

    (n, channels, height, width) -> (n, classes). 0.16 million parameters at width 24. GroupNorm, because its result
    does not depend on the other images of a batch: nothing of a site's statistics enters the weights but by learning.
    """

    def __init__(self, channels: int, classes: int, width: int, stride: int) -> None:
        layers: list[nn.Module] = []
        for stage, out in enumerate((width, 2 * width, 4 * width)):
            for inner in (channels, out):
                step = stride if not layers else 1
                layers += [
                    nn.Conv2d(inner, out, 3, step, padding=1, bias=False),
                    nn.GroupNorm(math.gcd(8, out), out),
                    nn.ReLU(),
                ]
            layers.append(nn.MaxPool2d(2, ceil_mode=True) if stage < 2 else MeanAndMax())
            channels = out
        super().__init__()
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Linear(2 * channels, classes)


def _cnn(job: Job) -> nn.Module:
    stride = 2 if job.data.size >= 40 else 1  # a quarter of the work, and small images keep their detail
    return Cnn(job.data.channels, len(job.classes), job.model.width, stride)


def _torchvision(name: str) -> Callable[[Job], nn.Module]:
    def build(job: Job) -> nn.Module:
        import torchvision

        model: nn.Module = torchvision.models.get_model(name, weights=None)
        _replace_head(model, MODELS[name].head, len(job.classes))
        _adapt_first(model, job.data.channels)
        return model

    return build


class Entry(NamedTuple):
    """How to build a model, the name of its last layer, the smallest image it takes, and why it cannot be exported."""

    build: Callable[[Job], nn.Module]
    head: str
    smallest: int = 8
    no_export: str = ""


MODELS: dict[str, Entry] = {
    "cnn": Entry(_cnn, "head"),
    "resnet18": Entry(_torchvision("resnet18"), "fc"),
    "resnet50": Entry(_torchvision("resnet50"), "fc"),
    "densenet121": Entry(_torchvision("densenet121"), "classifier", 32),
    "vgg16": Entry(_torchvision("vgg16"), "classifier.6", 32),
}


def head_prefix(job: Job) -> str:
    """Parameters whose name starts with this belong to the head; all others to the backbone."""
    return _entry(job).head + "."


def parts(job: Job) -> tuple[Part, ...]:
    """One loss trains all of it."""
    return (Part(),)


def example(job: Job) -> tuple[Tensor, ...]:
    """An input of the network: one image (1, channels, size, size)."""
    return (torch.zeros(1, job.data.channels, job.data.size, job.data.size),)


def _entry(job: Job) -> Entry:
    if job.model.name not in MODELS:
        raise UserError(
            f"model.name = {job.model.name!r}: {job.task} has {', '.join(MODELS)}{nearest(job.model.name, MODELS)}"
        )
    entry = MODELS[job.model.name]
    if job.data.size < entry.smallest:
        raise UserError(
            f"data.size = {job.data.size}: {job.model.name} takes images of {entry.smallest} pixels or more"
        )
    return entry


def check(job: Job) -> None:
    """Raise UserError if the job names a model this task has not, or images it does not take."""
    _entry(job)
    if job.data.channels not in (1, 3):
        raise UserError(f"data.channels = {job.data.channels}: must be 1 (grey) or 3 (colour)")
    if job.data.multilabel and job.data.partition == "dirichlet":
        raise UserError(
            "data.partition = 'dirichlet': needs one label per image; use 'iid' or 'size' with data.multilabel"
        )


def build_model(job: Job) -> nn.Module:
    """The job's network with its starting weights; equal jobs give equal weights on every machine.

    Maps (n, channels, size, size), normalised, to logits (n, classes).

    Raises:
        UserError: unknown model, or weights that cannot be had or do not fit.
    """
    entry = _entry(job)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(job.seed, "initial weights"))
        model = entry.build(job)
    if job.model.weights:
        _load_weights(model, job, entry.head + ".")
    if job.model.freeze == "backbone":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(entry.head + "."))
    return model


def _first(model: nn.Module) -> tuple[nn.Module, str, nn.Conv2d]:
    """The first convolution, its parent module and its name there."""
    path = next(name for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    parent, _, name = path.rpartition(".")
    module = model.get_submodule(parent)
    return module, name, getattr(module, name)


def _adapt_first(model: nn.Module, channels: int) -> None:
    parent, name, old = _first(model)
    if old.in_channels == channels:
        return
    shape: dict[str, Any] = {key: getattr(old, key) for key in ("kernel_size", "stride", "padding")}
    setattr(parent, name, nn.Conv2d(channels, old.out_channels, **shape, bias=old.bias is not None))


def _replace_head(model: nn.Module, head: str, classes: int) -> None:
    parent, _, name = head.rpartition(".")
    module = model.get_submodule(parent)
    setattr(module, name, nn.Linear(getattr(module, name).in_features, classes))


def _load_weights(model: nn.Module, job: Job, head: str) -> None:
    """Copy the given weights into ``model``: all of the backbone must fit, the head is taken where it fits."""
    given = {_new_name(name): value for name, value in _read_weights(job).items()}
    first = _first(model)
    path = next(name for name, module in model.named_modules() if module is first[2])
    weight = given.get(f"{path}.weight")
    if weight is not None and weight.ndim == 4 and weight.shape[1] == 3 and first[2].in_channels == 1:
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


def _read_weights(job: Job) -> dict[str, Tensor]:
    text = job.model.weights
    path = Path(text)
    if path.suffix in (".safetensors", ".pt", ".pth") or path.is_file():
        try:
            if path.suffix == ".safetensors":
                from safetensors.torch import load_file

                return dict(load_file(path))
            return dict(torch.load(path, map_location="cpu", weights_only=True))
        except FileNotFoundError:
            raise UserError(f"model.weights = {text!r}: no such file") from None
        except Exception as error:
            raise UserError(f"model.weights = {text!r}: not a file of weights ({type(error).__name__})") from None
    return _torchvision_weights(text, job)


def _torchvision_weights(text: str, job: Job) -> dict[str, Tensor]:
    import torchvision

    if job.model.name == "cnn":
        raise UserError(
            f"model.weights = {text!r}: cnn has no published weights; give a file or take a torchvision model"
        )
    known = torchvision.models.get_model_weights(job.model.name)
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

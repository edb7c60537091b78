"""Classifiers. To add one: write a function that returns the network, and one line in ``MODELS``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from shared.adversary import with_discriminator
from shared.cases import derived_seed
from shared.composed import composed, stacked_channels
from shared.config import Job, nearest
from shared.errors import UserError
from shared.norms import without_batch_norm
from shared.pretrained import load_weights
from shared.tasks import Part
from shared.tasks.classification.fusion import HEAD, fuse, has_joint, load_fused


class MeanAndMax(nn.Module):
    """Mean and maximum of each channel over the image: (n, c, height, width) -> (n, 2c, 1, 1).

    A finding of a few pixels moves the maximum at once, the mean hardly.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Features (b, c, height, width) as their means and maxima (b, 2c, 1, 1)."""
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
    entry = _entry(job)
    return f"{HEAD if has_joint(job) else entry.head}."


def parts(job: Job) -> tuple[Part, ...]:
    """One loss trains all of it."""
    return (Part(),)


def example(job: Job) -> tuple[Tensor, ...]:
    """An input of the network: one image (1, channels, size, size), or those of a case; its numbers, if it has any."""
    images = torch.zeros(1, stacked_channels(job), job.data.size, job.data.size)
    return (images, torch.zeros(1, len(job.tabular))) if job.tabular else (images,)


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
    if composed(job) and job.data.format not in ("auto", "csv", "cases"):
        raise UserError(
            f"data.format = {job.data.format!r}: images and numbers of a case come in a table; write 'csv' or 'auto'"
        )
    if job.model.fusion == "late" and not job.modalities:
        raise UserError("model.fusion = 'late': joins the images of a case; name them in data.modalities")
    if job.data.multilabel and job.data.partition == "dirichlet":
        raise UserError(
            "data.partition = 'dirichlet': needs one label per image; use 'iid' or 'size' with data.multilabel"
        )


def build_model(job: Job) -> nn.Module:
    """The job's network with its starting weights; equal jobs give equal weights on every machine.

    Maps (n, channels, size, size), normalised, to logits (n, classes); of composed cases, see ``Batch.inputs``.

    Raises:
        UserError: unknown model, or weights that cannot be had or do not fit.
    """
    entry = _entry(job)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(job.seed, "initial weights"))
        model = _fused(job, entry) if composed(job) else entry.build(job)
    if job.model.weights and composed(job):
        load_fused(model, job, entry.head)
    elif job.model.weights:
        load_weights(model, job, entry.head + ".")
    if job.model.freeze == "backbone":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(head_prefix(job)))
    model = with_discriminator(model, f"{HEAD}.layers" if has_joint(job) else entry.head, job)
    return without_batch_norm(model, job)


def _fused(job: Job, entry: Entry) -> nn.Module:
    """The network of a case of several images, or of images and numbers; see ``fusion``."""
    late = job.model.fusion == "late"
    networks = [entry.build(job) for _ in range(len(job.modalities) if late else 1)]
    if not late:
        _adapt_first(networks[0], stacked_channels(job))
    return fuse(job, networks, entry.head) if has_joint(job) else networks[0]


def _adapt_first(model: nn.Module, channels: int) -> None:
    """Let the first convolution take so many channels; its weights start afresh if that changes it."""
    path, old = next((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    if old.in_channels == channels:
        return
    parent, _, name = path.rpartition(".")
    shape: dict[str, Any] = {key: getattr(old, key) for key in ("kernel_size", "stride", "padding")}
    new = nn.Conv2d(channels, old.out_channels, **shape, bias=old.bias is not None)
    setattr(model.get_submodule(parent), name, new)


def _replace_head(model: nn.Module, head: str, classes: int) -> None:
    parent, _, name = head.rpartition(".")
    module = model.get_submodule(parent)
    setattr(module, name, nn.Linear(getattr(module, name).in_features, classes))

"""Autoencoders. To add one: write a function that returns the network, and one line in ``MODELS``.

Every network maps normalised images (b, channels, size, size) to a pair: the images as it rebuilds them, of the same
shape, and what its code costs, (b,): see ``Vae``; zero where the code is free.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.cases import derived_seed
from shared.config import Job, nearest
from shared.errors import UserError
from shared.pretrained import is_file_of_weights, load_weights
from shared.tasks import Part

_SMALLEST = 4  # side of the picture that becomes the code
_NO_HEAD = "-"  # starts no parameter's name: given weights must fit all of the network


def sides(size: int) -> list[int]:
    """The sides of an image as the encoder halves it, rounding up, until it is 4 pixels or less."""
    found = [size]
    while found[-1] > _SMALLEST:
        found.append((found[-1] + 1) // 2)
    return found


def _normalised(inner: int, out: int, stride: int) -> list[nn.Module]:
    """A 3x3 convolution with GroupNorm: no image changes what another becomes."""
    return [
        nn.Conv2d(inner, out, 3, stride, padding=1, bias=False),
        nn.GroupNorm(math.gcd(8, out), out),
        nn.SiLU(),
    ]


class Encoder(nn.Sequential):
    """(b, channels, size, size) -> (b, outputs): one convolution of stride 2 per halving, then a linear layer."""

    def __init__(self, channels: int, widths: Sequence[int], smallest: int, outputs: int) -> None:
        layers: list[nn.Module] = []
        for inner, out in zip([channels, *widths], widths, strict=False):
            layers += _normalised(inner, out, 2)
        super().__init__(*layers, nn.Flatten(), nn.Linear(widths[-1] * smallest**2, outputs))


class Enlarge(nn.Module):
    """(b, c, height, width) -> (b, c, side, side), each pixel repeated: no chequers as of transposed convolutions."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, size=(self.side, self.side), mode="nearest")


class Decoder(nn.Sequential):
    """(b, latent) -> (b, channels, size, size): the encoder's steps backwards."""

    def __init__(self, channels: int, widths: Sequence[int], places: Sequence[int], latent: int) -> None:
        smallest = places[-1]
        layers: list[nn.Module] = [
            nn.Linear(latent, widths[-1] * smallest**2),
            nn.Unflatten(1, (widths[-1], smallest, smallest)),
            nn.SiLU(),
        ]
        backwards = [*widths[::-1], widths[0]]
        for inner, out, side in zip(backwards[:-1], backwards[1:], places[-2::-1], strict=True):
            layers += [Enlarge(side), *_normalised(inner, out, 1)]
        super().__init__(*layers, nn.Conv2d(widths[0], channels, 3, padding=1))


class Autoencoder(nn.Module):
    """Squeezes an image into ``latent`` numbers and rebuilds it from them."""

    codes = 1  # numbers the encoder gives per latent number

    def __init__(self, channels: int, size: int, width: int, latent: int) -> None:
        super().__init__()
        places = sides(size)
        widths = [width * min(2**stage, 8) for stage in range(len(places) - 1)]
        self.encoder = Encoder(channels, widths, places[-1], self.codes * latent)
        self.decoder = Decoder(channels, widths, places, latent)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See the module."""
        return self.decoder(self.encoder(images)), images.new_zeros(len(images))


class Vae(Autoencoder):
    """Variational autoencoder (Kingma & Welling 2014): the code is a normal distribution, drawn from in training.

    The cost of a code is its Kullback-Leibler divergence from the standard normal, in nats, summed over the latent
    numbers. Draws come from torch's global generator; in evaluation the mean stands for the draw.
    """

    codes = 2

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See the module."""
        mean, log_variance = self.encoder(images).chunk(2, 1)
        log_variance = log_variance.clamp(-20, 20)
        cost = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
        code = mean + (0.5 * log_variance).exp() * torch.randn_like(mean) if self.training else mean
        return self.decoder(code), cost


def _of(kind: type[Autoencoder]) -> Callable[[Job], nn.Module]:
    return lambda job: kind(job.data.channels, job.data.size, job.model.width, job.model.latent)


class Entry(NamedTuple):
    """How to build a model, and why it cannot be exported ("" where it can)."""

    build: Callable[[Job], nn.Module]
    no_export: str = ""


MODELS: dict[str, Entry] = {
    "autoencoder": Entry(_of(Autoencoder)),
    "vae": Entry(_of(Vae)),
}


def head_prefix(job: Job) -> str:
    """What starts the names of the parameters that give the image. Nothing is frozen here; see ``check``."""
    return "decoder."


def parts(job: Job) -> tuple[Part, ...]:
    """One loss trains all of it."""
    return (Part(),)


def example(job: Job) -> tuple[Tensor, ...]:
    """An input of the network: one image (1, channels, size, size)."""
    return (torch.zeros(1, job.data.channels, job.data.size, job.data.size),)


def check(job: Job) -> None:
    """Raise UserError if the job names a model this task has not, or settings that do not go together."""
    if job.model.name not in MODELS:
        raise UserError(
            f"model.name = {job.model.name!r}: {job.task} has {', '.join(MODELS)}{nearest(job.model.name, MODELS)}"
        )
    if job.data.channels not in (1, 3):
        raise UserError(f"data.channels = {job.data.channels}: must be 1 (grey) or 3 (colour)")
    if job.data.normal and job.data.normal not in job.classes:
        raise UserError(
            f"data.normal = {job.data.normal!r}: must be one of data.classes ({', '.join(job.classes)})"
            f"{nearest(job.data.normal, job.classes)}"
        )
    if job.data.multilabel:
        raise UserError("data.multilabel: an image is normal or an anomaly of one class; set it to false")
    if job.model.freeze != "none":
        raise UserError(
            f"model.freeze = {job.model.freeze!r}: an autoencoder has no backbone to freeze; set it to none"
        )
    if job.model.weights and not is_file_of_weights(job.model.weights):
        raise UserError(
            f"model.weights = {job.model.weights!r}: {job.model.name} has no published weights; give a file"
        )
    for key in ("modalities", "tabular"):
        if getattr(job.data, key):
            raise UserError(f"data.{key}: reconstruction takes one image per case; leave it empty")


def build_model(job: Job) -> nn.Module:
    """The job's network with its starting weights; equal jobs give equal weights on every machine. See the module.

    Raises:
        UserError: unknown model, or weights that cannot be had or do not fit.
    """
    check(job)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(job.seed, "initial weights"))
        model = MODELS[job.model.name].build(job)
    if job.model.weights:
        load_weights(model, job, head=_NO_HEAD)
    return model

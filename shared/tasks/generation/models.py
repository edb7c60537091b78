"""Generators of images. To add one: write a function that returns its two networks, and one line in ``MODELS``."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.cases import derived_seed
from shared.config import Job, job_from_flat, nearest
from shared.errors import UserError
from shared.tasks import Part

SLOPE = 0.2  # of the discriminator's leaky ReLU (Radford et al. 2016)
ITERATIONS = 20  # of the power method


def largest_singular_value(weight: Tensor, start: Tensor) -> Tensor:
    """The spectral norm of ``weight`` (out, …) as a matrix of ``out`` rows, with a gradient to ``weight``.

    Miyato et al. 2018 carry the power method's vector from step to step. Here it begins at ``start`` (out,) each time
    and runs long enough: so the norm follows from the weights alone, nothing beside them has to be exchanged or
    averaged, and a site that sat out a round computes the same.
    """
    matrix = weight.flatten(1)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        gram = matrix.float() @ matrix.float().T
        u = start
        for _ in range(ITERATIONS):
            u = F.normalize(gram @ u, dim=0)
    # Products and sums, no matrix product: autocast leaves them in float32.
    return torch.linalg.vector_norm((matrix * u[:, None]).sum(0))


def _start(rows: int) -> Tensor:
    """A fixed direction no trained matrix has a reason to avoid."""
    return F.normalize(torch.randn(rows, generator=torch.Generator().manual_seed(0)), dim=0)


class SpectralConv2d(nn.Conv2d):
    """A convolution whose kernel is divided by its spectral norm, so that the layer's slope is bounded."""

    def __init__(self, inner: int, out: int, kernel: int, stride: int = 1, padding: int = 0) -> None:
        super().__init__(inner, out, kernel, stride, padding)
        self.register_buffer("start", _start(out), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight / largest_singular_value(self.weight, self.start), self.bias)


class SpectralLinear(nn.Linear):
    """A linear layer whose weights are divided by their spectral norm."""

    def __init__(self, inner: int, out: int) -> None:
        super().__init__(inner, out)
        self.register_buffer("start", _start(out), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / largest_singular_value(self.weight, self.start), self.bias)


def sides(size: int) -> list[int]:
    """Side lengths from the coarsest map, of 4 to 8 pixels, to ``size``; each is half the next, rounded up."""
    found = [size]
    while found[0] > 8 or len(found) < 2:
        found.insert(0, math.ceil(found[0] / 2))
    return found


def _widths(width: int, stages: int) -> list[int]:
    """Channels at each side length, coarse to fine: ``width`` at full size, twice that a stage earlier, at most 4x."""
    return [width * min(2 ** (stages - 1 - stage), 4) for stage in range(stages)]


class Generator(nn.Module):
    """Noise (n, latent) and classes (n,) to pictures (n, channels, size, size) in [0, 1].

    DCGAN (Radford et al. 2016) with nearest-neighbour enlargement and convolution in place of transposed convolutions,
    whose chequered pattern shows at small sizes, and GroupNorm in place of BatchNorm.
    """

    def __init__(self, latent: int, classes: int, width: int, channels: int, size: int) -> None:
        super().__init__()
        self.classes, self.sides = classes, sides(size)
        wide = _widths(width, len(self.sides))
        self.first = nn.Linear(latent + classes, wide[0] * self.sides[0] ** 2)
        self.norm = nn.GroupNorm(math.gcd(8, wide[0]), wide[0])
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(inner, out, 3, padding=1), nn.GroupNorm(math.gcd(8, out), out), nn.ReLU())
            for inner, out in zip(wide, wide[1:], strict=False)
        )
        self.last = nn.Conv2d(wide[-1], channels, 3, padding=1)

    def forward(self, noise: Tensor, classes: Tensor) -> Tensor:
        if self.classes:
            noise = torch.cat([noise, F.one_hot(classes, self.classes).to(noise)], 1)
        x = F.relu(self.norm(self.first(noise).unflatten(1, (-1, self.sides[0], self.sides[0]))))
        for stage, side in zip(self.stages, self.sides[1:], strict=True):
            x = stage(F.interpolate(x, size=(side, side), mode="nearest"))
        return self.last(x).sigmoid()


class Discriminator(nn.Module):
    """Normalised images (n, channels, size, size) and classes (n,) to scores (n,): high for real ones.

    Spectral norm in every layer, no normalisation of activations. Told the class, it scores image and class together:
    a score of the image plus one of the image as that class (the projection of Miyato & Koyama 2018).
    """

    def __init__(self, classes: int, width: int, channels: int, size: int) -> None:
        super().__init__()
        self.classes = classes
        lengths = sides(size)[::-1]
        wide = _widths(width, len(lengths))[::-1]
        layers: list[nn.Module] = [SpectralConv2d(channels, wide[0], 3, padding=1), nn.LeakyReLU(SLOPE)]
        for inner, out in zip(wide, wide[1:], strict=False):
            layers += [SpectralConv2d(inner, out, 3, 2, padding=1), nn.LeakyReLU(SLOPE)]
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.head = SpectralLinear(wide[-1] * lengths[-1] ** 2, 1 + classes)

    def forward(self, images: Tensor, classes: Tensor) -> Tensor:
        scores: Tensor = self.head(self.features(images))
        if not self.classes:
            return scores[:, 0]
        return scores[:, 0] + scores[:, 1:].gather(1, classes[:, None])[:, 0]


class Networks(NamedTuple):
    """The two players; the generator gives pictures in [0, 1], the discriminator takes them normalised."""

    generator: nn.Module
    discriminator: nn.Module


def _dcgan(job: Job) -> Networks:
    classes = len(job.classes) if job.model.conditional else 0
    width, channels, size = job.model.width, job.data.channels, job.data.size
    return Networks(
        Generator(job.model.latent, classes, width, channels, size), Discriminator(classes, width, channels, size)
    )


class Entry(NamedTuple):
    """How to build a model's two networks, and the largest image it makes."""

    build: Callable[[Job], Networks]
    largest: int = 128


MODELS: dict[str, Entry] = {"dcgan": Entry(_dcgan)}


class Gan(nn.Module):
    """Everything of a generation job in one model: what is trained, what is kept of it, and what judges it.

    ``generator`` and ``discriminator`` are trained. ``average`` is the moving average of the generator's weights, held
    as buffers: it travels and is averaged with the rest but no optimiser touches it. ``updates`` counts how often it
    moved. ``reference`` is the frozen classifier in whose features images are compared (see ``reference``).
    """

    updates: Tensor

    def __init__(self, networks: Networks, judge: nn.Module) -> None:
        super().__init__()
        self.discriminator = networks.discriminator
        self.generator = networks.generator
        self.average = _as_buffers(copy.deepcopy(networks.generator))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.reference = judge.requires_grad_(False)

    def forward(self, noise: Tensor, classes: Tensor) -> Tensor:
        """Pictures (n, channels, size, size) in [0, 1] from noise (n, latent) and classes (n,), by the average."""
        pictures: Tensor = self.average(noise, classes)
        return pictures


def _as_buffers(model: nn.Module) -> nn.Module:
    """``model`` with every parameter turned into a buffer of the same name."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, parameter.detach().clone())
    return model


def parts(job: Job) -> tuple[Part, ...]:
    """The discriminator's step, then the generator's at half its rate; no first moment (Zhang et al. 2019)."""
    return (Part("discriminator.", 1.0, (0.0, 0.9)), Part("generator.", 0.5, (0.0, 0.9)))

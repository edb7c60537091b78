"""Generators of images. To add one: write a function that returns its two networks, and one line in ``MODELS``."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.cases import derived_seed
from shared.config import Job, Scalar, job_from_flat, nearest
from shared.errors import UserError
from shared.pretrained import is_file_of_weights, load_weights
from shared.settings_federation import nothing_shared
from shared.tasks import Part
from shared.tasks.classification import models as classification
from shared.tasks.generation.layers import Modulation, SpectralConv2d, SpectralLinear

FEATURES = 96  # of an image, in which images are compared: the channels of the reference's last stage
_SLOPE = 0.2  # of the discriminator's leaky ReLU (Radford et al. 2016)


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
    whose chequered pattern shows at small sizes, and ``Modulation`` in place of BatchNorm.
    """

    def __init__(self, latent: int, classes: int, width: int, channels: int, size: int) -> None:
        super().__init__()
        self.classes, self.sides = classes, sides(size)
        wide = _widths(width, len(self.sides))
        self.first = nn.Linear(latent + classes, wide[0] * self.sides[0] ** 2)
        self.convolutions = nn.ModuleList(nn.Conv2d(inner, out, 3, padding=1) for inner, out in pairwise(wide))
        self.norms = nn.ModuleList(Modulation(channels, latent + classes) for channels in wide)
        self.last = nn.Conv2d(wide[-1], channels, 3, padding=1)

    def forward(self, noise: Tensor, classes: Tensor) -> Tensor:
        """Pictures (n, channels, size, size) in [0, 1] of noise (n, latent) and classes (n,)."""
        if self.classes:
            noise = torch.cat([noise, F.one_hot(classes, self.classes).to(noise)], 1)
        x = self.first(noise).unflatten(1, (-1, self.sides[0], self.sides[0]))
        # Every map after it is laid out as this one; channels last is the faster layout.
        x = F.relu(self.norms[0](x.contiguous(memory_format=torch.channels_last), noise))
        for convolution, norm, side in zip(self.convolutions, self.norms[1:], self.sides[1:], strict=True):
            x = F.relu(norm(convolution(F.interpolate(x, size=(side, side), mode="nearest")), noise))
        pictures: Tensor = self.last(x).sigmoid()
        return pictures


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
        layers: list[nn.Module] = [SpectralConv2d(channels, wide[0], 3, padding=1), nn.LeakyReLU(_SLOPE)]
        for inner, out in pairwise(wide):
            layers += [SpectralConv2d(inner, out, 3, 2, padding=1), nn.LeakyReLU(_SLOPE)]
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.head = SpectralLinear(wide[-1] * lengths[-1] ** 2, 1 + classes)

    def forward(self, images: Tensor, classes: Tensor) -> Tensor:
        """The scores (n,)."""
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
    """How to build a model's two networks, the largest image it makes, and why it cannot be exported ("" if it can)."""

    build: Callable[[Job], Networks]
    largest: int = 128
    no_export: str = ""


MODELS: dict[str, Entry] = {"dcgan": Entry(_dcgan)}


class Gan(nn.Module):
    """All networks of a generation job in one model: what is trained, what is kept of it, and what judges it.

    ``discriminator`` and ``generator`` are trained. ``average`` is the moving average of the generator's weights, held
    as buffers: it travels and is averaged with the rest, but no optimiser touches it. ``updates`` counts how often it
    moved. ``reference`` is the frozen classifier in whose features images are compared; see the function of that name.
    """

    updates: Tensor

    def __init__(self, networks: Networks, reference: nn.Module) -> None:
        super().__init__()
        self.discriminator = networks.discriminator
        self.generator = networks.generator
        self.average = _as_buffers(copy.deepcopy(networks.generator))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.reference = reference.requires_grad_(False)

    def forward(self, noise: Tensor, classes: Tensor) -> Tensor:
        """Pictures (n, channels, size, size) in [0, 1] from noise (n, latent) and classes (n,), by the average."""
        pictures: Tensor = self.average(noise, classes)
        return pictures

    @torch.no_grad()
    def follow(self, horizon: float) -> None:
        """Move the average towards the generator's present weights: in the long run by one ``horizon``-th.

        At first it moves faster, so that the untrained weights are soon forgotten. All on the device, no wait.
        """
        share = torch.clamp(9 / (10 + self.updates), min=1 / horizon)
        for name, value in self.generator.named_parameters():
            self.average.get_buffer(name).lerp_(value, share)
        self.updates += 1


def _as_buffers(model: nn.Module) -> nn.Module:
    """``model`` with every parameter turned into a buffer of the same name."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, parameter.detach().clone())
    return model


def parts(job: Job) -> tuple[Part, ...]:
    """The discriminator's step, then the generator's at half its rate, without momentum (Zhang et al. 2019)."""
    return (Part("discriminator.", 1.0, (0.0, 0.9)), Part("generator.", 0.5, (0.0, 0.9), sees_data=False))


def head_prefix(job: Job) -> str:
    """What starts the names of the parameters that give the image. Nothing is frozen here; see ``check``."""
    return "generator.last."


def example(job: Job) -> tuple[Tensor, ...]:
    """An input of the network: the noise and the class of one image."""
    return torch.zeros(1, job.model.latent), torch.zeros(1, dtype=torch.int64)


def check(job: Job) -> None:
    """Raise UserError if the job names a model this task has not, or settings that do not go together."""
    if job.model.name not in MODELS:
        raise UserError(
            f"model.name = {job.model.name!r}: {job.task} has {', '.join(MODELS)}{nearest(job.model.name, MODELS)}"
        )
    largest = MODELS[job.model.name].largest
    if job.data.size > largest:
        raise UserError(f"data.size = {job.data.size}: {job.model.name} makes images of at most {largest} pixels")
    if len(job.classes) < 2:
        raise UserError(
            f"data.classes = {job.data.classes!r}: name at least two; images are compared in the features of a "
            "network that learns to tell them apart"
        )
    if job.data.multilabel:
        raise UserError("data.multilabel: an image is made of one class; set it to false")
    if job.model.freeze != "none":
        raise UserError(f"model.freeze = {job.model.freeze!r}: a generator has no backbone to freeze; set it to none")
    if job.model.weights and not is_file_of_weights(job.model.weights):
        raise UserError(
            f"model.weights = {job.model.weights!r}: {job.model.name} has no published weights; give a file"
        )
    for key in ("modalities", "tabular"):
        if getattr(job.data, key):
            raise UserError(f"data.{key}: generation takes one image per case; leave it empty")
    classification.check(reference(job))


_KEPT = (
    "seed",
    "data.",
    "augment.",
    "federation.",
    "privacy.",
    "evaluation.batch_size",
    "train.device",
    "train.precision",
)


_BOUNDS = ("max_examples", "max_update_norm", "memory_mb")


def reference(job: Job) -> Job:
    """The job of the network in whose features images are compared: a classifier of the same images and classes.

    It is trained first, by the same sites, for ``evaluation.reference_rounds``. Its rate is a quarter of a
    classifier's default: then its features still answer to blur and noise; at the full rate hardly (docs/tasks).
    """
    rounds = job.evaluation.reference_rounds
    flat = {key: value for key, value in job.flat().items() if key.startswith(_KEPT)}
    own: dict[str, Scalar] = {
        "name": f"{job.name}-reference",
        "task": "classification",
        "model.name": "cnn",
        "model.width": FEATURES // 4,
        "train.learning_rate": 0.001,
        "federation.rounds": rounds,
        "evaluation.every": rounds,
    }
    # Whatever the generator's federation does: figures are compared across these, so one network must measure them.
    # What keeps a broken or secret reply in bounds stays.
    own |= {key: value for key, value in nothing_shared().items() if key.removeprefix("federation.") not in _BOUNDS}
    if job.privacy.dp != "none":  # what it asks of the one job it asks of the other
        own["train.class_weights"] = "none"
    if job.privacy.dp == "distributed":
        own |= {"train.optimizer": "sgd", "federation.weighting": "equal"}
    return job_from_flat(flat | own)


def build_model(job: Job) -> Gan:
    """The job's networks with their starting weights; equal jobs give equal weights on every machine.

    Raises:
        UserError: unknown model, or weights that cannot be had or do not fit.
    """
    check(job)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(job.seed, "initial weights"))
        networks = MODELS[job.model.name].build(job)
    model = Gan(networks, classification.build_model(reference(job)))
    if job.model.weights:
        load_weights(model, job, head="reference.")  # a run's file holds no reference: it travels apart
    return model

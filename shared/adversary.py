"""Adversarial alignment: features that do not tell which hospital an image comes from (Ganin et al. 2016, DANN).

A small network, the discriminator, reads what the model's head reads and learns to tell the sites apart. Its gradient
goes on into the model turned round, so that the model learns features that leave it no clue. The discriminator is a
part of the model: it travels, is merged, masked and bounded with it. No site ever sees features of another; each trains
it on its own, and only what they make together knows all sites. So rounds must be short: in a long one each site's
discriminator learns to answer its own name whatever it sees.

A site's name is a code of ``CODE`` bits drawn from it, each bit an output (error-correcting output codes, Dietterich &
Bakiri 1995): no job needs to say how many sites there are, and one that comes later has its code too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.cases import derived_seed
from shared.config import Job
from shared.corrections import Correction

NAME = "discriminator"  # the submodule of the model
CODE = 16
HIDDEN = 64


class Discriminator(nn.Module):
    """Features (b, c) of cases to logits (b, ``CODE``) of the bits of their site; ``head`` is what reads them too."""

    def __init__(self, features: int, head: str) -> None:
        super().__init__()
        self.head = head
        self.layers = nn.Sequential(nn.Linear(features, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CODE))

    def forward(self, output: Tensor) -> Tensor:
        """What is given, as it is: in a network that is an ``nn.Sequential`` it is passed on the way out."""
        return output


def with_discriminator(model: nn.Module, head: str, job: Job) -> nn.Module:
    """The model, with a discriminator if the job asks for one. ``head`` is the path of the module that reads features:
    (b, c), or (b, c, *size), which the discriminator sees in the mean over the image."""
    if job.federation.correction == "adversarial":
        first = next(weight for weight in model.get_submodule(head).parameters() if weight.ndim > 1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(job.seed, NAME))
            model.add_module(NAME, Discriminator(first.shape[1], head))
    return model


def code_of(site: str) -> Tensor:
    """The site's bits as 0 and 1, float32 (``CODE``,)."""
    number = derived_seed(0, NAME, site)
    return torch.tensor([float(number >> bit & 1) for bit in range(CODE)])


def strength(progress: float) -> float:
    """How much the turned gradient counts after that share of the run, from 0 to 1 (Ganin et al. 2016, section 5.2.2).

    A discriminator that knows nothing yet would teach the model noise.
    """
    return 2 / (1 + math.exp(-10 * progress)) - 1


class Adversary(Correction):
    """The discriminator's loss beside the task's, for a round of training at ``site``."""

    def __init__(self, model: nn.Module, job: Job, site: str) -> None:
        super().__init__(model, {})
        self.weight, self.code = job.federation.align_weight, code_of(site)
        self.discriminator: Discriminator = getattr(model, NAME)
        self.head = model.get_submodule(self.discriminator.head)
        self.features: Tensor | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While the block runs, what the head reads is seen."""
        handle = self.head.register_forward_pre_hook(self._see)
        try:
            yield
        finally:
            handle.remove()
            self.features = None

    def _see(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.features = inputs[0]

    def completed(self, loss: Tensor, progress: float) -> Tensor:
        """Plus the mean loss of the bits over the cases of the batch; its gradient turns on its way to the model."""
        features, self.features = self.features, None
        assert features is not None, "no batch went through the head"
        seen = features.flatten(2).mean(2) if features.ndim > 2 else features
        turned = _Turned.apply(seen, self.weight * strength(progress))
        logits = self.discriminator.layers(turned).float()
        return loss + F.binary_cross_entropy_with_logits(logits, self.code.to(logits.device).expand_as(logits))


class _Turned(torch.autograd.Function):
    """The same values; the gradient times minus ``factor``."""

    @staticmethod
    def forward(context, values: Tensor, factor: float) -> Tensor:  # type: ignore[no-untyped-def]
        context.factor = factor
        return values.view_as(values)

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return -context.factor * gradient, None

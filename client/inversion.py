"""Gradient inversion: the image behind an update of one image, as a server that reads the update might rebuild it.

Geiping et al., NeurIPS 2020: from noise, an image is changed step by step until its gradient points where the seen one
does (cosine distance), kept smooth by its total variation; its label is known. Adam on the signs of the derivative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from client.privacy import clipped_sum
from shared.config import Job

STEPS = 1000
_RATE, _SMOOTH = 0.1, 1e-2  # Adam's rate, in units of the network's input; weight of the total variation
_SLOWER = (3 / 8, 5 / 8, 7 / 8)  # of the steps, after which the rate falls to a tenth


def gradient_of(
    model: nn.Module, task: ModuleType, batch: Any, job: Job, class_weights: Sequence[float], graph: bool = False
) -> list[Tensor]:
    """The gradient of a batch's loss by what is trained; ``graph``: so that it can be derived by the images."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = task.step(model, batch, job, class_weights)
    return list(torch.autograd.grad(loss, parameters, create_graph=graph, materialize_grads=True))


def clipped(gradient: Sequence[Tensor], bound: float) -> list[Tensor]:
    """The gradient scaled down to an L2 norm of ``bound``, if it is longer, as DP-SGD does it."""
    return clipped_sum([part[None] for part in gradient], bound)


def noised(gradient: Sequence[Tensor], sd: float, generator: torch.Generator) -> list[Tensor]:
    """The gradient with Gaussian noise of this standard deviation; the generator lives on the CPU."""
    return [part + sd * torch.randn(part.shape, generator=generator).to(part) for part in gradient]


def reconstruct(
    model: nn.Module,
    task: ModuleType,
    batch: Any,
    job: Job,
    class_weights: Sequence[float],
    seen: Sequence[Tensor],
    *,
    low: Tensor | float,
    high: Tensor | float,
    steps: int = STEPS,
    seed: int = 0,
    progress: Callable[[], None] | None = None,
) -> Tensor:
    """The image that best explains the gradient ``seen``, shaped and normalised as ``batch.images``.

    Of the batch only the labels (and numbers beside the image) are used, not its images. The model is taken in
    evaluation mode: nothing random, BatchNorm by its running statistics.

    Args:
        low, high: what black and white are as the network takes them; no pixel goes beyond.
    """
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    # Nearly grey, not pure noise as in the paper: from there the project's networks are inverted better.
    start = 0.1 * torch.randn(batch.images.shape, generator=generator).to(batch.images.device)
    image = _between(start, low, high).requires_grad_(True)
    optimizer = torch.optim.Adam([image], _RATE)
    milestones = [round(share * steps) for share in _SLOWER]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, 0.1)
    best, least = image.detach().clone(), math.inf
    for _ in range(steps):
        found = gradient_of(model, task, batch._replace(images=image), job, class_weights, graph=True)
        loss = cosine_distance(found, seen) + _SMOOTH * total_variation(image)
        (slope,) = torch.autograd.grad(loss, [image])
        if loss.item() < least:
            best, least = image.detach().clone(), loss.item()
        image.grad = slope.sign()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            image.copy_(_between(image, low, high))
        if progress:
            progress()
    return best


def _between(image: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    bounds = [torch.as_tensor(value, dtype=image.dtype, device=image.device) for value in (low, high)]
    return torch.maximum(torch.minimum(image, bounds[1]), bounds[0])


def cosine_distance(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """One minus the cosine of the angle between two gradients, all their parts taken as one vector: 0 to 2."""
    product = torch.stack([(a * b).sum() for a, b in zip(one, other, strict=True)]).sum()
    lengths = [torch.stack([part.square().sum() for part in parts]).sum().sqrt() for parts in (one, other)]
    return 1 - product / (lengths[0] * lengths[1]).clamp(min=1e-12)


def total_variation(images: Tensor) -> Tensor:
    """The mean absolute difference of neighbouring pixels, down plus across."""
    return images.diff(dim=-1).abs().mean() + images.diff(dim=-2).abs().mean()


def psnr(image: Tensor, original: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of an image in [0, 1]; infinite for the original itself."""
    error = float((image.double() - original.double()).square().mean())
    return -10 * math.log10(error) if error else math.inf


def correlation(image: Tensor, original: Tensor) -> float:
    """Pearson's correlation of the pixels; 0 for a picture of one grey."""
    one, other = (each.double().flatten() - each.double().mean() for each in (image, original))
    size = float(one.norm() * other.norm())
    return float(one @ other) / size if size else 0.0

"""How cases of several images and of numbers enter a network; see ``shared.composed`` for what they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shared.cases import Sample
from shared.composed import flagged
from shared.config import Job
from shared.imaging.augment import augmentation, normalise


def images_of_cases(images: Tensor, samples: Sequence[Sample], job: Job, device: torch.device, train: bool) -> Tensor:
    """What the network sees of cases of several images.

    Args:
        images: float32 (b, modalities x channels, size, size) in [0, 1].

    Returns:
        The same augmented (a case's images all alike, so that they still fit each other) and normalised one by one;
        images that are missing are 0. If the job lets images be missing, a plane per modality follows, 1 where there is
        none and 0 where there is one.
    """
    change = augmentation(job) if train else None
    state = torch.get_rng_state()
    parts = []
    for part in images.chunk(len(job.modalities), 1):
        if change:
            torch.set_rng_state(state)
            part = change(part)
        parts.append(normalise(part.to(device), job))
    if flagged(job):
        absent = torch.tensor([[not name for name in sample.paths] for sample in samples], device=device)
        lacks = absent[:, :, None, None]
        parts = [part.masked_fill(lacks[:, k : k + 1], 0.0) for k, part in enumerate(parts)]
        parts.append(lacks.expand(-1, -1, *images.shape[2:]).to(images.dtype))
    return torch.cat(parts, 1).contiguous(memory_format=torch.channels_last)


def values_of_cases(samples: Sequence[Sample], device: torch.device) -> Tensor:
    """The numbers of cases, float32 (b, numbers), NaN where missing."""
    return torch.tensor([sample.values for sample in samples], dtype=torch.float32, device=device)

"""Helpers of the tests of aggregators and optimisers: settings, and sites whose training is a formula."""

from __future__ import annotations

import torch
from torch import Tensor

from shared.config import Job, Scalar, job_from_flat

Arrays = dict[str, Tensor]


def job(**federation: Scalar) -> Job:
    """The default job with these settings of its federation."""
    return job_from_flat({f"federation.{key}": value for key, value in federation.items()})


def start() -> Arrays:
    """A small model of float32 arrays, one of them a single number."""
    generator = torch.Generator().manual_seed(0)
    return {"a.weight": torch.randn(3, 4, generator=generator), "b": torch.randn((), generator=generator)}


def trained(model: Arrays, site: int) -> Arrays:
    """A site's reply: some way from ``model`` to the site's own optimum. Sites pull in different directions."""
    generator = torch.Generator().manual_seed(100 + site)
    rate = 0.1 + 0.05 * site
    return {
        name: value + rate * (torch.randn(value.shape, generator=generator) - value) for name, value in model.items()
    }


def replies(seed: int, count: int, scale: float = 1.0) -> list[Arrays]:
    """Random replies with a BatchNorm's statistics and a counter."""
    generator = torch.Generator().manual_seed(seed)

    def one() -> Arrays:
        return {
            "conv.weight": torch.randn(5, 3, generator=generator) * scale,
            "bn.running_mean": torch.randn(3, generator=generator) * scale,
            "bn.running_var": torch.rand(3, generator=generator) * scale,
            "bn.num_batches_tracked": torch.randint(0, 1000, (), generator=generator),
        }

    return [one() for _ in range(count)]


def zeros(like: Arrays) -> Arrays:
    """A model of zeros."""
    return {name: torch.zeros_like(value) for name, value in like.items()}

"""Randomness that nobody else can follow: for noise and for who is drawn, never from a job's seed."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def secret_generator(device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by the operating system, anew at each call."""
    return torch.Generator(device).manual_seed(int.from_bytes(os.urandom(8)))


def cryptographic_normal(shape: Sequence[int], sd: float) -> Tensor:
    """Normal values float64 of this standard deviation from the operating system's cryptographic generator.

    Box-Muller on 53-bit uniforms; four values are added and halved, so that the last bits of one do not tell which
    floats can occur (Holohan & Braghin 2021, as Opacus' secure mode).
    """
    count = math.prod(shape)
    raw = np.frombuffer(os.urandom(8 * 2 * 4 * count), np.uint64) >> np.uint64(11)
    uniform = (raw.astype(np.float64) + 0.5) / 2**53
    radius, angle = np.sqrt(-2 * np.log(uniform[: 4 * count])), 2 * np.pi * uniform[4 * count :]
    values = (radius * np.cos(angle)).reshape(4, count).sum(0) / 2
    return torch.from_numpy(sd * values).reshape(tuple(shape))

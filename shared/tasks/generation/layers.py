"""The layers a GAN is built of here: bounded ones for the discriminator, modulated ones for the generator."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SQUARINGS = 8  # of the power method's matrix: 256 iterations at once


def largest_singular_value(weight: Tensor, start: Tensor) -> Tensor:
    """The spectral norm of ``weight`` (out, …) as a matrix of ``out`` rows, with a gradient to ``weight``.

    Miyato et al. 2018 carry the power method's vector from step to step. Here it begins at ``start`` (out,) each time
    and is run to the end: so the norm follows from the weights alone, nothing beside them has to be exchanged or
    averaged, and a site that sat out a round computes the same.
    """
    matrix = weight.flatten(1)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        gram = matrix.float() @ matrix.float().T
        for _ in range(_SQUARINGS):
            gram = gram / torch.linalg.matrix_norm(gram).clamp(min=1e-30)
            gram = gram @ gram
        u = F.normalize(gram @ start, dim=0)
    # Products and sums, no matrix product: autocast leaves them in float32.
    norm: Tensor = torch.linalg.vector_norm((matrix * u[:, None]).sum(0))
    return norm


def _start(rows: int) -> Tensor:
    """A fixed direction no trained matrix has a reason to avoid."""
    return F.normalize(torch.randn(rows, generator=torch.Generator().manual_seed(0)), dim=0)


class SpectralConv2d(nn.Conv2d):
    """A convolution whose kernel is divided by its spectral norm, so that the layer's slope is bounded."""

    start: Tensor

    def __init__(self, inner: int, out: int, kernel: int, stride: int = 1, padding: int = 0) -> None:
        super().__init__(inner, out, kernel, stride, padding)
        self.register_buffer("start", _start(out), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """The convolution with a weight of largest singular value 1."""
        weight = self.weight / largest_singular_value(self.weight, self.start)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class SpectralLinear(nn.Linear):
    """A linear layer whose weights are divided by their spectral norm."""

    start: Tensor

    def __init__(self, inner: int, out: int) -> None:
        super().__init__(inner, out)
        self.register_buffer("start", _start(out), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """The linear map with a weight of largest singular value 1."""
        return F.linear(x, self.weight / largest_singular_value(self.weight, self.start), self.bias)


class Modulation(nn.Module):
    """Normalisation whose scale and shift, of every channel, follow from what the picture is made of.

    As in Chen et al. 2019 (self-modulation), about GroupNorm: alone it gives all pictures the same contrast at every
    stage, and what distinguishes bright films from dark ones, or clear lungs from hazy ones, is lost.
    """

    def __init__(self, channels: int, source: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(math.gcd(8, channels), channels, affine=False)
        self.scale_and_shift = nn.Linear(source, 2 * channels)
        with torch.no_grad():  # begins near plain normalisation
            self.scale_and_shift.weight.mul_(0.5)
            self.scale_and_shift.bias.zero_()

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        """``x`` (n, channels, height, width), ``source`` (n, numbers)."""
        scale, shift = self.scale_and_shift(source)[:, :, None, None].chunk(2, 1)
        modulated: Tensor = self.norm(x) * (1 + scale) + shift
        return modulated

"""Gradient inversion: a raw gradient gives the image away, a noised one does not."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio
from torch import Tensor, nn

from client.inversion import (
    clipped,
    correlation,
    cosine_distance,
    gradient_of,
    noised,
    psnr,
    reconstruct,
    total_variation,
)
from shared.config import job_from_flat
from shared.tasks import classification as task
from shared.tasks.classification.data import Batch

JOB = job_from_flat({"data.classes": "a,b", "data.size": 12, "train.device": "cpu"})
WEIGHTS = [1.0, 1.0]
NETWORKS = {
    "fully connected": lambda: nn.Sequential(nn.Flatten(), nn.Linear(144, 16), nn.Sigmoid(), nn.Linear(16, 2)),
    "convolutional": lambda: nn.Sequential(
        nn.Conv2d(1, 12, 5, 2, 2), nn.Sigmoid(), nn.Conv2d(12, 12, 5, 2, 2), nn.Sigmoid(), nn.Flatten(),
        nn.Linear(108, 2),
    ),
}  # fmt: skip


def picture() -> Tensor:
    """A bright disc and a dark bar on a ramp, (1, 1, 12, 12), as the network takes it: -2 to 2."""
    down, across = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
    image = (down + across) / 22 - 0.5
    image[(down - 4) ** 2 + (across - 3) ** 2 < 7] = 1.8
    image[8:10, 5:] = -1.8
    return image[None, None]


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = NETWORKS[name]()
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.3, 0.3)
    return model


def attack(model: nn.Module, seen: list[Tensor], batch: Batch, seed: int = 0) -> Tensor:
    return reconstruct(model, task, batch, JOB, WEIGHTS, seen, low=-2.0, high=2.0, steps=300, seed=seed)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_raw_gradient_shows_the_image_and_a_noised_one_does_not(name: str) -> None:
    model, original = network(name), picture()
    gradient = gradient_of(model, task, Batch(original, [(1,)]), JOB, WEIGHTS)
    blind = Batch(torch.zeros_like(original), [(1,)])  # the attacker has the label, not the image
    assert correlation(attack(model, gradient, blind), original) > 0.8
    assert correlation(attack(model, clipped(gradient, 1.0), blind), original) > 0.8, "clipping alone hides nothing"
    hidden = noised(clipped(gradient, 1.0), 1.0, torch.Generator().manual_seed(0))
    assert abs(correlation(attack(model, hidden, blind), original)) < 0.4


def test_an_attack_repeats_itself_and_stays_between_black_and_white() -> None:
    model, original = network("fully connected"), picture()
    batch = Batch(original, [(0,)])
    seen = noised(gradient_of(model, task, batch, JOB, WEIGHTS), 1.0, torch.Generator().manual_seed(0))
    found = [attack(model, seen, batch, seed) for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert all(image.abs().max() <= 2 for image in found)
    assert found[0].abs().max() == 2, "noise drives some pixel to the bound"


def test_a_clipped_gradient_has_the_bound_for_a_length_and_a_short_one_is_left_alone() -> None:
    torch.manual_seed(0)
    parts = [torch.randn(3, 4), torch.randn(5)]
    for bound in (0.1, 1.0, 100.0):
        whole, short = (torch.cat([part.flatten() for part in each]) for each in (parts, clipped(parts, bound)))
        assert float(short.norm()) == pytest.approx(min(bound, float(whole.norm())), rel=1e-5)
        assert torch.allclose(short / short.norm(), whole / whole.norm())


def test_the_noise_has_the_deviation_that_was_asked_for() -> None:
    (found,) = noised([torch.ones(200_000)], 0.5, torch.Generator().manual_seed(0))
    assert float(found.std()) == pytest.approx(0.5, rel=0.01)
    assert float(found.mean()) == pytest.approx(1.0, abs=0.01)


def test_measures_are_those_of_the_books() -> None:
    torch.manual_seed(0)
    one, other = torch.rand(1, 1, 6, 5, dtype=torch.float64), torch.rand(1, 1, 6, 5, dtype=torch.float64)
    a, b = one.flatten().numpy(), other.flatten().numpy()
    assert float(cosine_distance([one, one], [other, other])) == pytest.approx(
        1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    )
    assert correlation(one, other) == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert psnr(one, other) == pytest.approx(peak_signal_noise_ratio(one.numpy(), other.numpy(), data_range=1))
    square = one[0, 0]
    down = [abs(float(square[y + 1, x] - square[y, x])) for y in range(5) for x in range(5)]
    across = [abs(float(square[y, x + 1] - square[y, x])) for y in range(6) for x in range(4)]
    assert float(total_variation(one)) == pytest.approx(np.mean(down) + np.mean(across))
    assert psnr(one, one) == math.inf
    assert correlation(torch.ones(1, 1, 2, 2), one[..., :2, :2]) == 0.0

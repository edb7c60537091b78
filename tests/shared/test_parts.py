"""A model of two parts, each with a loss, a rate and betas of its own, against two optimisers in a loop by hand."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shared.cases import Sample, derived_seed
from shared.config import Job, job_from_flat
from shared.imaging.dataset import Dataset, to_float
from shared.tasks import Part
from shared.training import batch_indices, learning_rate, make_optimizer, put_moments, take_moments, train

PARTS = (Part("critic.", 1.0, (0.5, 0.9)), Part("maker.", 0.25, (0.1, 0.99)))


class Pair(nn.Module):
    """``maker`` turns noise into vectors, ``critic`` tells them from the real ones; ``reference`` stands still."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.maker = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 16))
        self.critic = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 1))
        self.reference = nn.Linear(16, 2)


class Batch(NamedTuple):
    real: Tensor
    noise: Tensor


def batch(data: Dataset, indices: Sequence[int], job: Job, device: torch.device, train: bool) -> Batch:
    real = to_float(data.columns["image"].take(indices)).to(device)
    return Batch(real, torch.randn(len(real), 4))


def step(model: Pair, batch: Batch, job: Job, class_weights: Sequence[float], part: str) -> Tensor:
    """Each loss goes through both parts, and must move its own alone."""
    softplus = nn.functional.softplus
    invented = model.maker(batch.noise)
    if part == "maker.":
        return softplus(-model.critic(invented)).mean()
    return (softplus(-model.critic(batch.real)) + softplus(model.critic(invented))).mean()


TASK: Any = SimpleNamespace(parts=lambda job: PARTS, batch=batch, step=step)


def job_of(**more: Any) -> Job:
    flat = {"train.batch_size": 3, "train.local_steps": 4, "federation.rounds": 3, "train.device": "cpu"}
    return job_from_flat(flat | {key.replace("__", "."): value for key, value in more.items()})


def data_of(n: int = 7) -> Dataset:
    images = np.random.default_rng(0).integers(0, 65536, (n, 16), dtype=np.uint16)
    return Dataset.of([Sample(str(k), (), str(k), "train") for k in range(n)], image=images)


def by_hand(model: Pair, data: Dataset, job: Job, seeds: dict[int, int], steps: int) -> list[float]:
    """Two optimisers, one after the other in each step; the noise is drawn anew where ``seeds`` says so."""
    kind, settings = job.train.optimizer, job.train
    optimizers: dict[str, torch.optim.Optimizer] = {}
    for part in PARTS:
        parameters = list(model.get_submodule(part.prefix.rstrip(".")).parameters())
        if kind == "sgd":
            optimizers[part.prefix] = torch.optim.SGD(
                parameters, 1, settings.momentum, weight_decay=settings.weight_decay, nesterov=True
            )
        else:
            optimizers[part.prefix] = torch.optim.AdamW(
                parameters, 1, betas=part.betas, weight_decay=settings.weight_decay
            )
    total = job.federation.rounds * settings.local_steps
    images = torch.from_numpy(data.columns["image"].flat.reshape(len(data), 16).astype(np.float32)) * (1 / 65535)
    everything = [0.0, 0.0]
    for k in range(steps):
        if k in seeds:
            torch.manual_seed(seeds[k])
        chosen = batch_indices(len(data), settings.batch_size, k, derived_seed(job.seed, "a"))
        drawn = Batch(images[chosen], torch.randn(len(chosen), 4))
        for place, part in enumerate(PARTS):
            for group in optimizers[part.prefix].param_groups:
                group["lr"] = learning_rate(k, total, job) * part.rate
            model.zero_grad()
            loss = step(model, drawn, job, [1.0], part.prefix)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizers[part.prefix].step()
            everything[place] += loss.item() * len(chosen)
    return everything


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_model_of_two_parts_is_trained_as_by_two_optimisers_bit_for_bit(optimizer: str) -> None:
    job, data = job_of(train__optimizer=optimizer, train__learning_rate=0.05), data_of()
    expected, found, fresh = Pair(), Pair(), Pair()
    stretches, seeds, moments = (4, 1, 7), {}, None
    first, losses = 0, np.zeros(2)
    for steps in stretches:  # the moments are handed out and in, as from round to round
        seeds[first] = derived_seed(derived_seed(job.seed, "a"), first)
        trained = train(
            found, TASK, data, job, site="a", first_step=first, steps=steps, class_weights=[1.0], moments=moments
        )
        first, moments, losses = first + steps, trained.moments, losses + trained.losses
        assert trained.loss == sum(trained.losses)
        assert trained.images == steps * 3
    expected_losses = by_hand(expected, data, job, seeds, sum(stretches))
    for (name, one), other in zip(found.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    for name, start in fresh.state_dict().items():
        assert torch.equal(found.state_dict()[name], start) == name.startswith("reference."), name


def test_without_its_moments_a_part_is_trained_otherwise() -> None:
    """That the hand-over above is at work at all."""
    job, data = job_of(train__learning_rate=0.05), data_of()
    models = [Pair(), Pair()]
    for model, kept in zip(models, (True, False), strict=True):
        call: dict[str, Any] = {"site": "a", "class_weights": [1.0]}
        moments = train(model, TASK, data, job, first_step=0, steps=4, **call).moments
        train(model, TASK, data, job, first_step=4, steps=4, moments=moments if kept else None, **call)
    one, other = (torch.cat([p.flatten() for p in model.maker.parameters()]) for model in models)
    assert not torch.equal(one, other)


def test_moments_of_all_parts_go_back_to_the_parameters_they_came_from() -> None:
    job, model = job_of(), Pair()
    optimizer = make_optimizer(model, job, PARTS)
    for number, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        parameter.grad = torch.full_like(parameter, float(number + 1))
    optimizer.step()
    again = make_optimizer(model, job, PARTS)
    put_moments(again, take_moments(optimizer))
    for parameter, held in optimizer.state.items():
        assert again.state[parameter]["exp_avg"].equal(held["exp_avg"])
        assert again.state[parameter]["exp_avg_sq"].equal(held["exp_avg_sq"])
    assert [group["betas"] for group in again.param_groups] == [part.betas for part in PARTS]
    assert len(again.state) == len(list(model.maker.parameters())) + len(list(model.critic.parameters()))

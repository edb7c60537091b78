"""The linear term of the corrections against penalties in the loss, loops by hand, and the noise it must come after."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from client.privacy import train_privately
from shared.config import Job, job_from_flat
from shared.corrections import Correction
from shared.tasks import load_task
from shared.training import train
from tests.conftest import examples

PLAIN = {
    "train.optimizer": "sgd",
    "train.momentum": 0.0,
    "train.weight_decay": 0.0,
    "train.schedule": "constant",
    "train.warmup": 0.0,
    "train.learning_rate": 0.05,
    "train.device": "cpu",
}

PRIVATE: dict[str, Any] = {
    "privacy__dp": "local",
    "privacy__noise_multiplier": 1.0,
    "train__class_weights": "none",
}


def job_of(task: str, name: str, **more: Any) -> Job:
    flat = {"task": task, "model.name": name} | examples(task).JOBS[name] | PLAIN
    return job_from_flat(flat | {key.replace("__", "."): value for key, value in more.items()})


def trained(job: Job, correction: Any = lambda model: None, steps: int = 3, **more: Any) -> tuple[nn.Module, Any]:
    task = load_task(job.task)
    model, data = task.build_model(job), examples(job.task).make(job, 8)
    term = correction(model)
    weights = [1.0] * len(job.classes)
    train(model, task, data, job, site="s", first_step=0, steps=steps, class_weights=weights, correction=term, **more)
    return model, term


def start_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_pull_is_the_gradient_of_the_proximal_penalty(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """FedProx by its definition: mu / 2 |w - w0|^2 added to the loss, differentiated by autograd."""
    job, mu = job_of("classification", "cnn", train__optimizer=optimizer), 0.7
    found, _ = trained(job, lambda model: Correction(model, start_of(model), pull=mu))
    task = load_task(job.task)
    own, start = task.step, start_of(task.build_model(job))

    def penalised(model: nn.Module, *rest: Any) -> Tensor:
        away = sum((value - start[name]).square().sum() for name, value in model.named_parameters())
        return own(model, *rest) + mu / 2 * away  # type: ignore[no-any-return]

    plain, _ = trained(job)
    monkeypatch.setattr(task, "step", penalised)
    slow, _ = trained(job)
    for one, other, without in zip(found.parameters(), slow.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5 if optimizer == "adamw" else 1e-6)
        assert not torch.equal(one, without) or torch.equal(one, other)


@pytest.mark.parametrize(("task", "name"), [("classification", "cnn"), ("generation", "dcgan")])
def test_gathered_gradients_are_how_far_plain_descent_went(task: str, name: str) -> None:
    """Option II of SCAFFOLD, from the weights alone: of each part of a model at its own rate."""
    job, steps, shift = job_of(task, name), 4, 0.3

    def correction(model: nn.Module) -> Correction:
        start = start_of(model)
        return Correction(model, start, shift={k: torch.full_like(v, shift) for k, v in start.items()}, gather=True)

    model, term = trained(job, correction, steps=steps)
    start, gathered = start_of(load_task(task).build_model(job)), term.mean_gradients()
    rates = {part.prefix: part.rate * job.train.learning_rate for part in load_task(task).parts(job)}
    assert sorted(gathered) == sorted(start)
    for key, value in model.named_parameters():
        if key in start:
            (rate,) = [rate for prefix, rate in rates.items() if key.startswith(prefix)]
            moved = (start[key] - value.detach()) / (steps * rate)
            assert torch.allclose(moved, gathered[key] + shift, atol=2e-4), key


def test_under_dp_the_term_comes_after_clipping_and_noise() -> None:
    """A shift far above the clipping norm arrives whole; the mean that is gathered is of noised gradients."""
    job, steps = job_of("classification", "cnn", **PRIVATE), 3
    task = load_task(job.task)
    model, data = task.build_model(job), examples(job.task).make(job, 8)
    start = start_of(model)
    shift = {key: torch.full_like(value, 50.0) for key, value in start.items()}
    term = Correction(model, start, shift=shift, gather=True)
    train_privately(
        model, task, data, job, site="s", noise=1.0, first_step=0, steps=steps, class_weights=[1.0] * len(job.classes),
        correction=term,
    )  # fmt: skip
    gathered = term.mean_gradients()
    for key, value in model.named_parameters():
        moved = (start[key] - value.detach()) / (steps * job.train.learning_rate)
        assert torch.allclose(moved, gathered[key] + 50.0, rtol=1e-3, atol=1e-3), key
    assert all(value.std() > 0.1 for value in gathered.values() if value.numel() > 10)  # noise, not gradients of zero


@pytest.mark.parametrize("settings", [{"federation.correction": "proximal"}, {"federation.local": "norm"}])
def test_what_can_be_right_is_allowed(settings: dict[str, Any]) -> None:
    job_from_flat(settings | {"privacy.secure_aggregation": True, "federation.max_update_norm": 1.0})
    private = {"privacy.dp": "local", "privacy.noise_multiplier": 1.0, "train.class_weights": "none"}
    job_from_flat(settings | private)


@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_under_dp_recurrent_layers_are_corrected_too(name: str) -> None:
    """Opacus would put layers of its own in their place, whose weights the term does not know."""
    job = job_of("sequence", name).replace(**PRIVATE, federation__correction="scaffold")
    task = load_task("sequence")
    model = task.build_model(job)
    start = start_of(model)
    term = Correction(model, start, shift={key: torch.full_like(value, 1000.0) for key, value in start.items()})
    data = examples("sequence").make(job, 16).subset("train")
    settings: dict[str, Any] = {"site": "s", "noise": 1.0, "first_step": 0, "steps": 1, "class_weights": [1.0, 1.0]}
    train_privately(model, task, data, job, **settings, correction=term)
    for key, value in model.named_parameters():
        assert (value.detach() - start[key]).abs().min() > 500 * job.train.learning_rate, key

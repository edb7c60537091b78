"""DP-SGD: every model's gradients of single units against slow ones, the bound, the noise, the coins."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.optimizers import DPOptimizer
from scipy.stats import binom, kstest
from torch import Tensor, nn

from client.gradients import HookedGradients, SingleGradients, put_back, swap_recurrent, unit_gradients
from client.privacy import HOOKED, clipped_sum, train_privately, units
from shared.config import Job, job_from_flat
from shared.errors import SiteRefusal, UserError
from shared.imaging.dataset import Dataset
from shared.noise import cryptographic_normal
from shared.norms import without_batch_norm
from shared.tasks import TASKS, load_task
from shared.training import set_mode
from shared.weights import exchanged
from tests.conftest import by_size, examples

CPU = torch.device("cpu")
EVERY = [(task, name) for task in TASKS for name in load_task(task).MODELS]
# Their loss draws random numbers, by turns of images: a batch of one draws others than a batch of many.
RANDOM = {
    ("classification", "vgg16"),
    ("segmentation", "fcn_resnet50"),
    ("reconstruction", "vae"),
    ("generation", "dcgan"),
}
PLAIN = {
    "privacy.dp": "local",
    "privacy.noise_multiplier": 1.0,
    "privacy.batch_norm": "group",
    "train.class_weights": "none",
    "train.optimizer": "sgd",
    "train.learning_rate": 1.0,
    "train.momentum": 0.0,
    "train.weight_decay": 0.0,
    "train.schedule": "constant",
    "train.warmup": 0.0,
}


class Case:
    """A model with its small job, its task and some training data."""

    def __init__(self, task: str, name: str, n: int = 6, **more: Any) -> None:
        module = examples(task)
        flat = {"task": task, "model.name": name, "train.device": "cpu"} | module.JOBS[name] | PLAIN
        self.job: Job = job_from_flat(flat | {key.replace("__", "."): value for key, value in more.items()})
        self.task = load_task(task)
        self.data: Dataset = module.make(self.job, n)
        self.weights: list[float] = self.task.class_weights(self.task.count_classes(self.data, self.job), self.job)

    def model(self) -> nn.Module:
        model = without_batch_norm(self.task.build_model(self.job), self.job)
        set_mode(model, self.job)
        return model

    def part(self) -> str:
        found: str = self.task.parts(self.job)[0].prefix
        return found

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        return [p for name, p in model.named_parameters() if p.requires_grad and name.startswith(self.part())]

    def train(self, model: nn.Module, data: Dataset | None = None, **more: Any) -> Any:
        given_here: dict[str, Any] = {"site": "a", "noise": 0.0, "first_step": 0, "steps": 1} | more
        return train_privately(
            model, self.task, self.data if data is None else data, self.job, class_weights=self.weights, **given_here
        )


def some(data: Dataset, rows: list[int]) -> Dataset:
    return Dataset(
        {name: column.rows(rows) for name, column in data.columns.items()}, tuple(data.samples[i] for i in rows)
    )


def one_by_one(case: Case, model: nn.Module, seed: int = 3) -> list[list[Tensor]]:
    """The slow way: the gradient of each case, by a backward pass of its own."""
    found = []
    torch.manual_seed(seed)
    for index in range(len(case.data)):
        batch = case.task.batch(case.data, [index], case.job, CPU, train=True)
        model.zero_grad()
        case.task.step(model, batch, case.job, case.weights, case.part()).backward()
        found.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in case.parameters(model)])
    model.zero_grad()
    return found


def distance(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest difference, relative to the largest value."""
    scale = max(float(each.abs().max()) for each in wanted)
    return max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True)) / scale


@pytest.mark.parametrize(("task", "name"), by_size(EVERY))
def test_gradients_of_single_units_are_those_of_the_slow_way(task: str, name: str) -> None:
    case = Case(task, name, n=2)
    model = case.model()
    wanted = one_by_one(case, model)
    torch.manual_seed(3)
    gradients = SingleGradients(model, case.task, case.data, case.job, case.weights)
    for (found, _), each in zip(
        gradients.of(units(case.data, case.job), case.parameters(model), case.part()), wanted, strict=True
    ):
        assert distance([gradient[0] for gradient in found], each) < 1e-5


def test_volumes_one_by_one_have_the_gradients_of_torchs_own_convolutions() -> None:
    case = Case("segmentation", "unet3d", n=2)
    model = case.model().to(memory_format=torch.channels_last_3d)
    wanted = one_by_one(case, model)
    torch.manual_seed(3)
    with unit_gradients(model, case.task, case.data, case.job, case.weights, hooked=False) as gradients:
        found = [each for each, _ in gradients.of([[0], [1]], case.parameters(model), case.part())]
    for each, slow in zip(found, wanted, strict=True):
        assert distance([gradient[0] for gradient in each], slow) < 1e-5
    volumes = [module for module in model.modules() if isinstance(module, nn.Conv3d)]
    assert volumes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in volumes), "as it was again"


@pytest.mark.parametrize(
    ("task", "name"), by_size(pair for pair in EVERY if pair not in RANDOM and pair[0] != "detection")
)
def test_no_case_has_a_part_in_anothers_loss(task: str, name: str) -> None:
    """The gradient of the loss of a whole batch is the mean of the single ones."""
    case = Case(task, name, n=3)
    model = case.model()
    wanted = [torch.stack(each).mean(0) for each in zip(*one_by_one(case, model), strict=True)]
    torch.manual_seed(3)  # the same patches
    batch = case.task.batch(case.data, range(len(case.data)), case.job, CPU, train=True)
    loss = case.task.step(model, batch, case.job, case.weights, case.part())
    found = torch.autograd.grad(loss, case.parameters(model), allow_unused=True)
    assert distance([torch.zeros(()) if g is None else g for g in found], wanted) < 2e-5


@pytest.mark.parametrize(("task", "name"), sorted(HOOKED))
def test_hooks_give_the_gradients_of_the_slow_way(task: str, name: str) -> None:
    case = Case(task, name, train__batch_size=4)
    model = case.model()
    names = [name for name, _ in model.named_parameters()]
    wanted = [dict(zip(names, each, strict=True)) for each in one_by_one(case, model)]
    swapped = swap_recurrent(model)
    torch.manual_seed(3)
    gradients = HookedGradients(model, case.task, case.data, case.job, case.weights)
    chunks = [found for found, _ in gradients.of(units(case.data, case.job), case.parameters(model), case.part())]
    gradients.close()
    assert [len(chunk[0]) for chunk in chunks] == [4, 2]  # in turns of the batch size
    inner = {name: place for place, (name, _) in enumerate(model.named_parameters())}
    for index, each in enumerate(wanted):
        for name, slow in each.items():
            fast = chunks[index // 4][inner[name]][index % 4]
            assert distance([fast], [slow]) < 1e-5, name
    put_back(swapped)
    assert not any("opacus" in type(module).__module__ for module in model.modules())


@pytest.mark.parametrize(("task", "name"), by_size(EVERY))
def test_one_case_more_changes_the_sum_by_no_more_than_the_bound(task: str, name: str) -> None:
    bound = 0.01  # far below the gradients', so that it binds
    case = Case(task, name, n=3, privacy__sampling_rate=1.0, privacy__clipping_norm=bound)
    states = []
    for data in (case.data, some(case.data, list(range(len(case.data) - 1)))):
        model = case.model()
        case.train(model, data, declared=1.0)
        states.append([parameter.detach().clone() for parameter in case.parameters(model)])
    rate = case.task.parts(case.job)[0].rate
    change = math.sqrt(sum(float((a - b).double().square().sum()) for a, b in zip(*states, strict=True))) / rate
    assert 0.5 * bound < change <= bound * 1.001


@given(st.integers(1, 5), st.floats(0.01, 100), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_clipping_is_opacus_clipping(count: int, bound: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(count, *shape, generator=generator) * 3 for shape in ((4, 5), (7,), (2, 3, 3))]
    parameters = [nn.Parameter(torch.zeros(gradient.shape[1:])) for gradient in gradients]
    optimizer = DPOptimizer(
        torch.optim.SGD(parameters), noise_multiplier=0.0, max_grad_norm=bound, expected_batch_size=1
    )  # fmt: skip
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad_sample = gradient.clone()  # type: ignore[attr-defined]
    optimizer.clip_and_accumulate()
    found = clipped_sum(gradients, bound)
    for parameter, ours in zip(parameters, found, strict=True):
        assert torch.allclose(ours, parameter.summed_grad, rtol=1e-5, atol=1e-6)  # type: ignore[attr-defined]
    assert math.sqrt(sum(float(each.double().square().sum()) for each in found)) <= count * bound * 1.00001


def test_a_gradient_below_the_bound_is_left_as_it_is() -> None:
    case = Case("classification", "cnn", privacy__sampling_rate=1.0, privacy__clipping_norm=1e4)
    model = case.model()
    before = [p.detach().clone() for p in case.parameters(model)]
    wanted = [torch.stack(each).mean(0) for each in zip(*one_by_one(case, model), strict=True)]
    case.train(model)
    found = [a - p.detach() for a, p in zip(before, case.parameters(model), strict=True)]
    assert distance(found, wanted) < 1e-4


@pytest.mark.parametrize("cryptographic", [False, True])
def test_the_noise_is_normal_and_as_large_as_said(cryptographic: bool) -> None:
    """A step of an empty draw is noise alone."""
    case = Case(
        "classification", "cnn", privacy__sampling_rate=1e-6, privacy__clipping_norm=0.5, model__width=16
    )  # fmt: skip
    drawn = []
    for _ in range(2):
        model = case.model()
        before = [p.detach().clone() for p in case.parameters(model)]
        outcome = case.train(model, noise=3.0, declared=1e6, cryptographic=cryptographic)
        assert outcome.images == 0
        assert outcome.steps == 1
        drawn.append(
            torch.cat([(a - p.detach()).flatten() for a, p in zip(before, case.parameters(model), strict=True)])
        )
    assert len(drawn[0]) > 5000
    for noise in drawn:
        assert abs(float(noise.std()) / 1.5 - 1) < 0.03
        assert kstest(noise.numpy() / 1.5, "norm").pvalue > 1e-6
    assert not torch.equal(*drawn)  # the same job, site and step: other noise
    assert abs(float(torch.corrcoef(torch.stack(drawn))[0, 1])) < 0.1


def test_cryptographic_noise_is_normal_in_its_tails_too() -> None:
    values = cryptographic_normal((400, 500), 2.0).numpy().ravel() / 2
    assert kstest(values, "norm").pvalue > 1e-6
    assert abs((values**4).mean() - 3) < 0.1
    assert len(np.unique(values)) == len(values)


def test_every_unit_is_drawn_by_its_own_coin_and_empty_draws_are_a_step() -> None:
    case = Case("classification", "cnn", n=20, privacy__sampling_rate=0.1)
    model = case.model()
    sizes = [case.train(model, noise=1.0, first_step=step).images for step in range(200)]
    assert 0 in sizes
    low, high = binom.interval(1 - 1e-9, 20 * 200, 0.1)
    assert low <= sum(sizes) <= high
    assert 0.6 < np.var(sizes) / (20 * 0.1 * 0.9) < 1.5


def test_all_images_of_a_patient_together_are_one_unit() -> None:
    case = Case(
        "classification", "cnn", privacy__unit="patient", privacy__sampling_rate=1.0, privacy__clipping_norm=0.01
    )  # fmt: skip
    samples = tuple(
        dataclasses.replace(sample, patient="p" if k else "q") for k, sample in enumerate(case.data.samples)
    )
    data = Dataset(case.data.columns, samples)
    assert sorted(map(len, units(data, case.job))) == [1, 5]
    states = []
    for rows in (list(range(6)), [0]):
        model = case.model()
        case.train(model, some(data, rows), declared=1.0)
        states.append([parameter.detach().clone() for parameter in case.parameters(model)])
    change = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(*states, strict=True)))
    assert 0.005 < change <= 0.01 * 1.001


@pytest.mark.parametrize("way", ["single", "hooks"])
def test_a_patients_gradient_is_the_mean_of_the_images_whatever_the_batch(way: str) -> None:
    case = Case(
        "classification", "cnn", privacy__unit="patient", privacy__gradients=way, privacy__sampling_rate=1.0,
        privacy__clipping_norm=1e4, train__batch_size=2,
    )  # fmt: skip
    samples = tuple(dataclasses.replace(sample, patient="p") for sample in case.data.samples)
    model = case.model()
    before = [p.detach().clone() for p in case.parameters(model)]
    wanted = [torch.stack(each).mean(0) for each in zip(*one_by_one(case, model), strict=True)]
    case.train(model, Dataset(case.data.columns, samples))
    assert distance([a - p.detach() for a, p in zip(before, case.parameters(model), strict=True)], wanted) < 1e-4


def test_a_declared_number_stands_for_the_true_one() -> None:
    """The same gradient sum is divided by what was declared, not by what is there."""
    case = Case("classification", "cnn", privacy__sampling_rate=1.0)
    changes = []
    for declared in (10.0, 20.0):
        model = case.model()
        before = [p.detach().clone() for p in case.parameters(model)]
        case.train(model, declared=declared)
        changes.append(torch.cat([(a - p).flatten() for a, p in zip(before, case.parameters(model), strict=True)]))
    assert torch.allclose(changes[0], 2 * changes[1], atol=1e-6)


def test_a_resumed_site_goes_on_with_its_moments() -> None:
    case = Case("classification", "cnn", train__optimizer="adamw", privacy__sampling_rate=1.0)
    whole, parts = case.model(), case.model()
    case.train(whole, steps=4)
    first = case.train(parts, steps=2)
    case.train(parts, first_step=2, steps=2, moments=first.moments)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))


def test_batch_norm_is_refused_or_converted_and_frozen_it_stays() -> None:
    with pytest.raises(UserError, match="BatchNorm"):
        Case("classification", "resnet18", privacy__batch_norm="refuse").model()
    converted = Case("classification", "resnet18")
    assert not [name for name in exchanged(converted.model(), converted.job) if "running" in name or "batches" in name]
    frozen = Case("classification", "resnet18", model__freeze="backbone", privacy__batch_norm="refuse")
    model = frozen.model()
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    assert buffers
    frozen.train(model, noise=1.0)
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())


def test_what_cannot_be_right_is_refused() -> None:
    case = Case("segmentation", "fcn_resnet50", n=2, privacy__gradients="hooks")
    model = case.model()
    with pytest.raises(UserError, match="hooks"):
        case.train(model)
    case = Case("classification", "cnn")
    with pytest.raises(SiteRefusal) as refusal:
        case.train(case.model(), some(case.data, []))
    assert refusal.value.code == "no-training-images"


@pytest.mark.parametrize(("task", "name"), [("sequence", "gru"), ("classification", "cnn")])
def test_a_round_that_fails_leaves_the_model_fit_for_the_next(task: str, name: str) -> None:
    case = Case(task, name, privacy__gradients="hooks", privacy__sampling_rate=1.0)
    model = case.model()
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    with pytest.raises(SiteRefusal, match="not finite"):
        case.train(model)
    assert [type(module) for module in model.modules()] == kinds
    model.load_state_dict(kept)
    assert case.train(model).images == len(case.data)

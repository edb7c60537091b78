"""Adversarial alignment against gradients by hand, and on sites that can be told apart by what does not matter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.adversary import CODE, NAME, Adversary, code_of, strength, with_discriminator
from shared.config import Job, job_from_flat
from shared.imaging.dataset import Dataset
from shared.tasks import load_task
from shared.training import train
from shared.weights import exchanged_names
from tests.conftest import examples
from tests.shared.test_corrections import job_of


def ready(job: Job) -> tuple[Any, nn.Module, Dataset, list[float]]:
    task = load_task(job.task)
    return task, task.build_model(job), examples(job.task).make(job, 8), [1.0] * len(job.classes)


@pytest.mark.parametrize(
    ("task_name", "name", "head"),
    [("classification", "cnn", "head"), ("segmentation", "unet", "head"), ("sequence", "cnn_gru", "recurrent.head")],
)
def test_a_step_is_that_of_the_losses_by_hand(task_name: str, name: str, head: str) -> None:
    """The network goes down the task's loss and up the discriminator's, which itself goes down its own."""
    job = job_of(task_name, name, federation__correction="adversarial", federation__align_weight=3.0)
    total, step, rate = 10, 4, job.train.learning_rate
    task, model, data, weights = ready(job)
    _, other, _, _ = ready(job)
    kept: list[Tensor] = []
    other.train().get_submodule(head).register_forward_pre_hook(lambda module, given: kept.append(given[0]))
    shown: list[Any] = []
    own = task.batch

    def watched(*args: Any, **more: Any) -> Any:
        shown.append(own(*args, **more))
        return shown[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task, "batch", watched)
        term = Adversary(model, job, "north")
        found = train(
            model, task, data, job, site="north", first_step=step, steps=1, class_weights=weights, correction=term,
            total=total,
        )  # fmt: skip
    loss = task.step(other, shown[0], job, weights, "")
    features = kept[0] if kept[0].ndim == 2 else kept[0].flatten(2).mean(2)
    logits = getattr(other, NAME).layers(features)
    bits = F.binary_cross_entropy_with_logits(logits, code_of("north").expand(len(features), CODE))
    named = dict(other.named_parameters())
    of_task = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
    of_bits = torch.autograd.grad(bits, list(named.values()), allow_unused=True)
    much = 3.0 * strength(step / total)
    assert 0 < much < 3
    after = dict(model.named_parameters())
    moved = 0
    for (path, before), one, two in zip(named.items(), of_task, of_bits, strict=True):
        sign = 1.0 if path.startswith(f"{NAME}.") else -much
        gradient = (0 if one is None else one) + sign * (0 if two is None else two)
        assert torch.allclose(after[path], before - rate * gradient, atol=2e-6), path
        moved += two is not None and not path.startswith(f"{NAME}.")
    assert moved > 4  # the discriminator's loss does reach the network
    assert found.loss == pytest.approx(loss.item() * found.images, rel=1e-4)  # the task's alone is told


BOTH, NUMBERS, LATE = {"data.modalities": "pa,lateral"}, {"data.tabular": "age,sex"}, {"model.fusion": "late"}
NETWORKS = [
    (task, name, more)
    for task, kinds in {
        "classification": [{}, BOTH, NUMBERS, BOTH | LATE, BOTH | NUMBERS | LATE],
        "segmentation": [{}],
        "sequence": [{}],
    }.items()
    for name in load_task(task).MODELS
    for more in kinds
]


@pytest.mark.parametrize(("task_name", "name", "more"), NETWORKS)
def test_every_network_has_a_discriminator_of_what_its_head_reads(
    task_name: str, name: str, more: dict[str, Any]
) -> None:
    job = job_from_flat({"task": task_name, "model.name": name, "federation.strategy": "dann"} | more)
    task, shapes = load_task(task_name), []
    with torch.device("meta"):  # shapes alone
        model = task.build_model(job).train()
        model.get_submodule(getattr(model, NAME).head).register_forward_pre_hook(
            lambda _, given: shapes.append(given[0].shape)
        )
        model(*task.example(job))
    assert [shape[1] for shape in shapes] == [getattr(model, NAME).layers[0].in_features]


def test_nothing_of_it_is_left_on_the_network_even_if_training_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of("classification", "cnn", federation__correction="adversarial")
    task, model, data, weights = ready(job)
    hooks = model.get_submodule("head")._forward_pre_hooks
    term = Adversary(model, job, "s")
    train(model, task, data, job, site="s", first_step=0, steps=2, class_weights=weights, correction=term)
    assert not hooks
    monkeypatch.setattr(Adversary, "completed", lambda *_: (_ for _ in ()).throw(RuntimeError("on purpose")))
    with pytest.raises(RuntimeError, match="on purpose"):
        train(model, task, data, job, site="s", first_step=2, steps=1, class_weights=weights, correction=term)
    assert not hooks


def test_only_a_job_that_asks_for_it_has_a_discriminator_and_it_travels() -> None:
    job = job_of("classification", "cnn")
    assert not hasattr(load_task("classification").build_model(job), NAME)
    asked = job.replace(federation__correction="adversarial")
    model, again = (load_task("classification").build_model(asked) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert {name for name in model.state_dict() if name.startswith(NAME)} <= set(exchanged_names(model, asked))
    plain = dict(load_task("classification").build_model(job).named_parameters())
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in plain.items())
    assert job_from_flat({"federation.strategy": "dann"}).federation.correction == "adversarial"


def test_codes_of_sites_are_their_own() -> None:
    codes = {tuple(code_of(f"hospital-{number}").tolist()) for number in range(60)}
    assert len(codes) == 60  # by chance two of sixty are the same in one case of 37
    assert {bit for code in codes for bit in code} == {0.0, 1.0}


AT = (-3.0, 0.0, 3.0)  # what is the site's own; the class is -1 or 1, both with noise of .5


class Looking(nn.Module):
    """Two numbers of a case, of which one is its class and the other its site, through a hidden layer to a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))  # type: ignore[no-any-return]


class Numbers:
    """As much of a task as training needs, for ``Looking``."""

    def __init__(self) -> None:
        from shared.tasks import Part

        self.parts = lambda job: (Part(),)

    def batch(self, data: Any, indices: list[int], job: Job, device: Any, train: bool) -> Any:
        return data.x[indices], data.y[indices]

    def step(self, model: nn.Module, batch: Any, job: Job, weights: Any, part: str) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])


class Cases:
    """Cases of a site; ``at`` is what tells its own."""

    def __init__(self, at: float, seed: int, n: int = 200) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.y = torch.randint(0, 2, (n,), generator=generator)
        noise = 0.5 * torch.randn(n, 2, generator=generator)
        self.x = noise + torch.stack([2.0 * self.y - 1, torch.full((n,), at)], 1)

    def __len__(self) -> int:
        return len(self.y)


def told_apart(model: Looking, sites: list[Cases]) -> tuple[float, float]:
    """Which share of the features' variance lies between sites; how well the model names the class."""
    with torch.no_grad():
        features = [model.body(site.x).numpy() for site in sites]
        right = [(model(site.x).argmax(1) == site.y).float().mean().item() for site in sites]
    between = np.var([part.mean(0) for part in features], 0).sum() / np.concatenate(features).var(0).sum()
    return float(between), float(np.mean(right))


def federated(correction: str) -> Looking:
    """FedAvg of one step a round over three sites."""
    job = Job().replace(
        federation__correction=correction, federation__align_weight=3.0, federation__rounds=600,
        train__optimizer="sgd", train__momentum=0.0, train__learning_rate=0.2, train__schedule="constant",
        train__weight_decay=0.0, train__warmup=0.0, train__device="cpu",
    )  # fmt: skip
    torch.manual_seed(0)
    model = with_discriminator(Looking(), "head", job)
    sites = [Cases(at, seed) for seed, at in enumerate(AT)]
    for number in range(job.federation.rounds):
        common = {name: value.clone() for name, value in model.state_dict().items()}
        total = {name: torch.zeros_like(value) for name, value in common.items()}
        for place, data in enumerate(sites):
            model.load_state_dict(common)
            term = Adversary(model, job, f"site-{place}") if correction == "adversarial" else None
            train(
                model, Numbers(), data, job, site=f"site-{place}", first_step=number, steps=1,  # type: ignore[arg-type]
                class_weights=[1.0, 1.0], correction=term,
            )  # fmt: skip
            for name, value in model.state_dict().items():
                total[name] += value / len(sites)
        model.load_state_dict(total)
    assert isinstance(model, Looking)
    return model


@pytest.mark.slow
def test_features_tell_less_of_the_site_and_as_much_of_the_class() -> None:
    """One of two numbers is the class and one the site. Both models name the class as well as can be."""
    others = [Cases(at, seed + 10) for seed, at in enumerate(AT)]
    share_before, class_before = told_apart(federated("none"), others)
    share_after, class_after = told_apart(federated("adversarial"), others)
    assert share_before > 0.03
    assert share_after < share_before / 4
    assert class_after > class_before - 0.02 > 0.9

"""The training loop against a plain one written by hand, its batches against an endless shuffled stream."""

from __future__ import annotations

import copy
import math
from collections import Counter
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight
from torch import nn

import shared.tasks.classification as task
from shared.cases import Sample, derived_seed
from shared.config import Job, job_from_flat
from shared.errors import SiteRefusal, UserError
from shared.imaging.dataset import Dataset
from shared.tasks.classification import build_model, class_weights, count_classes, step
from shared.tasks.classification.data import Batch
from shared.training import batch_indices, learning_rate, pick_device, train

torch.set_num_threads(1)
WEIGHTS = [0.5, 2.0]
ONE_STEP: dict[str, Any] = {"site": "a", "first_step": 0, "steps": 1, "class_weights": WEIGHTS}


def job_of(**more: Any) -> Job:
    flat = {
        "data.size": 16,
        "model.width": 4,
        "train.batch_size": 5,
        "train.local_steps": 4,
        "federation.rounds": 3,
        "train.device": "cpu",
    }
    return job_from_flat(flat | {key.replace("__", "."): value for key, value in more.items()})


def data_of(job: Job, n: int = 13) -> Dataset:
    shape = (n, job.data.channels, job.data.size, job.data.size)
    images = np.random.default_rng(0).integers(0, 65536, shape, dtype=np.uint16)
    return Dataset.of([Sample(str(k), (k % 2,), str(k), "train") for k in range(n)], image=images)


# --- batches ----------------------------------------------------------------------------------------------------------

SIZES = st.tuples(st.integers(1, 12), st.integers(1, 15), st.integers(0, 99))


def endless(n: int, seed: int) -> Any:
    epoch = 0
    while True:
        generator = torch.Generator().manual_seed(derived_seed(seed, "order", epoch))
        yield from torch.randperm(n, generator=generator).tolist()
        epoch += 1


@settings(max_examples=60, deadline=None)
@given(SIZES)
def test_batches_are_cut_from_the_endless_stream_of_shuffled_epochs(case: tuple[int, int, int]) -> None:
    n, size, seed = case
    stream = endless(n, seed)
    for number in range(8):
        assert batch_indices(n, size, number, seed) == list(islice(stream, min(size, n)))


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(0, 40))
def test_every_image_comes_equally_often_in_any_whole_number_of_epochs(case: tuple[int, int, int], first: int) -> None:
    n, size, seed = case
    size = min(size, n)
    # n steps of min(size, n) images are `size` epochs; from a start at an epoch's edge each image comes `size` times.
    counts = Counter(index for k in range(n) for index in batch_indices(n, size, first * n + k, seed))
    assert counts == dict.fromkeys(range(n), size)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(0, 40), st.integers(1, 40))
def test_in_any_stretch_of_steps_no_image_comes_two_times_more_often_than_another(
    case: tuple[int, int, int], first: int, steps: int
) -> None:
    n, size, seed = case
    counts = Counter(dict.fromkeys(range(n), 0))
    for k in range(first, first + steps):
        counts.update(batch_indices(n, size, k, seed))
    assert max(counts.values()) - min(counts.values()) <= 2  # a part of an epoch at either end


def test_another_seed_or_epoch_gives_another_order() -> None:
    orders = {tuple(batch_indices(50, 50, epoch, seed)) for epoch in range(4) for seed in range(4)}
    assert len(orders) == 16


# --- the learning rate ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.35])
def test_the_cosine_rate_rises_in_a_line_and_falls_as_half_a_cosine(warmup: float) -> None:
    job = job_of(train__warmup=warmup, train__learning_rate=0.3)
    total = 40
    warm = warmup * total
    found = [learning_rate(k, total, job) for k in range(total)]
    for k, rate in enumerate(found):
        place = (k - warm) / (total - warm)
        expected = 0.3 * (k + 1) / (warm + 1) if k < warm else 0.3 * math.cos(math.pi / 2 * place) ** 2
        assert rate == pytest.approx(expected, rel=1e-12)
    peak = math.ceil(warm)
    assert max(found) == found[peak]
    assert found[:peak] == sorted(found[:peak])
    assert found[peak:] == sorted(found[peak:], reverse=True)
    assert 0 < found[-1] < 0.3 * 0.01


def test_the_constant_rate_stays_at_its_peak_after_the_rise() -> None:
    job = job_of(train__schedule="constant", train__warmup=0.2, train__learning_rate=0.4)
    assert [learning_rate(k, 10, job) for k in range(10)] == pytest.approx([0.4 / 3, 0.8 / 3, *[0.4] * 8])


def test_a_run_of_one_step_has_a_rate_above_zero() -> None:
    for warmup in (0.0, 0.9):
        assert 0 < learning_rate(0, 1, job_of(train__warmup=warmup, train__learning_rate=0.5)) <= 0.5


# --- train ------------------------------------------------------------------------------------------------------------


def plain_training(model: nn.Module, data: Dataset, job: Job, site: str, steps: int) -> float:
    """What `train` is to equal: one optimiser, one loop, nothing handed in or out."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings_ = job.train
    optimizer: torch.optim.Optimizer
    if settings_.optimizer == "sgd":
        momentum = settings_.momentum
        optimizer = torch.optim.SGD(
            parameters, lr=1, momentum=momentum, nesterov=momentum > 0, weight_decay=settings_.weight_decay
        )
    else:
        optimizer = torch.optim.AdamW(parameters, lr=1, weight_decay=settings_.weight_decay)
    model.to(memory_format=torch.channels_last)
    model.train()
    if job.model.freeze == "backbone":
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    total = job.federation.rounds * settings_.local_steps
    stream = endless(len(data), derived_seed(job.seed, site))
    labels = torch.tensor([sample.target[0] for sample in data.samples])
    weights = torch.tensor(WEIGHTS)
    images = data.columns["image"].flat.reshape(len(data), job.data.channels, job.data.size, job.data.size)
    everything = 0.0
    for k in range(steps):
        chosen = list(islice(stream, min(settings_.batch_size, len(data))))
        pixels = torch.from_numpy(images[chosen].astype(np.float32)) * (1 / 65535)
        pixels = ((pixels - 0.5) / 0.25).contiguous(memory_format=torch.channels_last)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(k, total, job)
        optimizer.zero_grad()
        losses = F.cross_entropy(model(pixels), labels[chosen], reduction="none") * weights[labels[chosen]]
        losses.mean().backward()
        optimizer.step()
        everything += losses.sum().item()
    return everything


CASES: dict[str, dict[str, Any]] = {
    "adamw": {},
    "sgd": {"train__optimizer": "sgd", "train__learning_rate": 0.02},
    "sgd without momentum": {"train__optimizer": "sgd", "train__momentum": 0.0},
    "batch larger than the data": {"train__batch_size": 64, "train__schedule": "constant"},
    "batchnorm": {"model__name": "resnet18", "data__size": 33},
    "frozen backbone": {"model__name": "resnet18", "data__size": 33, "model__freeze": "backbone"},
}


@pytest.mark.parametrize("case", CASES)
def test_training_in_stretches_equals_a_plain_loop_bit_for_bit(case: str) -> None:
    job = job_of(**CASES[case])
    data = data_of(job)
    expected, found = build_model(job), build_model(job)
    expected_loss = plain_training(expected, data, job, "a", 12)
    moments: dict[str, Any] | None = None
    first, loss, images = 0, 0.0, 0
    for steps in (4, 1, 7):
        trained = train(
            found, task, data, job, site="a", first_step=first, steps=steps, class_weights=WEIGHTS, moments=moments
        )
        assert trained.steps == steps
        first, moments = first + steps, trained.moments
        loss, images = loss + trained.loss, images + trained.images
    for (name, one), other in zip(found.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert images == 12 * min(job.train.batch_size, len(data))


def test_sites_of_different_names_draw_different_batches_and_equal_calls_equal_weights() -> None:
    job = job_of(augment__flip="both", augment__intensity=0.3)
    results = []
    for site in ("a", "a", "b"):
        model = build_model(job)
        torch.rand(len(results) + 1)  # the caller's random numbers must not matter
        train(model, task, data_of(job), job, site=site, first_step=0, steps=3, class_weights=WEIGHTS)
        results.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_the_moments_handed_in_stay_as_they_were() -> None:
    """So that a round repeated from the same moments repeats itself."""
    job = job_of()
    model = build_model(job)
    call: dict[str, Any] = {"site": "a", "class_weights": WEIGHTS}
    moments = train(model, task, data_of(job), job, first_step=0, steps=2, **call).moments
    kept = copy.deepcopy(moments)
    train(copy.deepcopy(model), task, data_of(job), job, first_step=2, steps=2, moments=moments, **call)
    assert list(moments) == list(kept)
    assert all(torch.equal(moments[name], value) for name, value in kept.items())


@pytest.mark.parametrize("keep", [True, False])
def test_moments_are_copied_out_only_where_the_job_keeps_them(keep: bool) -> None:
    job = job_of(train__keep_optimizer=keep)
    assert bool(train(build_model(job), task, data_of(job), job, **ONE_STEP).moments) is keep


def test_training_learns_what_can_be_learnt() -> None:
    job = job_of(train__learning_rate=0.01, train__batch_size=8, train__local_steps=20)
    images = np.random.default_rng(1).integers(0, 20000, (16, 1, 16, 16), dtype=np.uint16)
    images[::2, :, :, :8] += 30000
    data = Dataset.of(data_of(job, 16).samples, image=images)
    model = build_model(job)
    train(model, task, data, job, site="a", first_step=0, steps=40, class_weights=[1.0, 1.0])
    sums = task.collect(model, data, job, torch.device("cpu"))
    assert task.summarise(sums, job)["accuracy"].value == 1.0


def test_a_site_without_training_images_refuses() -> None:
    job = job_of()
    with pytest.raises(SiteRefusal) as caught:
        train(build_model(job), task, data_of(job).subset("val"), job, **ONE_STEP)
    assert caught.value.code == "no-training-images"


@pytest.mark.parametrize("name", ["cnn", "resnet18"])
def test_a_site_with_a_single_training_image_trains_or_refuses(name: str) -> None:
    job = job_of(model__name=name, data__size=32)
    try:
        trained = train(build_model(job), task, data_of(job, 1), job, **ONE_STEP)
    except SiteRefusal:
        return
    assert trained.images == 1


def test_a_loss_that_is_no_longer_finite_is_refused_as_diverged() -> None:
    job = job_of(train__optimizer="sgd", train__learning_rate=100.0, train__warmup=0.0, train__weight_decay=10.0)
    with pytest.raises(SiteRefusal, match="learning_rate") as caught:
        train(build_model(job), task, data_of(job), job, site="a", first_step=0, steps=60, class_weights=[1e30, 1e30])
    assert caught.value.code == "diverged"


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "", "cuda:x", "meta"])
def test_a_device_that_is_not_there_is_refused_in_one_line(device: str) -> None:
    with pytest.raises(UserError, match=r"train\.device"):
        pick_device(job_of(train__device=device))


def test_auto_takes_the_processor_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device(job_of(train__device="auto")) == torch.device("cpu")
    assert pick_device(job_of(train__device="cpu")) == torch.device("cpu")


# --- the loss of a batch ----------------------------------------------------------------------------------------------


class Given(nn.Module):
    """A model that answers with its input."""

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return logits


TARGETS: dict[bool, list[tuple[int, ...]]] = {
    False: [(0,), (2,), (2,), (1,), (0,)],
    True: [(), (0,), (1, 2), (0, 1, 2), (2,)],
}
MANY = [0.25, 1.0, 7.0]


def single_loss(logits: list[float], target: tuple[int, ...], multilabel: bool) -> float:
    """The loss of one image in plain Python."""
    if multilabel:
        terms = [
            MANY[k] * math.log1p(math.exp(-x)) if k in target else math.log1p(math.exp(x)) for k, x in enumerate(logits)
        ]
        return sum(terms) / len(terms)
    return MANY[target[0]] * (math.log(sum(map(math.exp, logits))) - logits[target[0]])


@pytest.mark.parametrize("multilabel", [False, True])
def test_the_loss_of_a_batch_is_the_mean_of_its_images_losses_each_weighed_alone(multilabel: bool) -> None:
    job = job_of(data__classes="a,b,c", data__multilabel=multilabel)
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = TARGETS[multilabel]
    alone = [single_loss(row.tolist(), target, multilabel) for row, target in zip(logits, targets, strict=True)]
    assert step(Given(), Batch(logits, targets), job, MANY).item() == pytest.approx(sum(alone) / 5)
    for k in range(5):
        rest = [i for i in range(5) if i != k]
        loss = step(Given(), Batch(logits[rest], [targets[i] for i in rest]), job, MANY).item()
        assert 4 * loss == pytest.approx(sum(alone) - alone[k])


COUNTS = st.lists(st.integers(0, 50), min_size=2, max_size=5).filter(any)


@given(COUNTS)
def test_balanced_class_weights_are_sklearns_over_the_classes_there_are(counts: list[int]) -> None:
    job = job_of(data__classes=",".join("abcde"[: len(counts)]))
    found = class_weights(counts, job)
    present = [k for k, count in enumerate(counts) if count]
    truth = np.repeat(range(len(counts)), counts)
    expected = dict(zip(present, compute_class_weight("balanced", classes=np.array(present), y=truth), strict=True))
    assert found == pytest.approx([expected.get(k, 1.0) for k in range(len(counts))])
    assert sum(w * n for w, n in zip(found, counts, strict=True)) == pytest.approx(sum(counts))
    assert class_weights(counts, job.replace(train__class_weights="none")) == [1.0] * len(counts)


def test_the_weight_of_a_label_is_negatives_over_positives_at_most_100() -> None:
    job = job_of(data__classes="a,b,c,d", data__multilabel=True)
    assert class_weights([50, 10, 1, 0, 1000], job) == [19.0, 99.0, 100.0, 1.0]


def test_classes_are_counted_per_image_and_the_images_come_last_with_several_labels() -> None:
    samples = tuple(Sample(str(k), target, "", "train") for k, target in enumerate(TARGETS[True]))
    images = np.zeros((5, 1, 8, 8), np.uint16)
    several = job_of(data__classes="a,b,c", data__multilabel=True)
    assert count_classes(Dataset.of(samples, image=images), several) == [2, 2, 3, 5]
    samples = tuple(Sample(str(k), target, "", "train") for k, target in enumerate(TARGETS[False]))
    assert count_classes(Dataset.of(samples, image=images), job_of(data__classes="a,b,c")) == [2, 1, 2]

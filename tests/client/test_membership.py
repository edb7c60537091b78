"""Membership inference: its figures against slow counts, and what it finds in models that do and do not remember."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from torch import nn

from client.membership import (
    FEW,
    Floats,
    Mask,
    area,
    judge,
    likelihood_ratios,
    lira,
    memory,
    random_halves,
    some,
    threshold_attack,
    train_on,
    true_positives,
)
from shared.cases import Sample
from shared.config import Job, job_from_flat
from shared.imaging.dataset import Dataset
from shared.tasks import classification as task
from shared.tasks import load_task
from tests.conftest import examples

CPU = torch.device("cpu")
VALUES = st.lists(st.integers(-4, 4), min_size=1, max_size=30).map(lambda found: np.array(found, dtype=np.float64))
LEARNT = {
    "data.classes": "a,b",
    "data.size": 8,
    "model.width": 8,
    "train.batch_size": 16,
    "train.learning_rate": 0.01,
    "train.class_weights": "none",
    "train.device": "cpu",
    "federation.rounds": 60,
}
PRIVATE = {
    "privacy.dp": "local",
    "privacy.noise_multiplier": 30.0,
    "privacy.sampling_rate": 0.25,
    "federation.rounds": 10,
}


def noise_images(n: int = 60, seed: int = 0) -> Dataset:
    """Noise with random labels: whoever is right about them remembers them. Half is for training, half for testing."""
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 65536, (n, 1, 8, 8)).astype(np.uint16)
    labels = generator.integers(0, 2, n).tolist()
    return Dataset.of([Sample(str(k), (labels[k],), str(k), ("train", "test")[k % 2]) for k in range(n)], image=images)


def local_models(job: Job, noise: float, models: int = 7) -> tuple[Floats, Mask]:
    data = noise_images()
    inside = random_halves([[k] for k in range(len(data))], len(data), models, 0)
    trained = [
        train_on(np.flatnonzero(row).tolist(), task, data, job, name=str(number), noise=noise, device=CPU)
        for number, row in enumerate(inside)
    ]
    return np.stack([memory(model, task, data, job, CPU) for model in trained]), inside


@pytest.fixture(scope="module")
def overfitted() -> tuple[Floats, Mask]:
    return local_models(job_from_flat(LEARNT), 0.0)


@given(VALUES, VALUES)
def test_the_area_is_the_share_of_pairs_in_order(members: Floats, others: Floats) -> None:
    pairs = [(m > o) + 0.5 * (m == o) for m in members for o in others]
    found = area(members, others)
    assert found.value == pytest.approx(np.mean(pairs))
    assert found.low <= found.value <= found.high


@given(VALUES, VALUES, st.sampled_from([0.01, 0.1, 0.25]))
def test_true_positives_are_those_of_the_best_threshold_that_is_allowed(
    members: Floats, others: Floats, rate: float
) -> None:
    thresholds = [*members, *others, -100.0]
    allowed = [t for t in thresholds if np.sum(others > t) <= rate * len(others)]
    best = max(np.mean(members > t) for t in allowed)
    assert true_positives(members, others, rate).value == pytest.approx(best)


def test_memory_is_the_log_odds_of_the_class() -> None:
    job, data = job_from_flat(LEARNT), noise_images(12)
    model = task.build_model(job)
    with torch.no_grad():
        images = task.batch(data, range(12), job, CPU, train=False).images
        shares = model.eval()(images).double().softmax(1).numpy()
    p = shares[np.arange(12), [sample.target[0] for sample in data.samples]]
    assert memory(model, task, data, job, CPU) == pytest.approx(np.log(p / (1 - p)), abs=1e-5)


def test_memory_tells_images_apart_that_float32_is_equally_sure_of() -> None:
    class Sure(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            margin = 10 + images.mean((1, 2, 3))
            return torch.stack([margin, -margin], 1)

    data = noise_images(12)
    data = Dataset(data.columns, tuple(Sample(str(k), (0,), str(k), "train") for k in range(12)))
    job = job_from_flat(LEARNT)
    found = memory(Sure(), task, data, job, CPU)
    brightness = [data.columns["image"][k].astype(float).mean() for k in range(12)]
    assert np.argsort(found).tolist() == np.argsort(brightness).tolist()
    assert (np.float32(np.exp(-found)) + np.float32(1) == 1).all(), "in float32 they would not differ from 1"


@pytest.mark.parametrize(
    ("name", "model"),
    [("segmentation", "unet"), ("sequence", "cnn_gru"), ("reconstruction", "vae")],
)
def test_memory_draws_nothing_at_random(name: str, model: str) -> None:
    """Not a patch, a code, a change of the image; and it is large where the task's loss is small."""
    module = examples(name)
    flat: dict[str, Any] = {"task": name, "model.name": model, "train.device": "cpu", "augment.intensity": 0.5}
    job = job_from_flat(flat | module.JOBS[model])
    data, other = module.make(job, 4), load_task(name)
    network = other.build_model(job)
    found = memory(network, other, data, job, CPU)
    assert (memory(network, other, data, job, CPU) == found).all()
    assert np.isfinite(found).all()
    with torch.no_grad():
        weights = [1.0] * len(other.class_weights(other.count_classes(data, job), job))
        losses = [float(other.step(network, other.batch(data, [k], job, CPU, False), job, weights)) for k in range(4)]
    assert np.argsort(losses).tolist() == np.argsort(-found).tolist()


def test_an_untrained_model_tells_nothing_and_one_that_learnt_by_heart_nearly_all() -> None:
    job, data = job_from_flat(LEARNT), noise_images(100)
    members, others = data.subset("train"), data.subset("test")
    fresh = task.build_model(job)
    found = judge(memory(fresh, task, members, job, CPU), memory(fresh, task, others, job, CPU))
    assert found.auc.low < 0.5 < found.auc.high
    by_heart = job.replace(federation__rounds=300)
    learnt = train_on(range(len(members)), task, members, by_heart, name="a", noise=0.0, device=CPU)
    found = judge(memory(learnt, task, members, job, CPU), memory(learnt, task, others, job, CPU))
    assert found.auc.value > 0.9
    assert found.auc.low > 0.8
    assert found.tpr.value > 0.2


@given(st.integers(0, 2**31), st.integers(2, 12), st.integers(1, 4))
def test_halves_are_halves_and_units_stay_together(seed: int, units: int, each: int) -> None:
    rows = np.random.default_rng(seed).permutation(units * each).reshape(units, each).tolist()
    inside = random_halves(rows, units * each, 5, seed)
    assert (inside.sum(1) == units // 2 * each).all()
    assert all(len(set(row[unit])) == 1 for row in inside for unit in rows)


def test_the_other_models_do_not_tell_what_one_was_trained_on() -> None:
    """As halves balanced over all models would: an image in fewer of the others is then surely in this one."""
    inside = random_halves([[k] for k in range(4000)], 4000, 9, 1)
    counts = inside[1:].sum(0)
    assert judge(counts[inside[0]].astype(float), counts[~inside[0]].astype(float)).auc.value == pytest.approx(
        0.5, abs=0.03
    )


def test_likelihood_ratios_are_those_of_normal_distributions() -> None:
    generator = np.random.default_rng(0)
    shadows, target = generator.normal(0, 2, (8, 30)), generator.normal(0, 2, 30)
    inside = np.tile([True, False], (30, 4)).T  # so that every image is in some and not in others
    slow_in, slow_out = shadows[0::2], shadows[1::2]
    sd_in, sd_out = (np.sqrt(((half - half.mean(0)) ** 2).sum() / (3 * 30)) for half in (slow_in, slow_out))
    slow = norm.logpdf(target, slow_in.mean(0), sd_in) - norm.logpdf(target, slow_out.mean(0), sd_out)
    assert likelihood_ratios(target, shadows, inside) == pytest.approx(slow)
    few = likelihood_ratios(target, shadows[: FEW - 1], inside[: FEW - 1])
    assert few == pytest.approx(target - shadows[1]), "offline: only the one without it; its sd cannot be known"


def test_an_image_in_all_shadows_or_in_none_is_judged_by_the_mean_gap() -> None:
    shadows = np.array([[3.0, 3.0, 3.0], [3.2, 3.2, 3.2], [0.0, 3.1, 0.0], [0.2, 3.1, 0.2]])
    inside = np.array([[True, True, False], [True, True, False], [False, True, False], [False, True, False]])
    shadows[:2, 2] = [0.0, 0.2]
    low, high = (likelihood_ratios(np.full(3, value), shadows, inside) for value in (0.1, 3.1))
    assert (low < 0).all()
    assert (high > 0).all()


@settings(max_examples=25)
@given(st.integers(0, 2**31))
def test_lira_does_not_mind_how_sure_a_model_is_of_everything(seed: int) -> None:
    generator = np.random.default_rng(seed)
    inside = random_halves([[k] for k in range(40)], 40, 9, seed)
    values = generator.normal(0, 1, (9, 40)) + inside
    changed = values * generator.uniform(0.1, 10, (9, 1)) + generator.normal(0, 10, (9, 1))
    assert lira(changed, inside).auc.value == pytest.approx(lira(values, inside).auc.value)


def test_lira_finds_what_the_threshold_cannot_where_some_images_are_harder_than_others() -> None:
    generator = np.random.default_rng(0)
    inside = random_halves([[k] for k in range(200)], 200, 9, 0)
    values = generator.normal(0, 4, 200) + generator.normal(0, 1, (9, 200)) + 2 * inside
    simple, sharp = threshold_attack(values, inside), lira(values, inside)
    assert simple.auc.value < 0.7
    assert sharp.auc.low > simple.auc.high
    assert sharp.tpr.value > simple.tpr.value


def test_lira_is_no_worse_than_the_threshold_on_models_that_learnt_by_heart(overfitted: tuple[Floats, Mask]) -> None:
    simple, sharp = threshold_attack(*overfitted), lira(*overfitted)
    assert simple.auc.low > 0.5
    assert sharp.auc.value > simple.auc.value - 0.05


def test_against_much_noise_both_attacks_only_guess() -> None:
    """The same images and labels that models learn by heart without noise."""
    values, inside = local_models(job_from_flat(LEARNT | PRIVATE), 30.0)
    for found in (threshold_attack(values, inside), lira(values, inside)):
        assert found.auc.low < 0.5 < found.auc.high


def test_some_cases_keep_their_arrays_and_samples() -> None:
    data = noise_images(10)
    part = some(data, [7, 2])
    assert [sample.path for sample in part.samples] == ["7", "2"]
    assert (part.columns["image"][0] == data.columns["image"][7]).all()

"""What a generator is worth, against closed forms, scipy, scikit-learn and slow versions of the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import balanced_accuracy_score
from torch import Tensor, nn

from shared.cases import Sample
from shared.config import Job, job_from_flat
from shared.imaging.augment import normalise
from shared.imaging.dataset import Dataset, to_float, to_uint16
from shared.tasks import TASKS, Sums, add_sums
from shared.tasks.generation.frechet import (
    TOTAL_VARIANCE,
    Moments,
    _redraw,
    _root,
    estimate,
    frechet_distance,
    moments,
    scaled_distance,
    upper,
)
from shared.tasks.generation.learning import collect, make_samples
from shared.tasks.generation.metrics import NEAR, _place, _share_below, consistent, summarise
from shared.tasks.generation.models import FEATURES, Gan, build_model
from shared.tasks.generation.nearest import nearest, thumbnails
from shared.tasks.generation.separation import Separation

CPU = torch.device("cpu")


def job_of(**more: Any) -> Job:
    flat = {
        "task": "generation",
        "model.name": "dcgan",
        "model.width": 4,
        "model.latent": 8,
        "model.conditional": True,
        "data.classes": "left,right",
        "data.size": 12,
        "train.device": "cpu",
        "evaluation.samples": 40,
        "evaluation.batch_size": 17,
    }
    return job_from_flat(flat | {key.replace("__", "."): value for key, value in more.items()})


def pictures_of(classes: list[int], seed: int, size: int = 12) -> np.ndarray:
    """Noise, with the left (class 0) or the right half bright."""
    generator = np.random.default_rng(seed)
    found = generator.random((len(classes), 1, size, size)) * generator.random((len(classes), 1, 1, 1))
    for number, kind in enumerate(classes):
        found[number, :, :, kind * size // 2 : (kind + 1) * size // 2] += 1
    return found / 2


def data_of(classes: list[int], seed: int = 0, split: str = "test", training: int = 30) -> Dataset:
    """Images of these classes in one split, beside training images of the same site."""
    train = [k % 2 for k in range(training)]
    samples = [Sample(f"{split}{seed}-{k}", (kind,), str(k), split) for k, kind in enumerate(classes)]
    samples += [Sample(f"train{seed}-{k}", (kind,), str(k), "train") for k, kind in enumerate(train)]
    pictures = np.concatenate([pictures_of(classes, seed), pictures_of(train, seed + 1000)])
    return Dataset.of(samples, image=to_uint16(pictures)).subset(split)


class Fixed(nn.Module):
    """A generator that gives pictures it was handed, in turn, whatever the noise: one list per class."""

    def __init__(self, pictures: dict[int, Tensor]) -> None:
        super().__init__()
        self.pictures, self.given = pictures, dict.fromkeys(pictures, 0)

    def forward(self, noise: Tensor, classes: Tensor) -> Tensor:
        rows = []
        for kind in classes.tolist():
            own = self.pictures[kind]
            rows.append(own[self.given[kind] % len(own)])
            self.given[kind] += 1
        return torch.stack(rows)


def gan_of(job: Job, pictures: dict[int, Tensor] | None = None) -> Gan:
    """A GAN with its starting weights, or one whose generator gives these pictures."""
    model = build_model(job)
    if pictures is not None:
        model.average = Fixed(pictures)
    return model


def made_of(seed: int, n: int = 60) -> dict[int, Tensor]:
    return {kind: torch.from_numpy(pictures_of([kind] * n, seed + kind)).float() for kind in (0, 1)}


# --- the Fréchet distance ---------------------------------------------------------------------------------------------


def covariance_of(seed: int, d: int, rank: int | None = None) -> np.ndarray:
    root = np.random.default_rng(seed).standard_normal((d, rank or d + 3))
    return root @ root.T / root.shape[1]


@settings(max_examples=30, deadline=None)
@given(d=st.integers(1, 12), seed=st.integers(0, 1000))
def test_it_is_the_formula_with_scipys_matrix_root(d: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    a, b = covariance_of(seed, d), covariance_of(seed + 1, d)
    first, second = generator.standard_normal(d), generator.standard_normal(d)
    cross = np.real(sqrtm(a @ b))
    expected = np.square(first - second).sum() + np.trace(a) + np.trace(b) - 2 * np.trace(cross)
    found = frechet_distance(Moments(first, a), Moments(second, b))
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-8)
    assert frechet_distance(Moments(second, b), Moments(first, a)) == pytest.approx(found, rel=1e-6, abs=1e-8)
    assert frechet_distance(Moments(first, a), Moments(first, a)) == pytest.approx(0, abs=1e-8)


def test_it_has_the_closed_form_of_independent_normals() -> None:
    first, second = np.array([0.0, 1.0, 5.0]), np.array([2.0, 1.0, 4.0])
    a, b = np.array([1.0, 4.0, 0.0]), np.array([9.0, 4.0, 2.0])
    expected = 4 + 0 + 1 + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    assert frechet_distance(Moments(first, np.diag(a)), Moments(second, np.diag(b))) == pytest.approx(expected)


def test_it_takes_covariances_of_fewer_images_than_features() -> None:
    a, b = covariance_of(0, 20, rank=4), covariance_of(1, 20, rank=3)
    zero = np.zeros(20)
    expected = np.trace(a) + np.trace(b) - 2 * np.linalg.svd(_root(a) @ _root(b), compute_uv=False).sum()
    assert frechet_distance(Moments(zero, a), Moments(zero, b)) == pytest.approx(expected, rel=1e-6)


def test_moments_from_sums_are_numpys() -> None:
    features = np.random.default_rng(0).random((50, 7))
    found = moments(features.sum(0), upper(features.T @ features), 50)
    assert np.allclose(found.mean, features.mean(0))
    assert np.allclose(found.covariance, np.cov(features.T, bias=True))


@settings(max_examples=20, deadline=None)
@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 100))
def test_the_scale_of_the_features_does_not_matter(scale: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    real, made = (generator.random((40, 5)) * generator.random(5) for _ in range(2))

    def of(features: np.ndarray) -> Moments:
        return Moments(features.mean(0), np.cov(features.T, bias=True))

    value = scaled_distance(of(real), of(made))
    assert scaled_distance(of(real * scale), of(made * scale)) == pytest.approx(value, rel=1e-6)
    plain = frechet_distance(of(real), of(made)) / real.var(0).sum()
    assert value == pytest.approx(TOTAL_VARIANCE * plain, rel=1e-9)


@pytest.mark.parametrize("n", [5, 200])
def test_moments_are_redrawn_as_samples_of_a_normal_distribution_have_them(n: int) -> None:
    """Against moments of samples drawn one by one; with 5 images of 6 features the covariance is singular."""
    d, times = 6, 3000
    generator = np.random.default_rng(1)
    covariance, mean = covariance_of(3, d), np.arange(d, dtype=float)
    factor = np.linalg.cholesky(covariance)
    redrawn = [_redraw(mean, factor, n, generator) for _ in range(times)]
    drawn = []
    for _ in range(times):
        sample = mean + generator.standard_normal((n, d)) @ factor.T
        drawn.append(Moments(sample.mean(0), np.cov(sample.T, bias=True)))
    for pick in (lambda m: m.mean, lambda m: m.covariance):
        ours, theirs = (np.stack([pick(one) for one in many]) for many in (redrawn, drawn))
        error = theirs.std(0) / math.sqrt(times) + 1e-12
        assert np.all(np.abs(ours.mean(0) - theirs.mean(0)) < 6 * error)
        assert np.allclose(ours.std(0), theirs.std(0), rtol=0.15, atol=1e-9)
    assert np.linalg.matrix_rank(redrawn[0].covariance) == min(d, n - 1)


@pytest.mark.parametrize(("shift", "widest"), [(0.0, 2.2), (0.6, 1.3)])
def test_the_interval_is_as_wide_as_the_distance_varies_from_sample_to_sample(shift: float, widest: float) -> None:
    """Wider where there is no difference at all: the draws then differ from each other more than from the truth."""
    generator = np.random.default_rng(2)
    d, n, m = 8, 150, 100
    root = np.linalg.cholesky(covariance_of(5, d))

    def draw(count: int, offset: float) -> Moments:
        sample = generator.standard_normal((count, d)) @ root.T + offset
        return Moments(sample.mean(0), np.cov(sample.T, bias=True))

    found = [estimate(draw(n, 0), n, draw(m, shift), m) for _ in range(150)]
    truth = TOTAL_VARIANCE * d * shift**2 / np.trace(root @ root.T)
    spread = np.std([one.value for one in found])
    halves = [(one.high - one.value) / 1.96 for one in found]
    assert 0.75 < np.mean(halves) / spread < widest
    assert np.mean([one.low <= truth <= one.high for one in found]) >= 0.9
    assert all(0 <= one.low <= one.value <= one.high and one.n == n for one in found)


# --- sums -------------------------------------------------------------------------------------------------------------


def features_by_hand(model: Gan, pictures: Tensor, job: Job) -> np.ndarray:
    """One image at a time through the reference's layers, then the mean of each channel over the image."""
    layers = list(model.reference.features)[:-2]  # without pooling and flattening
    rows = []
    for picture in pictures:
        x = normalise(picture[None], job)
        for layer in layers:
            x = layer(x)
        rows.append(x.mean((0, 2, 3)).double().numpy())
    return np.stack(rows)


@torch.inference_mode()
def test_the_distance_is_that_of_the_pooled_images_and_samples_in_the_classes_of_the_images() -> None:
    """Three sites of different size and mix. By hand: all real features, and each class's samples weighed by its share
    of the real images.
    """
    job = job_of()
    sites = [data_of([0] * 11 + [1] * 3, 1), data_of([1] * 9, 2), data_of([0, 1] * 4, 3)]
    pictures = made_of(7, 20)
    sums = add_sums([collect(gan_of(job, pictures), site, job, CPU) for site in sites])
    model = gan_of(job)
    images = [to_float(site.columns["image"].take(range(len(site)))) for site in sites]
    real = features_by_hand(model, torch.cat(images), job)
    made = {kind: features_by_hand(model, rows, job) for kind, rows in pictures.items()}
    shares = [15 / 31, 16 / 31]
    mean = sum(share * made[kind].mean(0) for kind, share in enumerate(shares))
    second = sum(share * made[kind].T @ made[kind] / 20 for kind, share in enumerate(shares))
    expected = scaled_distance(
        Moments(real.mean(0), np.cov(real.T, bias=True)), Moments(mean, second - np.outer(mean, mean))
    )
    found = summarise(sums, job)["frechet"]
    assert real.shape == (31, FEATURES)
    assert found.value == pytest.approx(expected, rel=1e-4)
    assert found.n == 31
    assert all(consistent(collect(gan_of(job, pictures), site, job, CPU), job) for site in sites)


@settings(max_examples=6, deadline=None)
@given(cuts=st.lists(st.integers(0, 14), max_size=3), conditional=st.booleans())
def test_sums_of_parts_add_up_to_the_sums_of_the_whole(cuts: list[int], conditional: bool) -> None:
    """To rounding, key by key: samples are counted once for each real image, however the images are dealt out."""
    job = job_of(model__conditional=conditional)
    data = data_of([0, 1, 1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 0, 1])
    model = build_model(job)
    whole = collect(model, data, job, CPU)
    parts = []
    for start, end in pairwise([0, *sorted(cuts), 14]):
        rows = list(range(start, end))
        columns = {name: column.rows(rows) for name, column in data.columns.items()}
        part = Dataset(columns, tuple(data.samples[k] for k in rows), origin=data.whole)
        parts.append(collect(model, part, job, CPU))
    added = add_sums(parts)
    assert list(added) == list(whole)
    for key, value in whole.items():
        assert added[key] == (
            value if np.asarray(value).dtype.kind == "i" else pytest.approx(value, rel=1e-4, abs=1e-6)
        ), key


def test_a_site_without_training_images_says_nothing_of_copies_but_all_else() -> None:
    job = job_of()
    data = data_of([0, 1] * 5, training=0)
    sums = collect(build_model(job), data, job, CPU)
    found = summarise(sums, job)
    assert consistent(sums, job)
    assert math.isnan(found["memorised"].value)
    assert found["frechet"].n == found["synthetic_accuracy"].n == 10


def test_no_image_at_all_gives_nothing_and_no_error() -> None:
    for conditional in (True, False):
        job = job_of(model__conditional=conditional)
        found = summarise(collect(build_model(job), Dataset.of(()), job, CPU), job)
        assert set(found) == set(TASKS["generation"].metrics)
        assert all(math.isnan(one.value) and one.n == 0 for one in found.values())


def test_one_image_has_no_spread_and_so_no_distance() -> None:
    job = job_of()
    found = summarise(collect(build_model(job), data_of([1]), job, CPU), job)
    assert math.isnan(found["frechet"].value)
    assert found["synthetic_accuracy"].n == 1


def tampered(sums: Sums) -> list[Sums]:
    """Sums a site cannot have, each wrong in one place."""

    def bumped(key: str, place: int, by: float) -> Sums:
        values = list(sums[key])  # type: ignore[arg-type]
        values[place] += by
        return {**sums, key: values}

    return [
        {**sums, "n": sums["n"] + 1},  # type: ignore[operator]
        {**sums, "n": sums["n"] - 1},  # type: ignore[operator]
        bumped("confusion", 0, 1),
        bumped("held_distances", 4, 1),
        bumped("made_distances", 4, 1),
        {**sums, "held_distances": [0] * 2000},
        bumped("real_features", 0, 1e4),
        bumped("made_features", 5, 1e4),
    ]


def test_sums_that_contradict_each_other_are_found_out() -> None:
    job = job_of()
    sums = collect(build_model(job), data_of([0, 1] * 6), job, CPU)
    assert consistent(sums, job)
    assert [consistent(wrong, job) for wrong in tampered(sums)] == [False] * 8


def test_every_site_makes_the_same_samples_and_leaves_the_global_generator_alone() -> None:
    job = job_of()
    model = build_model(job)
    torch.manual_seed(1)
    first = make_samples(model, job, CPU)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = make_samples(model, job, CPU)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.thumbnails, second.thumbnails)
    assert first.thumbnails.shape == (2, 20, 144)
    assert first.features.shape == (2, 20, FEATURES)
    other = make_samples(model, job.replace(seed=1), CPU)
    assert not torch.equal(first.thumbnails, other.thumbnails)


# --- train on synthetic, test on real ---------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(classes=st.integers(2, 4), seed=st.integers(0, 200))
def test_the_separation_is_scikit_learns(classes: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    features = generator.standard_normal((classes, 30, 6)) @ generator.standard_normal((6, 6))
    features += generator.standard_normal((classes, 1, 6))
    asked = generator.standard_normal((200, 6)) * 2
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.1, priors=np.full(classes, 1 / classes))
    # Scikit-learn shrinks the covariance of standardised features: here each has the same spread within the classes.
    centred = (features - features.mean(1, keepdims=True)).reshape(-1, 6)
    root = np.linalg.inv(np.linalg.cholesky(np.cov(centred.T, bias=True)))
    features, asked = features @ root.T, asked @ root.T
    theirs.fit(features.reshape(-1, 6), np.repeat(np.arange(classes), 30))
    found = Separation(features).classes(asked)
    assert np.mean(found == theirs.predict(asked)) >= 0.99


def test_features_that_are_always_zero_do_no_harm() -> None:
    generator = np.random.default_rng(0)
    features = generator.standard_normal((2, 40, 5))
    features[1, :, 0] += 4
    features[..., 3:] = 0
    asked = np.zeros((2, 5))
    asked[1, 0] = 4
    assert Separation(features).classes(asked).tolist() == [0, 1]
    assert Separation(np.zeros((2, 10, 5))).classes(asked).tolist() == [0, 0]


def test_a_classifier_that_saw_only_good_samples_knows_real_images_and_swapped_ones_mislead_it() -> None:
    job = job_of()
    data = data_of([0] * 30 + [1] * 10)
    good, scores = made_of(50), {}
    for name, pictures in {"good": good, "swapped": {0: good[1], 1: good[0]}, "same": {0: good[0], 1: good[0]}}.items():
        model = gan_of(job, pictures)
        samples = make_samples(gan_of(job, pictures), job, CPU)
        scores[name] = summarise(collect(model, data, job, CPU), job)["synthetic_accuracy"]
        rule = Separation(samples.features.numpy())
        real = features_by_hand(gan_of(job), to_float(data.columns["image"].take(range(40))), job)
        truth = [sample.target[0] for sample in data.samples]
        assert scores[name].value == pytest.approx(balanced_accuracy_score(truth, rule.classes(real)))
    assert scores["good"].value > 0.9
    assert scores["swapped"].value < 0.1
    assert 0.2 < scores["same"].value < 0.8


def test_a_generator_that_is_not_told_the_class_has_no_such_score() -> None:
    job = job_of(model__conditional=False)
    found = summarise(collect(build_model(job), data_of([0, 1] * 5), job, CPU), job)
    assert math.isnan(found["synthetic_accuracy"].value)
    assert found["frechet"].n == 10


# --- copies -----------------------------------------------------------------------------------------------------------


def test_the_nearest_training_image_is_found_by_brute_force() -> None:
    data = data_of([0, 1] * 4, training=50)
    training = data.whole.subset("train")
    pictures = torch.from_numpy(pictures_of([0, 1, 1], 9)).float()
    found = nearest(thumbnails(pictures), training)
    others = to_float(training.columns["image"].take(range(50)))
    expected = [min((one - other).square().mean().sqrt().item() for other in others) for one in pictures]
    assert np.allclose(found, expected, atol=1e-6)
    assert nearest(thumbnails(others[3:5]), training).max() < 1e-7


def test_large_pictures_are_averaged_down() -> None:
    picture = torch.rand(2, 3, 64, 64)
    found = thumbnails(picture)
    assert found.shape == (2, 3 * 32 * 32)
    blocks = picture.reshape(2, 3, 32, 2, 32, 2).mean((3, 5)).flatten(1)
    assert torch.allclose(found.float(), blocks, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(counts=st.lists(st.integers(0, 9), min_size=3, max_size=30).filter(any), share=st.floats(0.01, 0.99))
def test_a_place_in_a_histogram_has_its_share_below(counts: list[int], share: float) -> None:
    histogram = np.array(counts, dtype=float)
    assert _share_below(histogram, _place(histogram, share)) == pytest.approx(share, abs=1e-9)


def test_a_place_in_a_fine_histogram_is_numpys_quantile() -> None:
    values = np.random.default_rng(0).gamma(3, 0.02, 4000)
    histogram = np.histogram(values, 2000, (0, 1))[0].astype(float)
    for share in (0.05, 0.5, 0.9):
        assert _place(histogram, share) / 2000 == pytest.approx(np.quantile(values, share), abs=1e-3)


def copies(job: Job, data: Dataset, pictures: Tensor) -> Any:
    sums = collect(gan_of(job, {0: pictures, 1: pictures}), data, job, CPU)
    assert consistent(sums, job)
    return summarise(sums, job)["memorised"]


def test_a_generator_that_gives_training_images_is_flagged_and_one_that_draws_afresh_is_not() -> None:
    job = job_of(evaluation__samples=400)
    data = data_of([0, 1] * 150, training=200)
    training = to_float(data.whole.subset("train").columns["image"].take(range(200)))
    fresh = torch.from_numpy(pictures_of([0, 1] * 100, 77)).float()
    caught, clear = copies(job, data, training), copies(job, data, fresh)
    assert caught.value == pytest.approx(1.0)
    assert caught.low > 0.9
    assert caught.n == clear.n == 400
    assert clear.low < NEAR < clear.high
    half = copies(job, data, torch.cat([training[:100], fresh[:100]])[torch.randperm(200)])
    assert 0.4 < half.value < 0.65
    assert half.low > NEAR


def test_real_chest_images_count_as_copied_only_if_they_are(shared_data: Callable[[str], Path]) -> None:
    """Held-out images as the generator's: 5 % near. Training images, even dimmed, blurred or a little noisy: all."""
    arrays = np.load(shared_data("pneumoniamnist_balanced") / "pneumoniamnist.npz")
    splits = {name: np.float32(arrays[f"{name}_images"][:, None] / 255) for name in ("train", "val", "test")}
    site = splits["train"][::4]
    samples = [Sample(f"t{k}", (k % 2,), str(k), "train") for k in range(len(site))]
    samples += [Sample(f"v{k}", (k % 2,), str(k), "val") for k in range(len(splits["val"]))]
    data = Dataset.of(samples, image=to_uint16(np.concatenate([site, splits["val"]]))).subset("val")
    job = job_of(data__size=28, evaluation__samples=400, evaluation__batch_size=128)
    generator = torch.Generator().manual_seed(0)
    known = torch.from_numpy(site[:200])
    held = copies(job, data, torch.from_numpy(splits["test"][:200]))
    assert held.low < NEAR < held.high
    assert 0.01 < held.value < 0.11
    noise = 0.03 * torch.randn(known.shape, generator=generator)
    blurred = nn.functional.avg_pool2d(known, 3, 1, 1, count_include_pad=False)
    for altered in (known, known * 0.9 + 0.05, blurred, (known + noise).clamp(0, 1)):
        assert copies(job, data, altered).value > 0.95

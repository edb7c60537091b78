"""Dealing images out to invented sites."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.cases import SPLITS, Sample
from shared.config import Job, job_from_flat
from shared.errors import UserError
from simulations.partition import partition


def job_of(kind: str, sites: int = 4, **more: Any) -> Job:
    flat = {"data.partition": kind, "data.partition_sites": sites, "data.classes": "a,b,c"}
    return job_from_flat(flat | {key.replace("__", "."): value for key, value in more.items()})


def samples_of(train: int = 300, val: int = 60, test: int = 90, classes: int = 3) -> list[Sample]:
    """One image per patient, classes in turn."""
    return [
        Sample(f"{split}/{k}", (k % classes,), f"{split}-{k}", split)
        for split, number in zip(SPLITS, (train, val, test), strict=True)
        for k in range(number)
    ]


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["iid", "dirichlet", "size"]),
    patients=st.lists(
        st.tuples(st.sampled_from(SPLITS), st.integers(1, 4), st.integers(0, 2)), min_size=20, max_size=60
    ),
    sites=st.integers(1, 4),
    seed=st.integers(0, 50),
)
def test_every_image_goes_to_one_site_and_no_patient_to_two(
    kind: str, patients: list[tuple[str, int, int]], sites: int, seed: int
) -> None:
    samples = [
        Sample(f"{number}-{k}", ((first + k) % 3,), f"p{number}", split)
        for number, (split, images, first) in enumerate(patients)
        for k in range(images)
    ]
    try:
        found = partition(samples, job_of(kind, sites, data__partition_seed=seed, data__partition_alpha=5.0))
    except UserError:
        return  # a site without training images
    assert sorted(index for site in found for index in site) == list(range(len(samples)))
    assert len(found) == sites
    for number in range(len(patients)):
        assert sum(any(samples[k].patient == f"p{number}" for k in site) for site in found) == 1
    assert all(any(samples[k].split == "train" for k in site) for site in found)
    dealt = [len({samples[k].patient for k in site if samples[k].split == "test"}) for site in found]
    assert max(dealt) - min(dealt) <= 1


def counts_of(found: list[list[int]], samples: list[Sample]) -> dict[tuple[str, int], list[int]]:
    """Images of each site by split and class."""
    table: dict[tuple[str, int], list[int]] = defaultdict(lambda: [0] * len(found))
    for number, site in enumerate(found):
        for k in site:
            table[samples[k].split, samples[k].target[0]][number] += 1
    return table


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["iid", "dirichlet", "size"])
def test_training_and_validation_images_follow_the_shares_of_numpys_draw(kind: str, seed: int) -> None:
    samples = samples_of(train=1200, val=300)
    table = counts_of(partition(samples, job_of(kind, data__partition_seed=seed, data__partition_alpha=3.0)), samples)
    generator = np.random.default_rng([seed, 0])
    drawn = [generator.dirichlet([3.0] * 4) for _ in range(3)]
    shares = {"iid": [np.full(4, 0.25)] * 3, "dirichlet": drawn, "size": [drawn[0]] * 3}[kind]
    for split, number in (("train", 400), ("val", 100)):
        for k in range(3):
            assert sum(table[split, k]) == number
            assert np.abs(table[split, k] - shares[k] * number).max() <= 1


def test_the_draws_are_spread_as_a_dirichlet_distribution_is() -> None:
    """Means and variances of a site's share over many draws, against the closed form."""
    samples = samples_of(train=600, val=0, test=0, classes=1)
    found = []
    for seed in range(250):
        try:
            sites = partition(samples, job_of("dirichlet", data__partition_seed=seed, data__partition_alpha=2.0))
        except UserError:
            continue
        found += [len(site) / 600 for site in sites]
    mean, variance = 1 / 4, (1 / 4) * (3 / 4) / (4 * 2.0 + 1)
    assert np.mean(found) == pytest.approx(mean)
    assert np.var(found) == pytest.approx(variance, rel=0.15)


def test_a_small_alpha_makes_the_mix_unequal_and_size_keeps_it() -> None:
    samples = samples_of(train=3000)

    def spread(kind: str) -> float:
        """Largest difference of a class's share between two sites."""
        job = job_of(kind, data__partition_alpha=0.5, data__partition_seed=3)
        table = counts_of(partition(samples, job), samples)
        mix = np.array([table["train", k] for k in range(3)]) / np.sum([table["train", k] for k in range(3)], axis=0)
        return float((mix.max(1) - mix.min(1)).max())

    assert spread("dirichlet") > 0.3
    assert spread("size") < 0.1
    assert spread("iid") < 0.01


def test_the_draw_depends_on_its_own_seed_and_not_on_the_jobs() -> None:
    samples = samples_of()
    first = partition(samples, job_of("dirichlet", data__partition_alpha=5.0))
    assert partition(samples, job_of("dirichlet", data__partition_alpha=5.0, seed=77, name="x")) == first
    assert partition(samples, job_of("dirichlet", data__partition_alpha=5.0, data__partition_seed=1)) != first


def test_who_is_dealt_where_is_shuffled_and_not_in_the_order_of_the_files() -> None:
    samples = samples_of(train=300, val=0, test=0, classes=1)
    for site in partition(samples, job_of("iid")):
        assert 80 < np.mean(site) < 220
        assert len(site) == 75


@pytest.mark.parametrize(("classes", "each"), [(1, 50), (10, 5), (25, 2), (3, 1)])
def test_iid_sites_are_of_about_equal_size_however_many_classes_there_are(classes: int, each: int) -> None:
    """What is left over of each class must not always go to the same site."""
    samples = samples_of(train=classes * each, val=0, test=0, classes=classes)
    sizes = [len(site) for site in partition(samples, job_of("iid", sites=2 if each == 1 else 4))]
    assert max(sizes) - min(sizes) <= 1


def test_test_images_of_every_class_go_round_evenly() -> None:
    samples = samples_of(test=90)
    job = job_of("dirichlet", data__partition_alpha=1.0, data__partition_seed=2)
    table = counts_of(partition(samples, job), samples)
    for k in range(3):
        assert max(table["test", k]) - min(table["test", k]) <= 1


def test_images_without_any_label_are_dealt_too() -> None:
    samples = [Sample(str(k), (), str(k), "train") for k in range(8)]
    found = partition(samples, job_of("iid", data__multilabel=True))
    assert Counter(map(len, found)) == {2: 4}


def test_a_site_that_would_get_no_training_image_is_named_with_the_ways_out() -> None:
    with pytest.raises(UserError, match=r"of 40 would get no training image.*partition_alpha"):
        partition(samples_of(train=30), job_of("iid", sites=40))

"""Noise added by the server: what a single site can change, how large the noise is, where the bound goes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from server.aggregation import weighted_mean
from server.central import Central, check
from shared.config import Job, job_from_flat
from shared.errors import UserError

SHAPES = {"a": (40, 50), "b": (300,)}


def arrays(seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(shape, generator=generator) * scale for name, shape in SHAPES.items()}
    return found | {"updates": torch.tensor(3)}


def norm(some: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return float(np.sqrt(sum(float((some[k].double() - other[k].double()).square().sum()) for k in SHAPES)))


def job(**more: object) -> Job:
    flat = {"privacy.dp": "central", "privacy.noise_multiplier": 1.0, "train.class_weights": "none"}
    return job_from_flat(flat | {f"privacy.{key}": value for key, value in more.items()})


def test_without_noise_and_within_the_bound_it_is_the_plain_mean_of_the_sites() -> None:
    reference = arrays(0)
    replies = [arrays(seed) for seed in (1, 2, 3)]
    merged = Central(0.0, 1e6, adaptive=False).merge([(7.0, reply) for reply in replies], reference, 3)
    plain = weighted_mean([(1.0, reply) for reply in replies])
    assert all(torch.allclose(merged[name], plain[name], atol=1e-6) for name in plain)


@given(st.integers(0, 5), st.floats(0.01, 1e4), st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_a_site_moves_the_result_by_no_more_than_the_bound(seed: int, scale: float, others: int) -> None:
    reference = arrays(0)
    honest = [(1.0, arrays(10 + k)) for k in range(others)]
    asked = others + 1
    with_it = Central(0.0, 2.0, adaptive=False).merge([*honest, (1.0, arrays(seed, scale))], reference, asked)
    without = Central(0.0, 2.0, adaptive=False).merge(honest, reference, asked)
    assert norm(with_it, without) <= 2.0 / asked * 1.001


@pytest.mark.parametrize(("adaptive", "noise", "count_noise"), [(False, 0.8, 0.0), (True, 0.8, 1.0), (True, 9.0, 9.0)])
def test_the_noise_is_as_large_as_the_guarantee_wants(adaptive: bool, noise: float, count_noise: float) -> None:
    """Sites that change nothing: what comes out is noise. With an adapted bound the count takes a share of it."""
    reference, asked = arrays(0), 5
    central = Central(noise, 1.5, adaptive)
    merged = central.merge([(1.0, reference)] * asked, reference, asked)
    drawn = torch.cat([(merged[k] - reference[k]).flatten() for k in SHAPES]).numpy() * asked / 1.5
    wanted = (noise**-2 - (2 * count_noise) ** -2) ** -0.5 if adaptive else noise
    assert abs(drawn.std() / wanted - 1) < 0.06
    again = Central(noise, 1.5, adaptive).merge([(1.0, reference)] * asked, reference, asked)
    assert not torch.equal(again["a"], merged["a"])


def test_the_bound_goes_to_the_median_change() -> None:
    reference = {"a": torch.zeros(100)}
    sizes = np.linspace(0.5, 4.5, 101)
    replies = [(1.0, {"a": torch.full((100,), size / 10)}) for size in sizes]
    central = Central(0.0, 60.0, adaptive=True)
    for _ in range(200):
        central.merge(replies, reference, len(replies))
    assert abs(central.bound - 2.5) < 0.3
    fixed = Central(0.0, 60.0, adaptive=False)
    fixed.merge(replies, reference, len(replies))
    assert fixed.bound == 60.0


def test_counters_are_taken_where_all_agree() -> None:
    reference = arrays(0)
    same, odd = arrays(1), arrays(2) | {"updates": torch.tensor(9)}
    central = Central(0.0, 1.0, adaptive=False)
    assert central.merge([(1.0, same | {"updates": torch.tensor(4)})], reference, 1)["updates"] == 4
    assert central.merge([(1.0, same), (1.0, odd)], reference, 2)["updates"] == 3


def test_sites_that_did_not_answer_do_not_show_in_the_divisor() -> None:
    reference = {"a": torch.zeros(4)}
    merged = Central(0.0, 10.0, adaptive=False).merge([(1.0, {"a": torch.ones(4)})], reference, 4)
    assert torch.allclose(merged["a"], torch.full((4,), 0.25))
    with pytest.raises(ValueError, match="no reply"):
        Central(0.0, 10.0, adaptive=False).merge([], reference, 4)


def test_what_noise_would_break_is_refused() -> None:
    with pytest.raises(UserError, match="BatchNorm"):
        check(job(), ["bn.running_mean", "bn.running_var"])
    check(job(dp="none", noise_multiplier=0.0), ["bn.running_var"])


def test_with_much_noise_the_bound_moves_by_no_more_than_without() -> None:
    """The count of sites is cut to what it can be, so that noise of ten times it moves the bound by a tenth at most."""
    central, reference = Central(30.0, 1.0, adaptive=True), arrays(0)
    bounds = [central.bound]
    for _ in range(50):
        central.merge([(1.0, reference)] * 3, reference, 3)
        bounds.append(central.bound)
    assert np.abs(np.diff(np.log(bounds))).max() <= 0.1 + 1e-9
    assert len(set(bounds)) > 10

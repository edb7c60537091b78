"""Aggregation against closed forms, NumPy and Flower's own."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from server import aggregation
from server.aggregation import weighted_mean


def models(seed: int, count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {"a.weight": torch.randn(3, 4, generator=generator), "b": torch.randn((), generator=generator) * 1e6}
        for _ in range(count)
    ]


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=6), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_the_mean_is_numpys_weighted_average(weights: list[int], seed: int) -> None:
    replies = models(seed, len(weights))
    mean = weighted_mean(zip(map(float, weights), replies, strict=True))
    for name in replies[0]:
        expected = np.average([reply[name].double().numpy() for reply in replies], axis=0, weights=weights)
        np.testing.assert_allclose(mean[name].numpy(), expected.astype(np.float32), rtol=2e-7, atol=1e-12)


@given(st.lists(st.integers(1, 1_000_000), min_size=1, max_size=20), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_the_mean_of_identical_models_is_that_model_to_the_bit(weights: list[int], seed: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Linear(5, 2))
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: torch.randn(value.shape, generator=generator) if value.is_floating_point() else torch.tensor(seed * 7 + 3)
        for name, value in model.state_dict().items()
    }
    state["1.running_var"] = state["1.running_var"].abs()
    mean = weighted_mean((float(weight), state) for weight in weights)
    assert list(mean) == list(state)
    for name, value in state.items():
        assert mean[name].dtype == value.dtype
        assert torch.equal(mean[name], value), name


def test_it_agrees_with_flowers_own_average() -> None:
    replies, weights = models(5, 4), [3, 50, 7, 11]
    records = [
        RecordDict({"arrays": ArrayRecord(reply), "metrics": MetricRecord({"num-examples": weight})})  # type: ignore[arg-type]
        for reply, weight in zip(replies, weights, strict=True)
    ]
    theirs = aggregate_arrayrecords(records, "num-examples").to_torch_state_dict()
    ours = weighted_mean(zip(map(float, weights), replies, strict=True))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name].float(), rtol=1e-6, atol=1e-6)


def test_batchnorm_statistics_become_those_of_all_images_together() -> None:
    generator = np.random.default_rng(0)
    parts = [generator.normal(shift, scale, (n, 2)) for shift, scale, n in ((0, 1, 50), (3, 2, 20), (-1, 0.5, 130))]
    replies = [
        (
            float(len(part)),
            {
                "bn.running_mean": torch.from_numpy(part.mean(0)),
                "bn.running_var": torch.from_numpy(part.var(0)),
                "bn.num_batches_tracked": torch.tensor(7),
            },
        )
        for part in parts
    ]
    mean = weighted_mean(replies)
    together = np.concatenate(parts)
    np.testing.assert_allclose(mean["bn.running_mean"].numpy(), together.mean(0), rtol=1e-12)
    np.testing.assert_allclose(mean["bn.running_var"].numpy(), together.var(0), rtol=1e-12)
    assert mean["bn.num_batches_tracked"].dtype == torch.int64
    assert mean["bn.num_batches_tracked"].item() == 7


@pytest.mark.parametrize("more", [-1, 0, 1, 12_345])
@pytest.mark.parametrize("threads", [1, 3])
def test_large_arrays_are_added_up_in_parts_to_the_same_bits(
    more: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, number by number: so neither parts nor threads may change a bit, or leave out one."""
    size, weights = aggregation._THREADED + more, [3.0, 1.0, 50.0]
    replies = [torch.randn(size, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    own, sizes, helped = aggregation._add_part, [], set()

    def watched(sums: np.ndarray, numbers: np.ndarray, weight: float) -> None:
        sizes.append(numbers.size)
        helped.add(threading.current_thread() is not threading.main_thread())
        own(sums, numbers, weight)

    monkeypatch.setattr(aggregation, "_add_part", watched)
    monkeypatch.setattr(aggregation, "_threads", lambda: threads)
    mean = weighted_mean((weight, {"w": reply}) for weight, reply in zip(weights, replies, strict=True))["w"]
    total = np.zeros(size)
    for weight, reply in zip(weights, replies, strict=True):
        total += reply.double().numpy() * weight
    np.testing.assert_array_equal(mean.numpy(), (total / sum(weights)).astype(np.float32))
    assert sum(sizes) == 3 * size
    assert len(sizes) == 3 * (threads if more >= 0 else 1)
    assert helped == {more >= 0}


def test_replies_are_not_changed_and_read_once() -> None:
    replies = models(1, 3)
    copies = [{name: value.clone() for name, value in reply.items()} for reply in replies]
    weighted_mean((2.0, reply) for reply in replies)  # a generator: a second pass would find nothing
    for reply, copy in zip(replies, copies, strict=True):
        assert all(torch.equal(reply[name], copy[name]) for name in copy)


def test_no_reply_is_an_error() -> None:
    with pytest.raises(ValueError, match="no reply"):
        weighted_mean([])

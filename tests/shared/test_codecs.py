"""Codecs against their laws: sizes, bounds on the error, no bias, nothing lost, the same bits, nothing made of junk."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shared.codecs import (
    BLOCK,
    CODECS,
    Coding,
    coding,
    decode,
    encode,
    is_coded,
    length,
    residual,
    with_residual,
)
from shared.config import Job
from shared.settings_federation import Federation
from shared.weights import digest

Arrays = dict[str, Tensor]
UNBIASED = ("bf16", "int8")
shapes = st.lists(st.integers(1, 40), min_size=0, max_size=3).map(tuple)
kepts = st.integers(1, BLOCK)


def model(seed: int, *shapes: tuple[int, ...], scale: float = 1.0) -> Arrays:
    """Arrays as of a network: weights of these shapes, a counter, the statistics of a BatchNorm."""
    draw = torch.Generator().manual_seed(seed)
    arrays = {f"{place}.weight": torch.randn(shape, generator=draw) * scale for place, shape in enumerate(shapes)}
    arrays["norm.running_var"] = torch.rand(7, generator=draw)
    arrays["norm.num_batches_tracked"] = torch.tensor(seed)
    return arrays


@pytest.fixture(params=CODECS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_settings_name_every_codec_and_no_other(tiny_job: Job) -> None:
    field = Federation.__dataclass_fields__["codec"]
    assert set(field.metadata["choices"]) == {"none", *CODECS}
    assert coding(tiny_job) is None
    assert coding(tiny_job.replace(federation__codec="topk", federation__codec_keep=0.25)) == Coding(CODECS["topk"], 64)


@given(st.lists(shapes, max_size=4), kepts, st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_any_change_is_exactly_as_long_as_said_and_read_as_written(
    shapes: list[tuple[int, ...]], kept: int, seed: int
) -> None:
    before, target = model(1, *shapes), model(2, *shapes)
    for codec in CODECS.values():
        how = Coding(codec, kept)
        payload = encode(before, target, how, seed)
        assert payload.dtype == np.uint8
        assert len(payload) == length(before, how)
        assert payload.tobytes() == encode(before, target, how, seed).tobytes()
        after = decode(before, payload, how)
        assert digest(after) == digest(decode(before, payload, how))
        assert [(k, v.shape, v.dtype) for k, v in after.items()] == [(k, v.shape, v.dtype) for k, v in before.items()]
        for key, array in target.items():  # what is not coded arrives as it is
            assert is_coded(key, array) or torch.equal(after[key], array)


@given(shapes, kepts, st.integers(0, 2**32), st.floats(1e-30, 1e30))
@settings(max_examples=60, deadline=None)
def test_no_number_is_further_off_than_its_codec_allows(
    shape: tuple[int, ...], kept: int, seed: int, scale: float
) -> None:
    change = model(seed % 1000, shape, scale=scale)["0.weight"]
    zero = {"w": torch.zeros(shape)}
    rows = change.reshape(shape[0] if len(shape) > 1 else 1, -1)
    got = {
        name: decode(zero, encode(zero, {"w": change}, Coding(codec, kept), seed), Coding(codec, kept))["w"]
        for name, codec in CODECS.items()
    }
    off = {name: (array - change).abs().reshape(rows.shape) for name, array in got.items()}
    assert (off["bf16"] <= rows.abs() * 2**-7).all()  # seven bits after the first one
    step = rows.abs().amax(1, keepdim=True) / 127
    assert (off["int8"] <= step * 1.001).all()
    assert torch.allclose(got["sign"].abs().reshape(rows.shape), rows.abs().mean(1, keepdim=True), rtol=1e-5)
    for name in ("sign", "int2"):  # a part of every row arrives, however its numbers are spread
        assert (off[name].double().square().sum(1) <= rows.double().square().sum(1) * (1 + 1e-5)).all()
    assert (got["topk"] * change >= 0).all()
    assert ((got["topk"] == change) | (got["topk"] == 0)).all()


@given(st.integers(1, 2000), kepts)
@settings(max_examples=60, deadline=None)
def test_the_largest_numbers_of_each_block_travel(size: int, kept: int) -> None:
    """Against a sort by NumPy, block by block; so at least the share kept of the change's square arrives."""
    change = model(size, (size,))["0.weight"]
    how = Coding(CODECS["topk"], kept)
    got = decode({"w": torch.zeros(size)}, encode({"w": torch.zeros(size)}, {"w": change}, how, 0), how)["w"].numpy()
    for start in range(0, size, BLOCK):
        block = change.numpy()[start : start + BLOCK]
        count = math.ceil(kept * len(block) / BLOCK)
        slow = np.zeros_like(block)
        chosen = np.argsort(-np.abs(block), kind="stable")[:count]
        slow[chosen] = block[chosen]
        assert np.array_equal(got[start : start + BLOCK], slow)
    assert np.square(got).sum() >= kept / BLOCK * change.square().sum().item() * (1 - 1e-5)


@pytest.mark.parametrize("name", UNBIASED)
def test_rounding_by_chance_has_no_bias(name: str) -> None:
    """The mean over many seeds is the number itself, within five standard errors of that mean."""
    change = model(3, (5, 9))["0.weight"]
    zero, how, seeds = {"w": torch.zeros(5, 9)}, Coding(CODECS[name], 1), 4000
    draws = torch.stack(
        [decode(zero, encode(zero, {"w": change}, how, seed), how)["w"] for seed in range(seeds)]
    ).double()
    error = draws.std(0) / math.sqrt(seeds)
    assert ((draws.mean(0) - change.double()).abs() <= 5 * error + 1e-7).all()
    assert (draws.std(0) > 0).float().mean() > 0.8  # it is by chance indeed


@pytest.mark.parametrize(("name", "error"), [("int2", 0.1175), ("sign", 0.3634)])
def test_of_normal_numbers_as_much_is_lost_as_theory_says(name: str, error: float) -> None:
    """Mean squared errors of the best quantisers with four and two levels: Max 1960, table 1."""
    change = model(5, (4, 100_000))["0.weight"]
    how = Coding(CODECS[name], 1)
    got = decode({"w": torch.zeros(change.shape)}, encode({"w": torch.zeros(change.shape)}, {"w": change}, how, 0), how)
    assert (got["w"] - change).square().mean().item() == pytest.approx(error, rel=0.02)


@pytest.mark.parametrize("name", ["int2", "sign"])
def test_a_row_with_one_large_number_is_coded_nearer_than_nothing(name: str) -> None:
    change = torch.zeros(2, 500)
    change[0, 3], change[1, 7] = 1e3, -1e-3
    how = Coding(CODECS[name], 1)
    zero = {"w": torch.zeros(2, 500)}
    got = decode(zero, encode(zero, {"w": change}, how, 0), how)["w"]
    assert ((got - change).square().sum(1) < change.square().sum(1)).all()


def test_nothing_is_lost_only_late(name: str) -> None:
    """What arrived plus what is late is what was sent, after any number of rounds."""
    how = Coding(CODECS[name], 16)
    there, late = model(0, (20, 30), (700,)), dict[str, Tensor]()
    first, moved = dict(there), {key: torch.zeros_like(array).double() for key, array in there.items()}
    for number in range(1, 40):
        change = model(number, (20, 30), (700,), scale=0.1)
        trained = {key: there[key] + change[key] if is_coded(key, there[key]) else change[key] for key in there}
        for key in moved:
            moved[key] += change[key].double()
        target = with_residual(trained, late)
        there = decode(there, encode(there, target, how, number), how)
        late = residual(target, there)
    for key, array in there.items():
        if is_coded(key, array):
            total = first[key].double() + moved[key]
            assert torch.allclose(array.double() + late[key].double(), total, atol=1e-4)
            assert late[key].abs().max() < 20  # and what is late does not pile up


def test_late_changes_arrive_when_nothing_new_comes(name: str) -> None:
    how = Coding(CODECS[name], 32)
    there, goal = model(0, (16, 48)), model(1, (16, 48))
    start = (goal["0.weight"] - there["0.weight"]).norm()
    for number in range(60):
        there = decode(there, encode(there, goal, how, number), how)
    # The sign of a change with its mean size circles around the goal; all others come as near as they can.
    assert (goal["0.weight"] - there["0.weight"]).norm() < (0.2 if name == "sign" else 0.01) * start


def test_half_precision_and_an_empty_or_unchanged_array(name: str) -> None:
    how = Coding(CODECS[name], 256)
    before = {"half": torch.zeros(3, 4, dtype=torch.float16), "none": torch.zeros(0, 4), "one": torch.ones(())}
    target = before | {"half": torch.full((3, 4), 0.5, dtype=torch.float16)}
    after = decode(before, encode(before, target, how, 0), how)
    assert after["half"].dtype == torch.float16
    assert torch.allclose(after["half"], target["half"], rtol=0.02)
    assert torch.equal(after["one"], before["one"])
    assert after["none"].shape == (0, 4)


def test_a_change_that_is_not_finite_is_refused(name: str) -> None:
    before = {"w": torch.zeros(4)}
    with pytest.raises(ValueError, match="not finite"):
        encode(before, {"w": torch.tensor([0.0, math.nan, 0.0, 0.0])}, Coding(CODECS[name], 1), 0)


Damage = Callable[[np.ndarray], np.ndarray]
DAMAGE: dict[str, Damage] = {
    "a byte short": lambda payload: payload[:-1],
    "a byte more": lambda payload: np.append(payload, np.uint8(0)),
    "nothing": lambda payload: payload[:0],
    "another kind": lambda payload: payload.astype(np.int8),
    "a table": lambda payload: payload[None],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_has_not_the_size_of_a_change_is_not_read(damage: str, name: str) -> None:
    before, how = model(0, (20, 30)), Coding(CODECS[name], 8)
    payload = encode(before, model(1, (20, 30)), how, 0)
    with pytest.raises(ValueError, match="bytes"):
        decode(before, DAMAGE[damage](payload), how)


@pytest.mark.parametrize("codec", ["topk", "topk-int8"])
def test_places_outside_their_block_or_twice_are_not_read(codec: str) -> None:
    before, how = {"w": torch.zeros(300)}, Coding(CODECS[codec], 8)
    payload = encode(before, {"w": torch.arange(300.0)}, how, 0)
    twice, outside = payload.copy(), payload.copy()
    twice[1] = twice[0]
    values = {"topk": 4 * 8, "topk-int8": 4 + 8}[codec]
    outside[8 + values + 1] = 255  # the second block has 44 numbers, of which 2 travel
    for wrong in (twice, outside):
        with pytest.raises(ValueError, match="places"):
            decode(before, wrong, how)


@given(st.binary(min_size=0, max_size=4000), st.integers(0, 10))
@settings(max_examples=200, deadline=None)
def test_any_bytes_give_a_model_of_this_shape_or_a_refusal(junk: bytes, seed: int) -> None:
    before = model(seed, (9, 30), (130,))
    for codec in CODECS.values():
        how = Coding(codec, 7)
        payload = np.resize(np.frombuffer(junk or b"\0", np.uint8), length(before, how))
        try:
            after = decode(before, payload, how)
        except ValueError:
            continue
        assert [array.shape for array in after.values()] == [array.shape for array in before.values()]


@pytest.mark.parametrize(
    ("codec", "least"), [("bf16", 1.99), ("int8", 3.9), ("int2", 15.0), ("topk-int8", 16), ("sign", 25)]
)
def test_a_network_in_few_bytes(codec: str, least: float) -> None:
    before = {"conv": torch.zeros(64, 64, 3, 3), "bias": torch.zeros(64)}
    whole = sum(4 * array.numel() for array in before.values())
    assert whole / length(before, Coding(CODECS[codec], round(0.1 * BLOCK))) >= least

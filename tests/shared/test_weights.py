"""What travels between server and sites, and its digest."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shared.config import Job
from shared.tasks.classification import build_model
from shared.weights import digest, exchanged, finite, frozen_digest, put


def slow_digest(tensors: dict[str, Tensor]) -> str:
    parts = b""
    for name, tensor in tensors.items():
        values = tensor.detach().contiguous()
        raw = values.view(torch.int16).numpy() if values.dtype == torch.bfloat16 else values.numpy()
        parts += f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode() + np.ascontiguousarray(raw).tobytes()
    return hashlib.sha256(parts).hexdigest()


TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "counter": torch.tensor(3),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 2),
    "flag": torch.tensor([True, False]),
    "turned": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
}


def test_the_digest_is_sha256_over_names_types_shapes_and_bytes() -> None:
    assert digest(TENSORS) == slow_digest(TENSORS)
    assert digest({}) == hashlib.sha256().hexdigest()


@pytest.mark.parametrize(
    "change",
    [
        {"b": torch.arange(6.0).view(2, 3)},
        {"a": torch.arange(6.0).view(3, 2)},
        {"a": torch.arange(6.0).view(2, 3).double()},
        {"a": torch.arange(6.0).view(2, 3).nextafter(torch.tensor(9.0))},
        {"a": -torch.arange(6.0).view(2, 3)},
    ],
    ids=["name", "shape", "type", "last bit", "sign"],
)
def test_any_difference_changes_the_digest(change: dict[str, Tensor]) -> None:
    assert digest(change) != digest({"a": TENSORS["a"]})


@pytest.fixture
def frozen(tiny_job: Job) -> Job:
    return tiny_job.replace(model__freeze="backbone")


def test_copies_that_travel_do_not_change_with_the_model(tiny_job: Job) -> None:
    model = build_model(tiny_job).to(memory_format=torch.channels_last)
    sent = exchanged(model, tiny_job)
    before = digest(sent)
    assert all(value.is_contiguous() and not value.requires_grad for value in sent.values())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert digest(sent) == before
    put(model, sent, tiny_job)
    assert digest(exchanged(model, tiny_job)) == before
    sent["head.bias"].add_(1)
    assert digest(exchanged(model, tiny_job)) == before


@pytest.mark.parametrize("fault", ["missing", "unknown", "renamed", "shape", "broadcast"])
def test_arrays_of_another_model_are_refused_and_change_nothing_of_their_name(tiny_job: Job, fault: str) -> None:
    model = build_model(tiny_job)
    sent = {name: value + 1 for name, value in exchanged(model, tiny_job).items()}
    bias = sent.pop("head.bias")
    match fault:
        case "unknown":
            sent |= {"head.bias": bias, "more": bias}
        case "renamed":
            sent["head.bais"] = bias
        case "shape":
            sent["head.bias"] = torch.cat([bias, bias])
        case "broadcast":
            sent["head.bias"] = bias[:1]
    before = model.state_dict()["head.bias"].clone()
    with pytest.raises(ValueError):
        put(model, sent, tiny_job)
    assert torch.equal(model.state_dict()["head.bias"], before)


def test_the_head_alone_travels_if_the_backbone_is_frozen_and_the_rest_has_a_digest(frozen: Job) -> None:
    model = build_model(frozen)
    state = model.state_dict()
    assert list(exchanged(model, frozen)) == ["head.weight", "head.bias"]
    rest = {name: value for name, value in state.items() if not name.startswith("head.")}
    assert frozen_digest(model, frozen) == slow_digest(rest)
    other = build_model(frozen.replace(seed=1))
    before = frozen_digest(other, frozen)
    put(other, exchanged(model, frozen), frozen)
    assert frozen_digest(other, frozen) == before != frozen_digest(model, frozen)
    assert torch.equal(other.state_dict()["head.weight"], state["head.weight"])


def test_nothing_stays_behind_if_everything_travels(tiny_job: Job) -> None:
    model: nn.Module = build_model(tiny_job)
    assert frozen_digest(model, tiny_job) == ""
    assert list(exchanged(model, tiny_job)) == list(model.state_dict())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, -1])
def test_one_number_that_is_not_finite_is_found_wherever_it_stands(bad: float, place: int) -> None:
    arrays = {"a": torch.ones(2, 3), "counter": torch.tensor(7), "b": torch.zeros(5, dtype=torch.float64)}
    assert finite(arrays)
    for name in ("a", "b"):
        wrong = arrays[name].clone()
        wrong.view(-1)[place] = bad
        assert not finite(arrays | {name: wrong})

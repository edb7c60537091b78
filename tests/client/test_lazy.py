"""Flower's arrays made lazy: the contract with the pinned version, and that nothing of what Flower promises changes."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from client import lazy

KINDS = [np.bool_, np.uint8, np.int8, np.int16, np.int32, np.int64, np.float16, np.float32, np.float64]
ARRAYS = hnp.arrays(st.sampled_from(KINDS), hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))


@pytest.fixture(autouse=True)
def _installed() -> None:
    assert lazy.install()  # the pinned version of Flower is as client.lazy expects it


def saved(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array(values, order="C"), allow_pickle=False)
    return buffer.getvalue()


@given(ARRAYS)
def test_an_array_has_the_same_bytes_words_and_numbers_as_flowers_own(values: np.ndarray) -> None:
    array = Array(values)
    assert lazy.numbers_of(array) is not None
    assert (array.dtype, array.shape, array.stype) == (str(values.dtype), values.shape, "numpy.ndarray")
    np.testing.assert_array_equal(array.numpy(), values)
    assert b"".join(lazy.pieces(array)) == saved(values)
    assert lazy.numbers_of(array) is not None
    assert array.data == saved(values)
    assert lazy.numbers_of(array) is None  # written out: from now on as Flower made it
    np.testing.assert_array_equal(array.numpy(), values)
    assert array == Array(str(values.dtype), values.shape, "numpy.ndarray", saved(values))


@given(st.dictionaries(st.text(max_size=9), ARRAYS, max_size=4))
def test_a_record_counts_the_same_bytes_and_travels_by_flowers_own_means(values: dict[str, np.ndarray]) -> None:
    record = ArrayRecord({name: Array(value) for name, value in values.items()})
    expected = sum(len(saved(value)) + len(name) for name, value in values.items())
    assert record.count_bytes() == expected
    assert all(lazy.numbers_of(array) is not None for array in record.values())
    arrays = {array.object_id: array for array in record.values()}
    inflated = {}
    for name, array in arrays.items():
        chunks = dict(array.slice_array())
        inflated[name] = Array.inflate(array.deflate(), chunks)
    again = ArrayRecord.inflate(record.deflate(), inflated)  # type: ignore[arg-type]
    assert record.count_bytes() == again.count_bytes() == expected
    assert {name: array.data for name, array in again.items()} == {n: saved(v) for n, v in values.items()}


def test_an_array_is_a_snapshot_and_gives_everybody_numbers_of_his_own() -> None:
    values = np.arange(6, dtype=np.float32)
    array = Array(values)
    values += 1
    first = array.numpy()
    first += 10
    torch.from_numpy(array.numpy()).add_(5)
    other = ArrayRecord({"w": array})["w"].numpy()
    np.testing.assert_array_equal(other, np.arange(6))
    state = ArrayRecord({"w": array}).to_torch_state_dict()
    module = torch.nn.Linear(6, 1, bias=False)
    module.load_state_dict({"weight": state["w"].reshape(1, 6)}, assign=True)
    with torch.no_grad():
        module.weight.add_(1)
    np.testing.assert_array_equal(array.numpy(), np.arange(6))


def test_setting_the_bytes_of_an_array_wins_over_its_numbers() -> None:
    array = Array(np.zeros(2, np.float32))
    array.data = saved(np.ones(2, np.float32))
    np.testing.assert_array_equal(array.numpy(), [1, 1])
    assert ArrayRecord({"w": array}).count_bytes() == len(array.data) + 1


def test_copies_and_pickles_are_arrays_like_any() -> None:
    array = Array(np.arange(4.0))
    for twin in (copy.copy(array), copy.deepcopy(array), pickle.loads(pickle.dumps(array))):
        np.testing.assert_array_equal(twin.numpy(), np.arange(4))
        assert twin.data == saved(np.arange(4.0))


@pytest.mark.parametrize(
    "values", [np.arange(3, dtype=">f4"), np.array(["a"]), np.zeros(2, [("x", "<f4")]), np.zeros(2, np.complex64)]
)
def test_what_is_not_recognised_is_written_out_at_once_as_by_flower(values: np.ndarray) -> None:
    array = Array(values)
    assert "data" in vars(array)
    assert array.numpy().tobytes() == values.tobytes()


def test_missing_attributes_are_still_missing() -> None:
    with pytest.raises(AttributeError):
        _ = Array(np.zeros(1)).nothing  # type: ignore[attr-defined]
    with pytest.raises(AttributeError):
        _ = object.__new__(Array).data


def test_an_array_of_another_serialisation_is_refused_as_by_flower() -> None:
    array = Array(np.zeros(1))
    array.stype = "other"
    with pytest.raises(TypeError):
        array.numpy()


def test_arrays_that_look_otherwise_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fallback: a Flower whose arrays are other than expected keeps its own way, and content still travels."""
    monkeypatch.delattr(Array, "_lazy")
    assert not lazy.installed()
    assert not lazy.fits()  # as they are now, patched, they are not what is expected
    assert not lazy.install()
    array = Array("float32", (2,), "numpy.ndarray", saved(np.ones(2, np.float32)))
    assert lazy.numbers_of(array) is None
    assert lazy.pieces(array) == [array.data]


def test_records_keep_what_they_hold_when_one_is_made_of_another() -> None:
    source = {"w": Array(np.arange(3.0)), "b": Array("float64", (1,), "numpy.ndarray", saved(np.zeros(1)))}
    record = RecordDict({"arrays": ArrayRecord(source, keep_input=False)})["arrays"]
    assert source == {}
    np.testing.assert_array_equal(record["w"].numpy(), np.arange(3))
    np.testing.assert_array_equal(record["b"].numpy(), [0])


def test_looking_at_a_messages_arrays_does_not_keep_it() -> None:
    """Without Python's collector: a message of a large model must be gone when nobody has it any more."""
    record = RecordDict({"arrays": ArrayRecord({"w": Array(np.arange(3.0))}), "m": MetricRecord({"n": 1})})
    looked = record.array_records
    looked["more"] = ArrayRecord()
    assert list(record) == ["arrays", "m", "more"]
    with pytest.raises(TypeError, match="Expected `MetricRecord`"):
        record.metric_records["x"] = ArrayRecord()  # type: ignore[assignment]
    del looked["more"]
    assert list(record) == ["arrays", "m"]
    seen = weakref.ref(record)
    gc.disable()
    try:
        del record, looked
        assert seen() is None
    finally:
        gc.enable()

"""Packing arrays for the way: what was packed comes back to the bit, what only looks packed is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_object_tree, iterate_object_tree
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shared.packing import DATA, INDEX, pack, unpack

ARRAYS = hnp.arrays(
    st.sampled_from([np.float32, np.float64, np.int64, np.uint8]), hnp.array_shapes(min_dims=0, min_side=0, max_side=4)
)


def record(index: object, data: bytes) -> RecordDict:
    parts = {INDEX: index if isinstance(index, bytes) else json.dumps(index).encode(), DATA: data}
    return RecordDict(
        {"arrays": ArrayRecord({name: Array("uint8", (len(part),), "any", part) for name, part in parts.items()})}
    )


@given(st.dictionaries(st.text(min_size=1), ARRAYS, max_size=6), st.dictionaries(st.text(min_size=1), ARRAYS))
def test_what_was_packed_comes_back(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    content = RecordDict(
        {
            "arrays": ArrayRecord({name: Array(array) for name, array in one.items()}),
            "config": ConfigRecord({"round": 3}),
            "beside": ArrayRecord({name: Array(array) for name, array in other.items()}),
            "metrics": MetricRecord({"n": 1}),
        }
    )
    packed = pack(content)
    assert list(packed) == list(content)
    assert all(len(record) <= 2 for record in packed.array_records.values())
    plain, was = unpack(packed)
    assert was == (max(len(one), len(other)) > 1)
    assert list(plain) == list(content)
    for name in ("arrays", "beside"):
        assert list(plain[name]) == list(content[name])  # in their order: admission asks for it
        for key, array in plain[name].items():
            assert array == content[name][key]
            assert array.numpy().tobytes() == content[name][key].numpy().tobytes()
    assert (plain["config"], plain["metrics"]) == (content["config"], content["metrics"])
    assert unpack(plain) == (plain, False)


def test_a_network_of_many_arrays_is_few_objects() -> None:
    generator = np.random.default_rng(0)
    content = RecordDict(
        {"arrays": ArrayRecord({str(i): Array(generator.random(9000, np.float32)) for i in range(320)})}
    )
    objects = [len(list(iterate_object_tree(get_object_tree(one)))) for one in (content, pack(content))]
    assert objects[0] > 640
    assert objects[1] <= 9  # 11.5 MB in pieces of 5 MiB


@pytest.mark.parametrize(
    ("index", "data"),
    [
        ([["a", "uint8", [1], "s", 2]], b"1"),
        ([["a", "uint8", [1], "s", 1]], b"12"),
        ([["a", "uint8", [1], "s", 1], ["b", "uint8", [1], "s", -1]], b""),
        ([["a", "uint8", [1], "s", 1], ["a", "uint8", [1], "s", 1]], b"12"),
        ([["a", "uint8", ["x"], "s", 1]], b"1"),
        ([["a", 8, [1], "s", 1]], b"1"),
        ([["a", "uint8", [1], "s", "1"]], b"1"),
        ([["a", "uint8", [1], "s"]], b"1"),
        ([[["a"], "uint8", [1], "s", 1]], b"1"),
        ([["a", "uint8", None, "s", 1]], b"1"),
        ({"a": 1}, b""),
        (7, b""),
        (b"\xff{", b""),
        (b"[" * 100_000, b""),
    ],
)
def test_an_index_that_does_not_fit_is_refused(index: object, data: bytes) -> None:
    with pytest.raises(ValueError):
        unpack(record(index, data))


def test_a_record_that_contents_share_is_packed_once() -> None:
    shared_ = ArrayRecord({str(i): Array(np.full(9, i, np.float32)) for i in range(3)})
    contents = [RecordDict({"arrays": shared_, "config": ConfigRecord({"heard": i})}) for i in range(2)]
    done: dict[int, object] = {}
    first, second = (pack(content, done) for content in contents)
    assert first["arrays"] is second["arrays"]
    assert (first["config"]["heard"], second["config"]["heard"]) == (0, 1)
    assert unpack(second)[0]["arrays"]["2"] == shared_["2"]

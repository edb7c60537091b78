"""Messages through shared memory: same content, nobody sees another's writes, nothing is written over or left."""

from __future__ import annotations

import gc
import os

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from client import lazy
from simulations.segments import SMALL, Lease, Segments, Source, pack, unpack

SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=40)
ARRAYS = hnp.arrays(st.sampled_from([np.float32, np.float64, np.int64, np.uint8, np.bool_]), SHAPES)


@pytest.fixture(autouse=True)
def _installed() -> None:
    lazy.install()


def record(values: dict[str, np.ndarray]) -> RecordDict:
    arrays = ArrayRecord({name: Array(value) for name, value in values.items()})
    return RecordDict({"arrays": arrays, "config": ConfigRecord({"round": 3})})


def sent(values: dict[str, np.ndarray], segments: Segments) -> tuple[bytes, int, Lease]:
    lease = segments.take()
    assert lease is not None
    return *pack(record(values), lease.segment), lease


@given(st.lists(ARRAYS, max_size=5))
def test_what_is_packed_is_what_is_unpacked(values: list[np.ndarray]) -> None:
    segments, named = Segments(), {f"a{i}": value for i, value in enumerate(values)}
    body, size, lease = sent(named, segments)
    assert (size > 0) == any(value.nbytes >= SMALL for value in values)
    for content in (unpack(body, Source(lease, size)), unpack(pack(record(named), None)[0], None)):
        assert content["config"]["round"] == 3
        assert list(content["arrays"]) == list(named)
        for name, value in named.items():
            np.testing.assert_array_equal(content["arrays"][name].numpy(), value)
            assert content["arrays"][name].data == Array(value).data
    segments.close()


def test_readers_may_write_and_nobody_else_sees_it() -> None:
    segments = Segments()
    body, size, lease = sent({"w": np.zeros(5000, np.float32)}, segments)
    first, second = unpack(body, Source(lease, size)), unpack(body, Source(lease, size))
    mine = first["arrays"]["w"].numpy()
    mine += 7
    assert not first["arrays"]["w"].numpy().any()  # also who asks twice gets what was sent
    assert not second["arrays"]["w"].numpy().any()
    assert (mine == 7).all()


def test_a_segment_is_written_anew_only_when_nothing_is_left_of_what_was_read() -> None:
    segments = Segments()
    body, size, lease = sent({"w": np.ones(5000, np.float32)}, segments)
    kept = unpack(body, Source(lease, size))["arrays"]["w"].numpy()
    number = lease.segment.number
    del lease
    gc.collect()
    other = segments.take()
    assert other is not None
    assert other.segment.number != number  # an array of the first is held
    other.segment.write([np.full(5000, 2, np.float32)])
    assert (kept == 1).all()
    del kept
    gc.collect()
    again = segments.take()
    assert again is not None
    assert again.segment.number == number
    segments.close()


def test_a_message_that_was_not_read_holds_its_segment_too() -> None:
    segments = Segments()
    body, size, lease = sent({"w": np.ones(5000, np.float32)}, segments)
    content = unpack(body, Source(lease, size))
    del lease
    gc.collect()
    other = segments.take()
    assert other is not None
    other.segment.write([np.zeros(5000, np.float32)])
    assert content["arrays"]["w"].numpy().all()


def test_a_segment_somebody_still_looks_at_is_given_up_instead() -> None:
    segments = Segments()
    _, _, lease = sent({"w": np.ones(5000, np.float32)}, segments)
    lease.segment.dirty = True
    del lease
    gc.collect()
    assert segments.counts == (0, 0)


def test_only_so_many_segments_are_in_use_and_few_are_kept() -> None:
    files = len(os.listdir("/proc/self/fd"))
    segments = Segments()
    held = [segments.take() for _ in range(100)]
    assert sum(lease is not None for lease in held) == segments.counts[0] < 100
    held.clear()
    gc.collect()
    assert segments.counts[0] == 0
    assert segments.counts[1] <= 8
    segments.close()
    assert len(os.listdir("/proc/self/fd")) == files


def test_a_segment_that_grew_is_read_whole() -> None:
    segments = Segments()
    for length in (2000, 100_000, 3000):
        body, size, lease = sent({"w": np.arange(length), "b": np.arange(length // 2)}, segments)
        content = unpack(body, Source(lease, size))
        np.testing.assert_array_equal(content["arrays"]["w"].numpy(), np.arange(length))
        np.testing.assert_array_equal(content["arrays"]["b"].numpy(), np.arange(length // 2))
        del content, lease
        gc.collect()
    assert segments.counts == (0, 1)
    segments.close()

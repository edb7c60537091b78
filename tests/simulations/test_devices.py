"""Placing workers on devices: pure, so without one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import UserError
from simulations import devices
from simulations.devices import parse, place, places, read_free

GB = 2**30
TOLD = "0, GPU-aa, 10000\n1, GPU-bb, 30000\n2, GPU-cc, 20000\n"


def test_workers_go_where_most_memory_is_left_for_each() -> None:
    assert place({"cuda:0": 40 * GB, "cuda:1": 40 * GB}, 2) == ["cuda:0", "cuda:1"] * 2
    assert place({"cuda:0": 10 * GB, "cuda:1": 40 * GB}, 3, 3) == ["cuda:1"] * 3  # 40, 20 and 13 against 10
    assert place({"cuda:0": 10 * GB, "cuda:1": 40 * GB}, 1, 2) == ["cuda:1", "cuda:0"]


@given(st.lists(st.integers(0, 80), min_size=1, max_size=6), st.integers(1, 4), st.data())
def test_no_device_has_too_many_and_no_worker_gains_by_moving(free: list[int], most: int, data: st.DataObject) -> None:
    named = {f"cuda:{number}": memory for number, memory in enumerate(free)}
    chosen = place(named, most, workers := data.draw(st.integers(0, most * len(free))))
    count = {device: chosen.count(device) for device in named}
    assert len(chosen) == workers
    assert max(count.values()) <= most
    for device in set(chosen):
        share = named[device] / count[device]
        for other in named:
            if other != device and count[other] < most:
                assert named[other] / (count[other] + 1) <= share


def test_more_workers_than_places_are_refused() -> None:
    with pytest.raises(UserError, match="--per-device"):
        place({"cuda:0": 1}, 2, 3)


@pytest.mark.parametrize(
    ("text", "said"),
    [("gpu", "write cpu"), ("cuda:0,cpu", "write cpu"), ("cuda:0,cuda:0", "twice"), ("cuda:7", "has 2 CUDA devices")],
)
def test_devices_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch, text: str, said: str) -> None:
    monkeypatch.setattr(devices.torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=said):
        parse(text)
    assert parse("cuda") == ["cuda:0", "cuda:1"]


def test_free_memory_is_found_by_the_names_that_cuda_gives() -> None:
    mib = 2**20
    assert read_free(TOLD, ["cuda:0", "cuda:2"], None) == {"cuda:0": 10000 * mib, "cuda:2": 20000 * mib}
    assert read_free(TOLD, ["cuda:0", "cuda:1"], "2,GPU-bb") == {"cuda:0": 20000 * mib, "cuda:1": 30000 * mib}
    assert read_free("", ["cuda:0", "cuda:1"], None) == {"cuda:0": 1, "cuda:1": 1}
    assert read_free("no devices were found\n", ["cuda:0"], None) == {"cuda:0": 1}


def test_the_same_code_runs_on_the_processor() -> None:
    assert places("cpu", None, 3) == ["cpu"] * 3
    assert places("cpu", 2, None) == ["cpu"] * 2
    assert places("", None, 5) == []
    with pytest.raises(UserError, match="--per-device"):
        places("", 2, None)

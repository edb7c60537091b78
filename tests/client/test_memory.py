"""What a site carries from round to round: which round it is of, and what is thrown away."""

from __future__ import annotations

from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client.memory import Memory
from shared.config import Job


def filled(folder: Path, rounds: int, needed: tuple[int, ...] = ()) -> Memory:
    memory = Memory(folder, "run", Job())
    for number in range(1, rounds + 1):
        memory.save(number, {"home": {"a": torch.tensor(number)}, "moments": {"0.x": torch.tensor(-number)}}, needed)
    return memory


def number_of(memory: Memory, before: int) -> int:
    held = memory.load("home", before)
    return int(held["a"]) if held else 0


def test_a_round_reads_what_was_before_it_by_kind(tmp_path: Path) -> None:
    memory = filled(tmp_path, 3)
    assert [number_of(memory, before) for before in (4, 3)] == [3, 2]
    assert memory.load("moments", 3) == {"0.x": torch.tensor(-2)}
    assert memory.load("control", 3) == {}
    assert Memory(tmp_path, "run", Job(name="other")).load("home", 9) is None


@settings(max_examples=25, deadline=None)
@given(rounds=st.integers(1, 12), best=st.integers(0, 12), heard=st.integers(0, 12))
def test_the_last_two_rounds_and_those_needed_stay(
    tmp_path_factory: object, rounds: int, best: int, heard: int
) -> None:
    folder = tmp_path_factory.mktemp("memory")  # type: ignore[attr-defined]
    memory = filled(folder, rounds, (best, heard))
    stay = {int(path.stem) for path in memory.folder.glob("*.safetensors")}
    assert stay == {n for n in (rounds, rounds - 1, best, heard) if 0 < n <= rounds}


def test_a_site_that_sat_out_the_needed_round_keeps_what_it_had_then(tmp_path: Path) -> None:
    memory = Memory(tmp_path, "run", Job())
    for number in (1, 4, 6, 9):
        memory.save(number, {"home": {"a": torch.tensor(number)}}, needed=(5,))
    assert number_of(memory, 6) == 4


def test_forgetting(tmp_path: Path) -> None:
    memory = filled(tmp_path, 3)
    memory.forget(after=2)
    assert number_of(memory, 9) == 2
    memory.forget(after=0)
    assert memory.load("home", 9) is None

"""Files of a run: whole or not at all, equal bytes for equal content."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from server.store import Store, listening, read_events, write_json, write_model
from shared.files import write_text


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \udc80")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": [float("nan"), float("inf"), 1.5], "y": (1, "ü")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [None, None, 1.5], "y": [1, "ü"]}


def test_equal_models_and_facts_give_equal_bytes(tmp_path: Path) -> None:
    arrays = {"w": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(4)}
    facts = {"job": "ab", "round": "3", "version": "1", "model": "cnn"}
    for name in ("a", "b"):
        write_model(tmp_path / name, arrays, facts)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with safe_open(tmp_path / "a", "pt") as file:
        assert json.loads(file.metadata()["consilium"]) == facts
        assert torch.equal(file.get_tensor("w"), arrays["w"])
        assert file.get_tensor("n").dtype == torch.int64


def test_listeners_hear_only_within_their_block(tmp_path: Path) -> None:
    store, heard = Store(tmp_path), []
    store.add("before")
    with listening(heard.append):
        store.add("within", x=1)
    store.add("after")
    assert [event["event"] for event in heard] == ["within"]
    assert [event["event"] for event in read_events(tmp_path)] == ["before", "within", "after"]


def _write_for_ever(folder: Path) -> None:
    store, number = Store(folder), 0
    while True:
        number += 1
        store.add("round", round=number, text="x" * 5000)
        write_model(folder / "last.safetensors", {"w": torch.full((5000,), float(number))}, {"round": str(number)})


@pytest.mark.parametrize("after", [0.15, 0.3, 0.45])
def test_a_server_killed_at_any_moment_leaves_whole_files(after: float, tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_write_for_ever, args=(tmp_path,))
    process.start()
    while not (tmp_path / "last.safetensors").exists():
        time.sleep(0.01)
    time.sleep(after)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    events = read_events(tmp_path)
    assert [event["round"] for event in events] == list(range(1, len(events) + 1))
    with safe_open(tmp_path / "last.safetensors", "pt") as file:
        number = int(json.loads(file.metadata()["consilium"])["round"])
        assert torch.equal(file.get_tensor("w"), torch.full((5000,), float(number)))
    assert number in (len(events), len(events) - 1)

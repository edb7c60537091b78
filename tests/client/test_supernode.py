"""The SuperNode that waits less: what it changes in Flower's module is still there, and used as we think."""

from __future__ import annotations

import ast
import inspect
import time
from functools import partial
from types import ModuleType

import pytest
from flwr.supercore.inflatable.inflatable_utils import ObjectUnavailableError, pull_objects
from flwr.supernode import start_client_internal

from client import supernode
from client.supernode import ASKS, LOOKS, Clock, wait_less


def uses(module: ModuleType, name: str) -> list[str]:
    """What a module does with a name of its own: the calls, and whatever else it stands in."""
    tree = ast.parse(inspect.getsource(module))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    calls = [call for call in calls if ast.unparse(call.func).split(".")[0] == name]
    called = {id(node) for call in calls for node in ast.walk(call.func)}
    others = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == name]
    return [ast.unparse(node) for node in [*calls, *(node for node in others if id(node) not in called)]]


def test_flowers_module_waits_where_we_think() -> None:
    """If this fails Flower has changed: read its loop again, and set ``Clock`` and ``wait_less`` right."""
    assert sorted(uses(start_client_internal, "time")) == ["time.sleep(0.5)", "time.sleep(0.5)", "time.sleep(3)"]
    (pull,) = uses(start_client_internal, "pull_objects")
    assert pull.startswith("pull_objects(obj_ids_to_pull, pull_object_fn=")
    assert "backoff" not in pull
    assert "tries" not in pull
    assert ASKS[1] == 3


def test_a_part_that_is_late_is_looked_for_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("time", "pull_objects"):
        monkeypatch.setattr(start_client_internal, name, getattr(start_client_internal, name))  # as it was, afterwards
    wait_less()
    assert isinstance(start_client_internal.time, Clock)
    there = time.monotonic() + 0.4

    def part(name: str) -> bytes:
        if time.monotonic() < there:
            raise ObjectUnavailableError(name)
        return b"part"

    assert start_client_internal.pull_objects(["x"], pull_object_fn=part) == {"x": b"part"}
    assert time.monotonic() - there < 0.6  # Flower's own looks again after a second, at the earliest
    ours = start_client_internal.pull_objects
    assert isinstance(ours, partial)
    assert ours.func is pull_objects
    assert ours.keywords.keys() <= inspect.signature(pull_objects).parameters.keys()


def test_the_pause_grows_with_the_time_without_work(monkeypatch: pytest.MonkeyPatch) -> None:
    now, pauses = [100.0], []

    class Time:
        @staticmethod
        def monotonic() -> float:
            return now[0]

        @staticmethod
        def sleep(seconds: float) -> None:
            pauses.append(seconds)
            now[0] += seconds

    monkeypatch.setattr(supernode, "time", Time)
    clock = Clock()
    while now[0] < 300:
        clock.sleep(3)
    assert pauses[0] == ASKS[0]
    assert pauses == sorted(pauses)
    assert sum(pause < ASKS[1] for pause in pauses) < 15  # a quarter more each time
    assert pauses[-1] == ASKS[1]
    clock.sleep(0.5)  # there is work: its reply is waited for
    assert pauses[-1] == LOOKS
    clock.sleep(3)
    assert pauses[-1] == ASKS[0]
    now[0] += 0.2  # a busy server took so long to say that there is nothing
    clock.sleep(3)
    assert pauses[-1] == pytest.approx(2.0)

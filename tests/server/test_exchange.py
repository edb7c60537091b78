"""Sending and collecting at a Grid that is asked for what is there, as Flower's between machines; and packing."""

from __future__ import annotations

import ast
import inspect
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import http_grid

from client.app import app
from server import exchange
from server.admission import Dropped, admit
from server.exchange import AHEAD, POLLS, replies
from shared.config import Job
from shared.packing import DATA, INDEX, pack, unpack
from shared.tasks import load_task
from shared.weights import exchanged


@pytest.fixture(autouse=True)
def _sender() -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


class Sites(http_grid.HttpGrid):
    """Flower's Grid between machines, without a server: each site answers ``after`` so many seconds."""

    def __init__(self, answer: object, after: dict[int, float]) -> None:
        self.answer, self.after, self.waiting, self.asked = answer, after, {}, 0
        self.pulled: list[str] = []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        self.sent = list(messages)
        self.contents = [message.content for message in self.sent]
        for message in self.sent:
            name = message.object_id
            message.metadata.__dict__["_message_id"] = name
            self.waiting[name] = (time.monotonic() + self.after[message.metadata.dst_node_id], message)
        return list(self.waiting)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self.asked += 1
        due = [name for name in message_ids if self.waiting[name][0] <= time.monotonic()]
        self.pulled += due
        return [self.answer(self.waiting[name][1]) for name in due]  # type: ignore[operator]


def plain(node: int, **arrays: np.ndarray) -> Message:
    content = {"config": ConfigRecord({"round": 1}), "arrays": ArrayRecord({k: Array(v) for k, v in arrays.items()})}
    return Message(RecordDict(content), node, "train")  # type: ignore[arg-type]


def echo(message: Message) -> Message:
    number = MetricRecord({"node": message.metadata.dst_node_id})
    return Message(RecordDict({"metrics": number}), reply_to=message)


def test_replies_come_in_the_order_asked_and_late_ones_not_at_all() -> None:
    grid = Sites(echo, {1: 0.5, 2: 0.0, 3: 9.0, 4: 0.2})
    began = time.monotonic()
    found = list(replies(grid, [plain(node, a=np.zeros(2)) for node in (1, 2, 3, 4)], 1.5))
    assert 1.5 <= time.monotonic() - began < 2.5
    assert [reply and reply.content["metrics"]["node"] for reply in found] == [1, 2, None, 4]


def test_however_many_sites_answer_few_replies_are_in_memory_at_a_time() -> None:
    grid = Sites(echo, {node: 0.3 if node == 1 else 0.0 for node in range(1, 31)})
    used, most = 0, 0
    for reply in replies(grid, [plain(node, a=np.zeros(2)) for node in range(1, 31)], 20):
        most = max(most, len(grid.pulled) - used)
        used += 1
        assert reply is not None
        assert reply.content["metrics"]["node"] == used
    assert used == len(grid.pulled) == 30
    assert most <= AHEAD + 1


def test_who_waits_long_asks_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    class Time:
        @staticmethod
        def monotonic() -> float:
            return now[0]

        @staticmethod
        def time() -> float:
            return now[0]

        @staticmethod
        def sleep(seconds: float) -> None:
            assert seconds <= POLLS[1]
            now[0] += seconds

    monkeypatch.setattr(exchange, "time", Time)
    monkeypatch.setattr(time, "monotonic", Time.monotonic)
    for seconds in (1.0, 10.0, 100.0, 1000.0):
        now[0] = 0.0
        grid = Sites(echo, {1: seconds})
        (reply,) = replies(grid, [plain(1, a=np.zeros(2))], 5000)
        assert reply is not None
        assert now[0] - seconds <= max(POLLS[0], 0.05 * seconds) + 1e-9  # a twentieth, at most, is lost
        assert grid.asked <= 60 + seconds / 3


def test_flowers_grid_collects_by_the_name_that_we_change() -> None:
    """If this fails Flower has changed: see where its Grid waits for a reply's parts now."""
    tree = ast.parse(inspect.getsource(http_grid))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "pull_objects"]
    assert [[word.arg for word in call.keywords] for call in calls] == [["object_ids", "pull_object_fn"]]


def test_a_packed_question_gets_a_packed_answer_and_a_plain_one_a_plain(three_sites: Path, tiny_job: Job) -> None:
    model = exchanged(load_task(tiny_job.task).build_model(tiny_job), tiny_job)
    seen: list[Message] = []

    def answer(message: Message) -> Message:
        site = three_sites / "abc"[message.metadata.dst_node_id - 1]
        context = Context(7, 2, {"site": str(site / "site.toml")}, RecordDict(), dict(tiny_job.flat()))
        assert set(message.content["arrays"]) == {INDEX, DATA}
        seen.append(app(message, context))
        return seen[-1]

    config = ConfigRecord({"round": 1, "class-weights": [1.0, 1.0]})
    content = RecordDict({"config": config, "arrays": ArrayRecord(model)})  # type: ignore[arg-type]
    messages = [Message(content, node, "train") for node in (1, 2)]
    grid = Sites(answer, {1: 0.0, 2: 0.0})
    found = list(replies(grid, messages, 30))
    assert grid.contents[0]["arrays"] is grid.contents[1]["arrays"]  # packed once
    assert list(messages[0].content["arrays"]) == list(model)  # and ours stay as they were
    for reply, node in zip(found, (1, 2), strict=True):
        assert reply is not None
        update = admit(reply, model, tiny_job, 100)
        # The same site asked again in plain, as by an engine of this machine, answers the same in plain.
        site = three_sites / "abc"[node - 1]
        context = Context(7, 2, {"site": str(site / "site.toml")}, RecordDict(), dict(tiny_job.flat()))
        again = app(Message(content, node, "train"), context)
        assert list(again.content["arrays"]) == list(model)
        other = admit(again, model, tiny_job, 100)
        assert all(torch.equal(update.arrays[name], other.arrays[name]) for name in model)


def test_a_reply_that_is_badly_packed_is_dropped_like_any_that_is_not_in_order(tiny_job: Job) -> None:
    model = exchanged(load_task(tiny_job.task).build_model(tiny_job), tiny_job)

    def answer(message: Message) -> Message:
        content = pack(RecordDict({"arrays": ArrayRecord(model)}))  # type: ignore[arg-type]
        data = content["arrays"][DATA]
        content["arrays"][DATA] = Array("uint8", (3,), data.stype, data.data[:3])
        with pytest.raises(ValueError):
            unpack(content)
        content["metrics"] = MetricRecord({"num-examples": 3})
        return Message(content, reply_to=message)

    (reply,) = replies(Sites(answer, {1: 0.0}), [plain(1, a=np.zeros(2), b=np.ones(2))], 5)
    with pytest.raises(Dropped, match="wrong-names"):
        admit(reply, model, tiny_job, 100)


def test_a_reply_that_cannot_be_put_together_is_a_part_that_is_missing() -> None:
    """Flower makes an error reply of a missing part; what it cannot inflate would end the whole ServerApp."""
    message = echo(plain(1, a=np.zeros(2)))
    parts = {name: part.deflate() for name, part in get_all_nested_objects(message).items()}
    names = [*(name for name in parts if name != message.object_id), message.object_id]
    assert exchange._soon(names, parts.__getitem__) == parts
    record = next(name for name, part in parts.items() if part.startswith(b"RecordDict"))
    for broken in (parts[record][:-3] + b"{{{", b"RecordDict 3\0{{{", b"Nothing 0\0"):
        with pytest.raises(ObjectPullError, match="not in order"):
            exchange._soon(names, (parts | {record: broken}).__getitem__)


def test_a_reply_to_a_question_that_was_not_asked_is_passed_over() -> None:
    def stray(message: Message) -> Message:
        answer = echo(message)
        answer.metadata.__dict__["_reply_to_message_id"] = "another"
        return answer

    assert list(replies(Sites(stray, {1: 0.0}), [plain(1, a=np.zeros(2))], 0.3)) == [None]

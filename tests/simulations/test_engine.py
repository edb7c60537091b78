"""The engine as a Flower Grid: order, isolation, failure, memory, and Flower's own strategy on top of it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp.strategy import FedAvg

import simulations.pool
from server.admission import Place
from server.wire import Line
from shared.config import Job
from simulations.engine import LocalGrid
from simulations.pool import WorkerPool
from simulations.waiting import Reply
from tests.conftest import ROOT

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Adds the node's number to every weight; may sleep, die or count on request."""
    config = message.content["config"]
    number = int(context.node_config["number"])
    if config.get("slow") == number:
        time.sleep(float(config["seconds"]))
    if config.get("dies") == number:
        os._exit(1)
    if config.get("raises") == number:
        raise ValueError("secret")
    arrays = {name: array.numpy() + number for name, array in message.content["arrays"].items()}
    message.content["config"]["touched"] = 1  # a site that edits what it was sent must not be seen by the next
    count = int(context.state["count"]["n"]) if "count" in context.state else 0
    context.state["count"] = MetricRecord({"n": count + 1})
    metrics = {"num-examples": number, "pid": os.getpid(), "calls": count + 1, "threads": torch.get_num_threads()}
    metrics["touched"] = int(config.get("touched", 0)) - 1
    content = {"arrays": ArrayRecord({k: Array(v) for k, v in arrays.items()}), "metrics": MetricRecord(metrics)}
    return Message(RecordDict(content), reply_to=message)


@pytest.fixture
def pool() -> Iterator[WorkerPool]:
    with WorkerPool(app, 2) as pool:
        yield pool


def grid_of(pool: WorkerPool, count: int) -> LocalGrid:
    return LocalGrid(pool, [{"number": number} for number in range(1, count + 1)], {})


def messages(grid: LocalGrid, size: int = 3, **config: float) -> list[Message]:
    arrays = ArrayRecord({"w": Array(np.zeros(size, np.float32))})
    content = RecordDict({"arrays": arrays, "config": ConfigRecord({"x": 0, **config})})
    return [Message(content, node, "train") for node in grid.get_node_ids()]


def test_replies_come_in_the_order_of_the_messages_even_if_the_first_is_slow(pool: WorkerPool) -> None:
    grid = grid_of(pool, 9)
    replies = list(grid.send_and_receive(messages(grid, slow=1, seconds=0.5)))
    assert [reply.content["arrays"]["w"].numpy()[0] for reply in replies] == list(range(1, 10))
    assert all(reply.metadata.src_node_id == node for reply, node in zip(replies, grid.get_node_ids(), strict=True))


def test_work_is_shared_by_processes_with_one_thread_each(pool: WorkerPool) -> None:
    grid = grid_of(pool, 8)
    replies = [reply.content["metrics"] for reply in grid.send_and_receive(messages(grid, slow=1, seconds=0.3))]
    assert len({reply["pid"] for reply in replies}) == 2
    assert os.getpid() not in {reply["pid"] for reply in replies}
    assert {reply["threads"] for reply in replies} == {1}


def test_a_site_sees_neither_anothers_edits_nor_loses_its_own_state(pool: WorkerPool) -> None:
    grid = grid_of(pool, 5)
    for round_ in (1, 2, 3):
        replies = list(grid.send_and_receive(messages(grid)))
        assert [reply.content["metrics"]["calls"] for reply in replies] == [round_] * 5
        assert [reply.content["metrics"]["touched"] for reply in replies] == [0] * 5


def test_a_dead_worker_fails_its_message_only_and_is_replaced(pool: WorkerPool) -> None:
    grid = grid_of(pool, 6)
    replies = list(grid.send_and_receive(messages(grid, dies=3)))
    assert [reply.has_error() for reply in replies] == [False, False, True, False, False, False]
    assert replies[2].error.code == ErrorCode.CLIENT_APP_CRASHED
    again = list(grid.send_and_receive(messages(grid, slow=1, seconds=0.3)))
    assert len({reply.content["metrics"]["pid"] for reply in again}) == 2


def failing_start(pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(device: str) -> None:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(pool, "_start", start)


def test_where_no_worker_can_be_started_the_others_go_on(pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    failing_start(pool, monkeypatch)
    grid = grid_of(pool, 6)
    replies = list(grid.send_and_receive(messages(grid, dies=3)))
    assert [reply.has_error() for reply in replies] == [False, False, True, False, False, False]
    assert pool.size == 1


def test_with_no_worker_left_nothing_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with WorkerPool(app, 1) as pool:
        failing_start(pool, monkeypatch)
        grid = grid_of(pool, 5)
        started = time.monotonic()
        replies = list(grid.send_and_receive(messages(grid, dies=1), timeout=3600))
        assert all(reply.error.code == ErrorCode.CLIENT_APP_CRASHED for reply in replies)
        names = list(grid.push_messages(messages(grid)))
        assert [reply.has_error() for reply in grid.pull_messages(names)] == [True] * 5
        assert time.monotonic() - started < 20


def test_workers_that_die_without_a_message_are_not_started_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulations.pool, "work", lambda *_: os._exit(1))
    with WorkerPool(app, 2) as pool:
        deadline = time.monotonic() + 60
        while pool.size and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not pool.size
        grid = grid_of(pool, 2)
        names = list(grid.push_messages(messages(grid)))
        assert len(list(grid.pull_messages(names))) == 2


def test_a_worker_given_up_on_as_it_answers_gets_no_other_message(
    pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its reply lies in the pipe already when it is killed: whoever came next would die with it."""
    grid, receive = grid_of(pool, 6), pool._receive
    given_up: list[str] = []

    def late(worker: Any) -> None:
        if worker.task and not given_up:
            given_up.append(worker.task.message.metadata.message_id)
            pool.abandon(worker.task.future)
            worker.process.join()
        receive(worker)

    monkeypatch.setattr(pool, "_receive", late)
    names = list(grid.push_messages(messages(grid)))
    found: dict[str, Message] = {}
    deadline = time.monotonic() + 60
    while not (given_up and set(names) - set(given_up) <= found.keys()) and time.monotonic() < deadline:
        found |= {reply.metadata.reply_to_message_id: reply for reply in grid.pull_messages(names)}
        time.sleep(0.01)
    others = set(names) - set(given_up)
    assert others <= found.keys()
    assert not any(found[name].has_error() for name in others)


@pytest.mark.parametrize(("found", "spoilt", "forked"), [(0, True, True), (1, False, True), (2, True, False)])
def test_a_worker_is_forked_unless_cuda_was_asked_before(
    found: int, spoilt: bool, forked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: spoilt)  # what torch says in a child
    assert simulations.pool._forkable() is forked


def test_a_worker_may_open_as_many_files_as_the_system_allows() -> None:
    code = (
        "import resource; hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))\n"
        "from simulations.worker import open_many_files; open_many_files(); open_many_files()\n"
        "print(*resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    soft, hard = map(int, done.stdout.split())
    assert soft == min(hard, 1 << 16) if hard >= 0 else 1 << 16


class Given(Reply):
    """A reply that is there; notes whether the one before it is gone when it is asked for."""

    def __init__(self, message: Message, before: list[weakref.ref[Message]], alive: list[bool]) -> None:
        super().__init__()
        self.message, self.before, self.alive = message, before, alive

    def within(self, seconds: float | None) -> Any:
        self.alive += [one() is not None for one in self.before]
        reply = Message(RecordDict(), reply_to=self.message)
        self.before.append(weakref.ref(reply))
        return reply, RecordDict()


def test_a_reply_that_was_used_is_gone_before_the_next_one_is_waited_for(tiny_job: Job) -> None:
    """Else the server holds one model more than it must."""
    before: list[weakref.ref[Message]] = []
    alive: list[bool] = []

    class Pool:
        size = 1

        def pack(self, content: RecordDict) -> RecordDict:
            return content

        def submit(self, message: Message, *_: object) -> Given:
            return Given(message, before, alive)

        def abandon(self, future: Reply) -> None: ...

    grid = LocalGrid(Pool(), [{}] * 4, {})  # type: ignore[arg-type]
    places = [Place(node, f"s{node}", {"train": 4}, [], 0) for node in grid.get_node_ids()]
    for _, reply in Line(tiny_job).exchange(grid, "train", RecordDict(), places, 1):
        assert reply is not None
        del reply
    assert len(before) == 4
    assert not any(alive)


def test_an_exception_becomes_an_error_reply_without_its_text(pool: WorkerPool) -> None:
    grid = grid_of(pool, 3)
    replies = list(grid.send_and_receive(messages(grid, raises=2)))
    assert [reply.has_error() for reply in replies] == [False, True, False]
    assert "secret" not in str(replies[1].error)


def test_a_site_that_is_too_late_gives_an_error_and_its_worker_is_free_again(pool: WorkerPool) -> None:
    grid = grid_of(pool, 4)
    started = time.monotonic()
    replies = list(grid.send_and_receive(messages(grid, slow=2, seconds=60), timeout=1.0))
    assert time.monotonic() - started < 20
    assert replies[1].error.code == ErrorCode.REPLY_MESSAGE_UNAVAILABLE
    assert len(list(grid.send_and_receive(messages(grid)))) == 4


def test_push_and_pull_work_as_flowers_own_grids_do(pool: WorkerPool) -> None:
    grid = grid_of(pool, 3)
    names = list(grid.push_messages(messages(grid)))
    assert len(set(names)) == 3
    found: list[Message] = []
    while len(found) < 3:
        found += grid.pull_messages(names)
        threading.Event().wait(0.01)
    assert {reply.metadata.reply_to_message_id for reply in found} == set(names)
    assert grid.pull_messages(names) == []


def test_a_consumer_that_stops_early_leaves_the_pool_usable(pool: WorkerPool) -> None:
    grid = grid_of(pool, 8)
    replies = grid.send_and_receive(messages(grid, slow=3, seconds=60))
    next(replies)
    replies.close()  # type: ignore[attr-defined]
    assert len(list(grid.send_and_receive(messages(grid)))) == 8


def test_flowers_own_fedavg_runs_on_it(pool: WorkerPool) -> None:
    grid = grid_of(pool, 3)
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=3, min_available_nodes=3)
    start = ArrayRecord({"w": Array(np.zeros(2, np.float32))})
    result = strategy.start(grid=grid, initial_arrays=start, num_rounds=2)
    # numbers 1, 2, 3 weighted by 1, 2, 3: each round adds 14 / 6
    np.testing.assert_allclose(result.arrays["w"].numpy(), 2 * 14 / 6, rtol=1e-6)


def test_closing_ends_every_process_even_a_busy_one() -> None:
    pool = WorkerPool(app, 2)
    grid = grid_of(pool, 2)
    grid.push_messages(messages(grid, slow=1, seconds=60))
    children = [psutil.Process(worker.process.pid) for worker in pool._workers]
    pool.close()
    gone, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert len(gone) == 2


def test_workers_leave_when_their_parent_is_killed(tmp_path: Path) -> None:
    import subprocess
    import sys

    script = (
        "import sys, time\nfrom simulations.pool import WorkerPool\nfrom flwr.clientapp import ClientApp\n"
        "pool = WorkerPool(ClientApp(), 3)\n"
        "print(*[w.process.pid for w in pool._workers], flush=True)\ntime.sleep(60)\n"
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", script], cwd=root, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        workers = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
        process.kill()
        _, alive = psutil.wait_procs(workers, timeout=10)
    assert len(workers) == 3
    assert not alive


def test_at_most_a_few_replies_are_in_memory_whatever_the_number_of_sites() -> None:
    """Peak of replies that exist and were not yet consumed, with a slow consumer."""
    with WorkerPool(app, 2) as pool:
        grid = grid_of(pool, 40)
        held: list[int] = []
        submitted = pool.submit
        pending = []

        def counting(*args: object, **kwargs: object) -> object:
            future = submitted(*args, **kwargs)  # type: ignore[arg-type]
            pending.append(future)
            return future

        pool.submit = counting  # type: ignore[assignment,method-assign]
        for consumed, _ in enumerate(grid.send_and_receive(messages(grid)), start=1):
            held.append(len(pending) - consumed)
        assert len(held) == 40
        assert max(held) <= 2 * pool.size

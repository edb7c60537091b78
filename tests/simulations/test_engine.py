"""The engine as a Flower Grid: order, isolation, failure, memory, and Flower's own strategy on top of it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp.strategy import FedAvg

from simulations.engine import LocalGrid
from simulations.pool import WorkerPool

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

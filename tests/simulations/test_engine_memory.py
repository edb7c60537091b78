"""Models in shared memory: who writes harms nobody, what is held stays, nothing grows and nothing is left behind."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from client import lazy
from simulations.engine import LocalGrid
from simulations.pool import WorkerPool

ROOT = Path(__file__).parents[2]
SIZE = 50_000
app = ClientApp()
_kept: list[np.ndarray] = []


@app.train()
def train(message: Message, context: Context) -> Message:
    """Replies with what it was sent plus its number, then writes into all that it can get hold of."""
    config, number = message.content["config"], int(context.node_config["number"])
    arrays = message.content.array_records["arrays"]
    if config.get("dies") == number:
        os.kill(os.getpid(), signal.SIGKILL)
    sent = arrays["w"].numpy()
    reply = RecordDict({"arrays": ArrayRecord({"w": Array(sent + number)}), "metrics": MetricRecord({"n": number})})
    sent += 1000
    torch.from_numpy(arrays["w"].numpy()).add_(1000)
    module = torch.nn.Linear(SIZE, 1, bias=False)
    module.load_state_dict({"weight": arrays.to_torch_state_dict()["w"].reshape(1, SIZE)}, assign=True)
    with torch.no_grad():
        module.weight.mul_(7)
    arrays["w"] = Array(np.full(SIZE, -1, np.float32))
    if config.get("keeps"):
        _kept.append(message.content.array_records["late"]["w"].numpy())
        reply["metrics"]["kept"] = [float(array[0]) for array in _kept]
    return Message(reply, reply_to=message)


@pytest.fixture
def pool() -> Iterator[WorkerPool]:
    with WorkerPool(app, 2) as pool:
        yield pool


def grid_of(pool: WorkerPool, count: int) -> LocalGrid:
    return LocalGrid(pool, [{"number": number} for number in range(1, count + 1)], {})


def messages(grid: LocalGrid, value: float, **config: float) -> list[Message]:
    records = {name: ArrayRecord({"w": Array(np.full(SIZE, value, np.float32))}) for name in ("arrays", "late")}
    content = RecordDict({**records, "config": ConfigRecord({"x": 0, **config})})
    return [Message(content, node, "train") for node in grid.get_node_ids()]


def value_of(reply: Message) -> float:
    values = reply.content.array_records["arrays"]["w"].numpy()
    assert (values == values[0]).all()
    return float(values[0])


def test_a_client_that_writes_into_what_it_was_sent_changes_it_for_nobody(pool: WorkerPool) -> None:
    grid = grid_of(pool, 7)
    asked = messages(grid, 3.0)
    for _ in range(3):  # the same content again: neither the next site nor the next round sees a write
        assert [value_of(reply) for reply in grid.send_and_receive(asked)] == [3.0 + n for n in range(1, 8)]
    assert (asked[0].content.array_records["arrays"]["w"].numpy() == 3).all()


def test_replies_that_are_held_stay_as_they_are_while_more_rounds_come(pool: WorkerPool) -> None:
    """Forty replies a round, more than there are segments in the end: some go through the pipe instead."""
    grid = grid_of(pool, 40)
    held = [list(grid.send_and_receive(messages(grid, 100.0 * round_))) for round_ in range(3)]
    raw = [[reply.content.array_records["arrays"]["w"].numpy() for reply in replies] for replies in held]
    list(grid.send_and_receive(messages(grid, -5.0)))
    for round_, (replies, arrays) in enumerate(zip(held, raw, strict=True)):
        for number, (reply, array) in enumerate(zip(replies, arrays, strict=True), start=1):
            assert (array == 100.0 * round_ + number).all()
            assert value_of(reply) == 100.0 * round_ + number
    shared = [lazy.numbers_of(reply.content.array_records["arrays"]["w"]) for replies in held for reply in replies]
    assert {type(numbers).__name__ for numbers in shared} == {"Stored", "Kept"}


def test_a_client_that_keeps_what_it_was_sent_keeps_it_unchanged(pool: WorkerPool) -> None:
    grid = grid_of(pool, 2)
    for round_ in range(1, 6):
        replies = list(grid.send_and_receive(messages(grid, float(round_), keeps=1)))
    kept = [list(reply.content.metric_records["metrics"]["kept"]) for reply in replies]  # type: ignore[arg-type]
    for values in kept:
        assert values == sorted(values)  # of each round what it was
        assert set(values) <= {1.0, 2.0, 3.0, 4.0, 5.0}


def test_workers_are_replaced_while_the_parents_threads_are_busy(pool: WorkerPool) -> None:
    """Forked from a process whose other threads allocate, log and compute: a lock held there must not hang a worker."""
    import logging

    stop, log = threading.Event(), logging.getLogger("busy")

    def busy() -> None:
        while not stop.is_set():
            torch.ones(200, 200).mm(torch.ones(200, 200)).sum().item()
            log.debug("%s", [bytes(1000) for _ in range(100)])

    threads = [threading.Thread(target=busy, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        grid = grid_of(pool, 4)
        for _ in range(4):
            replies = list(grid.send_and_receive(messages(grid, 1.0, dies=2), timeout=300))
            assert [reply.has_error() for reply in replies] == [False, True, False, False]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert [value_of(reply) for reply in grid.send_and_receive(messages(grid, 1.0))] == [2, 3, 4, 5]


def test_a_hundred_rounds_do_not_make_anything_grow(pool: WorkerPool) -> None:
    grid, seen = grid_of(pool, 3), []
    for number in range(100):
        assert [value_of(reply) for reply in grid.send_and_receive(messages(grid, number))] == [
            number + 1.0,
            number + 2.0,
            number + 3.0,
        ]
        if number in (29, 99):
            gc.collect()
            family = [psutil.Process(), *psutil.Process().children(recursive=True)]
            files = [process.num_fds() for process in family]
            memory = [process.memory_info().rss / 2**20 for process in family]
            seen.append((len(family), files, memory, pool._segments.counts))
    (processes, files, memory, segments), (more, later, grown, again) = seen
    assert more == processes
    assert all(a <= b + 2 for a, b in zip(later, files, strict=True))
    assert sum(again) <= sum(segments) + 1
    assert all(a < b + 3 for a, b in zip(grown, memory, strict=True))  # MiB; a round's arrays are ten times as much


_SCRIPT = """
import os, sys, time
import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from simulations.engine import LocalGrid
from simulations.pool import WorkerPool

app = ClientApp()

@app.train()
def train(message, context):
    return Message(RecordDict({"arrays": ArrayRecord({"w": Array(message.content["arrays"]["w"].numpy() + 1)})}),
                   reply_to=message)

with WorkerPool(app, 2) as pool:
    grid = LocalGrid(pool, [{}] * 4, {})
    print(*[worker.process.pid for worker in pool._workers], flush=True)
    while True:
        content = RecordDict({"arrays": ArrayRecord({"w": Array(np.zeros(300_000, np.float32))})})
        held = list(grid.send_and_receive([Message(content, node, "train") for node in grid.get_node_ids()]))
        print("round", flush=True)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_however_a_run_ends_neither_processes_nor_shared_memory_are_left(how: signal.Signals) -> None:
    before = set(os.listdir("/dev/shm"))
    with subprocess.Popen(
        [sys.executable, "-c", _SCRIPT], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        workers = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
        for _ in range(3):
            assert process.stdout.readline() == "round\n"
        process.send_signal(how)
        process.stdout.read()
        assert process.wait(60) != 0
        _, alive = psutil.wait_procs(workers, timeout=30)
    assert len(workers) == 2
    assert not alive
    assert not {name for name in set(os.listdir("/dev/shm")) - before if "consilium" in name}

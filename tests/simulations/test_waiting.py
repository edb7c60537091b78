"""What waits for workers: the order, and how it ends."""

from __future__ import annotations

import threading

import pytest
from flwr.app import Context, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from simulations.pool import WorkerPool
from simulations.simulate import _run_all
from simulations.waiting import PoolClosed, Task, Waiting, WorkerDied
from tests.simulations.test_engine import app, grid_of, messages

CONTEXT = Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})


def task(waiting: Waiting[Task], priority: int) -> Task:
    return Task(waiting.place(priority), None, CONTEXT, priority)  # type: ignore[arg-type]


@given(st.lists(st.integers(0, 3)), st.data())
def test_lower_priority_first_equal_ones_as_they_came_without_the_dropped(some: list[int], data: st.DataObject) -> None:
    waiting: Waiting[Task] = Waiting()
    tasks = [task(waiting, priority) for priority in some]
    for one in tasks:
        waiting.add(one)
    gone = data.draw(st.sets(st.integers(0, len(tasks) - 1))) if tasks else set()
    for place in gone:
        waiting.drop(tasks[place].future)
    kept = [one for place, one in enumerate(tasks) if place not in gone]
    expected = sorted(kept, key=lambda one: int(one.content))  # Python's sort keeps the order of equals
    assert [id(waiting.take()) for _ in expected] == [id(one) for one in expected]
    assert not waiting


def test_after_closing_nothing_waits_for_ever() -> None:
    waiting: Waiting[Task] = Waiting()
    one = task(waiting, 0)
    waiting.add(one)
    assert waiting.close() == [one]
    with pytest.raises(PoolClosed):
        waiting.add(task(waiting, 0))
    one.fail(WorkerDied())
    one.fail(PoolClosed())  # it has ended already
    with pytest.raises(WorkerDied):
        one.future.result(0)


def test_a_closed_pool_stops_who_waits_for_it_and_makes_no_site_dead() -> None:
    pool = WorkerPool(app, 2)
    grid = grid_of(pool, 6)
    seen: list[BaseException] = []

    def ask() -> None:
        try:
            list(grid.send_and_receive(messages(grid, slow=1, seconds=60)))
        except PoolClosed as error:
            seen.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    while not any(worker.task for worker in pool._workers):
        thread.join(0.05)
    pool.close()
    thread.join(20)
    assert len(seen) == 1


def test_interrupted_runs_have_ended_when_the_interruption_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that is in the middle of its arithmetic when the program leaves would abort it."""
    pool = WorkerPool(app, 2)
    grid = grid_of(pool, 2)
    threads: list[threading.Thread] = []

    def run() -> None:
        threads.append(threading.current_thread())
        while True:
            list(grid.send_and_receive(messages(grid)))

    def interrupt(_: threading.Thread, seconds: float | None = None) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "join", interrupt)
    with pytest.raises(KeyboardInterrupt):
        _run_all({"federated": run}, None, pool)
    assert [thread.is_alive() for thread in threads] == [False]


def test_a_message_has_its_time_from_when_a_worker_takes_it() -> None:
    """Two take one worker longer than either has; neither of them alone does, even on a busy machine."""
    with WorkerPool(app, 1) as pool:
        grid = grid_of(pool, 2)
        slow = [messages(grid, slow=1, seconds=2.5)[0] for _ in range(2)]
        found = list(grid.send_and_receive(slow, timeout=4.5))
    assert not any(reply.has_error() for reply in found)

"""Messages on their way to workers, whatever these are: what waits, in which order, and how it may end."""

from __future__ import annotations

import heapq
import itertools
import time
from concurrent.futures import Future, TimeoutError
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from flwr.app import Context, Message, RecordDict

Outcome = tuple[Message, RecordDict]


class PoolClosed(Exception):
    """The pool was closed before a message was answered: whoever waits for it is to stop, too."""

    def __str__(self) -> str:
        return "stopped"


class WorkerDied(Exception):
    """The process that worked on a message is gone, killed or out of memory."""


class Reply(Future[Outcome]):
    """A reply to come. ``began`` is when a worker took its message (``time.monotonic``), None while it waits."""

    began: float | None = None

    def within(self, seconds: float | None) -> Outcome:
        """The outcome, if it is there so many seconds after a worker began; how long the message waited for one does
        not count, else the fewer workers there are the fewer sites would answer in time. (On Ray it does count: a
        cluster may lose its last core.)

        Raises:
            TimeoutError: it is not.
        """
        while True:
            began = self.began
            left = seconds if seconds is None or began is None else began + seconds - time.monotonic()
            try:
                return self.result(left)
            except TimeoutError:
                if began is not None and began == self.began:
                    raise


@dataclass(order=True)
class Task:
    """A message, its content made ready by the pool, and where the outcome goes."""

    priority: tuple[int, int]
    message: Message = field(compare=False)
    context: Context = field(compare=False)
    content: Any = field(compare=False)
    future: Reply = field(compare=False, default_factory=Reply)

    def fail(self, error: Exception) -> None:
        """End without a reply, unless it ended before."""
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


T = TypeVar("T", bound=Task)


class Waiting(Generic[T]):
    """The tasks that wait: lower priority first, equal ones in the order in which they came.

    Not locked by itself: a pool changes it and its workers together.
    """

    def __init__(self) -> None:
        self._heap: list[T] = []
        self._order = itertools.count()
        self.closed = False

    def __bool__(self) -> bool:
        return bool(self._heap)

    def place(self, priority: int) -> tuple[int, int]:
        """The priority of a task that comes now."""
        return priority, next(self._order)

    def add(self, task: T) -> None:
        """Let a task wait, a new one or one that is to be done again.

        Raises:
            PoolClosed: it would wait for ever.
        """
        if self.closed:
            raise PoolClosed
        heapq.heappush(self._heap, task)

    def take(self) -> T:
        """The next one, for a worker that begins with it now."""
        task = heapq.heappop(self._heap)
        task.future.began = time.monotonic()
        return task

    def drop(self, future: Reply) -> None:
        """Forget the task of this future, if it waits."""
        self._heap = [task for task in self._heap if task.future is not future]
        heapq.heapify(self._heap)

    def empty(self) -> list[T]:
        """Gives those that wait; none is left."""
        left, self._heap = self._heap, []
        return left

    def close(self) -> list[T]:
        """Take no more; gives those that wait."""
        self.closed = True
        return self.empty()

"""The worker pool on a Ray cluster: actors on many machines that run the same ClientApp, one message at a time each.

A content is put into Ray's object store once and fetched once by each machine. The driver asks for nothing again and
again: Ray calls back when an actor has answered. An actor that is lost with its machine is replaced, and its message
goes to another one if the run allows that; else it fails like that of a local worker that died.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client import lazy
from shared.errors import UserError, how_to_install
from simulations.waiting import Outcome, PoolClosed, Reply, Task, Waiting, WorkerDied
from simulations.worker import call, give_back, keep_memory, load, open_many_files

try:
    import ray
except ImportError:  # the extra is not installed; RayPool says so
    ray = None


class Player:
    """What an actor is: a worker process somewhere in the cluster."""

    def __init__(self, app: ClientApp | str, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        keep_memory()
        open_many_files()
        lazy.install()
        self._app = load(app)

    def ready(self) -> None:
        """Answers when the actor can work."""

    def answer(self, metadata: Any, context: Context, content: RecordDict) -> Outcome:
        """The reply to a message, and the node's state after it."""
        message = Message(content, metadata=metadata)  # type: ignore[call-overload]
        reply = call(self._app, message, context)
        give_back()
        return reply, context.state


@dataclass(order=True)
class _Task(Task):
    """A message of which ``content`` lies in the object store, and how often it may be sent again."""

    retries: int = field(compare=False, default=0)


@dataclass(eq=False)
class _Actor:
    handle: Any
    ready: bool = False
    doomed: bool = False  # it is being killed, whatever it still answers
    task: _Task | None = None


class RayPool:
    """``workers`` actors that run ``app``; has the face of ``simulations.pool.WorkerPool``.

    Args:
        app: a ClientApp, or its name as ``module:attribute``, which every machine must have installed.
        workers: actors, one core each; None: one for each core of the cluster, or each place on its GPUs.
        address: the cluster's, ``auto`` for the one that this machine belongs to; "" starts Ray on this machine alone.
        per_gpu: how many actors share one GPU, where the cluster has any.
        retries: how often a message is sent again whose actor was lost. 0 where doing a round twice is not the same,
            as with privacy budgets.

    Raises:
        UserError: Ray is not installed, or there is no cluster at ``address``.
    """

    def __init__(
        self,
        app: ClientApp | str,
        workers: int | None = None,
        address: str = "",
        threads: int = 1,
        per_gpu: int | None = None,
        retries: int = 1,
    ) -> None:
        if ray is None:
            raise UserError(f"--engine ray: Ray is not installed; {how_to_install('ray')}")
        lazy.install()
        self._started = not ray.is_initialized()
        if self._started:
            _connect(address)
        there = ray.cluster_resources()
        gpus = int(there.get("GPU", 0))
        options: dict[str, Any] = {"num_cpus": 1, "max_restarts": 0, "scheduling_strategy": "SPREAD"}
        if gpus:
            options["num_gpus"] = 1 / (per_gpu or 1)
        self._make: Callable[[], Any] = lambda: ray.remote(Player).options(**options).remote(app, threads)
        self._waiting: Waiting[_Task] = Waiting()
        self._lock = threading.Lock()
        # Ray calls back in a thread that must not wait for Ray: what follows from it is done in ours.
        self._news: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._retries = retries
        self._actors: list[_Actor] = []
        for _ in range(workers or gpus * (per_gpu or 1) or max(1, int(there.get("CPU", 1)))):
            self._start()
        self._thread = threading.Thread(target=self._serve, name="ray-pool", daemon=True)
        self._thread.start()

    @property
    def size(self) -> int:
        """Number of actors."""
        return len(self._actors)

    def __enter__(self) -> RayPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def pack(self, content: RecordDict) -> Any:
        """Make ready to send: into the object store, from where every machine fetches it once."""
        return ray.put(content)

    def submit(self, message: Message, context: Context, content: Any, priority: int = 0) -> Reply:
        """As ``WorkerPool.submit``."""
        task = _Task(self._waiting.place(priority), message, context, content, retries=self._retries)
        task.future.began = time.monotonic()  # a cluster may lose its last core, and then nothing would ever begin
        with self._lock:
            self._waiting.add(task)
            self._dispatch()
        return task.future

    def abandon(self, future: Reply) -> None:
        """As ``WorkerPool.abandon``."""
        with self._lock:
            self._waiting.drop(future)
            for actor in self._actors:
                if actor.task and actor.task.future is future:
                    actor.task.retries, actor.doomed = 0, True
                    ray.kill(actor.handle)

    def close(self) -> None:
        """End all actors, and Ray if it was started here; messages that are not answered yet fail with PoolClosed."""
        with self._lock:
            if self._waiting.closed:
                return
            left = [*self._waiting.close(), *(actor.task for actor in self._actors if actor.task)]
        self._news.put(None)
        self._thread.join()
        for actor in self._actors:
            with contextlib.suppress(Exception):
                ray.kill(actor.handle)
        if self._started:
            ray.shutdown()
        for task in left:
            task.fail(PoolClosed())

    # ------------------------------------------------------------------

    def _serve(self) -> None:
        while (news := self._news.get()) is not None:
            news()

    def _start(self) -> None:
        actor = _Actor(self._make())
        self._actors.append(actor)
        ready: Future[None] = actor.handle.ready.remote().future()
        ready.add_done_callback(lambda done: self._news.put(lambda: self._is_ready(actor, done)))

    def _is_ready(self, actor: _Actor, done: Future[None]) -> None:
        with self._lock:
            if self._waiting.closed:
                return
            if done.exception() is not None:
                self._replace(actor)
            else:
                actor.ready = True
            self._dispatch()

    def _replace(self, actor: _Actor) -> None:
        """A lost actor's place is taken by a new one, which waits until the cluster has a core for it."""
        self._actors.remove(actor)
        with contextlib.suppress(Exception):
            ray.kill(actor.handle)
        self._start()

    def _dispatch(self) -> None:
        for actor in self._actors:
            if actor.ready and actor.task is None and self._waiting:
                actor.task = task = self._waiting.take()
                self._send(actor, task)

    def _send(self, actor: _Actor, task: _Task) -> None:
        answer = actor.handle.answer.remote(task.message.metadata, task.context, task.content)
        answer.future().add_done_callback(lambda done: self._news.put(lambda: self._received(actor, done)))

    def _received(self, actor: _Actor, done: Future[Outcome]) -> None:
        problem = done.exception()
        with self._lock:
            if self._waiting.closed:
                return
            task, actor.task = actor.task, None
            assert task is not None
            again = problem is not None and task.retries > 0
            if problem is not None or actor.doomed:
                self._replace(actor)
            if again:
                task.retries -= 1
                self._waiting.add(task)
            self._dispatch()
        if problem is None and task.future.set_running_or_notify_cancel():
            task.future.set_result(done.result())
        elif problem is not None and not again:
            task.fail(WorkerDied())


def _connect(address: str) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody
    quiet: dict[str, Any] = {"include_dashboard": False} if not address else {}
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        first = str(error).splitlines()[0] if str(error) else repr(error)
        raise UserError(f"--address {address}: no Ray cluster there ({first}); start one: ray start --head") from None

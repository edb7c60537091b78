"""Persistent worker processes that run a ClientApp, one message at a time each.

The processes are forked from a parent that has imported everything, so they start at once and share its memory. Each
computes with one thread: then a site's result does not depend on how many workers there are, and they do not fight for
cores. A worker that dies fails the one message it worked on and is replaced.
"""

from __future__ import annotations

import heapq
import importlib
import itertools
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

Outcome = tuple[Message, RecordDict]


class WorkerDied(Exception):
    """The process that worked on a message is gone, killed or out of memory."""


@dataclass(order=True)
class Task:
    """A message on its way: ``content`` is pickled once for all messages that share it."""

    priority: tuple[int, int]
    message: Message = field(compare=False)
    context: Context = field(compare=False)
    content: bytes = field(compare=False)
    future: Future[Outcome] = field(compare=False, default_factory=Future)


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    task: Task | None = None


class WorkerPool:
    """``workers`` processes that run ``app``, a ClientApp or its name as ``module:attribute``; a context manager."""

    def __init__(self, app: ClientApp | str, workers: int, threads: int = 1) -> None:
        self._app, self._threads = app, threads
        _load(app)  # now, so that forked workers find everything imported
        self._queue: list[Task] = []
        self._order = itertools.count()
        self._lock = threading.Lock()
        self._closing = False
        self._wake_in, self._wake_out = multiprocessing.Pipe(duplex=False)
        import torch._dynamo  # noqa: F401  the first optimiser step imports it (1 s): once here, not in every worker

        self._workers: list[_Worker] = []
        for _ in range(workers):
            self._workers.append(self._start())
        self._thread = threading.Thread(target=self._serve, name="worker-pool", daemon=True)
        self._thread.start()

    @property
    def size(self) -> int:
        """Number of workers."""
        return len(self._workers)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, message: Message, context: Context, content: bytes, priority: int = 0) -> Future[Outcome]:
        """Queue a message; lower ``priority`` goes first, equal ones in the order of submission.

        The future gives the reply and the node's state after it, or raises WorkerDied.
        """
        task = Task((priority, next(self._order)), message, context, content)
        with self._lock:
            if self._closing:
                raise RuntimeError("the worker pool is closed")
            heapq.heappush(self._queue, task)
            self._dispatch()
        return task.future

    def abandon(self, future: Future[Outcome]) -> None:
        """Give up on a message: unqueue it, or kill the worker that is at it (and start another)."""
        with self._lock:
            self._queue = [task for task in self._queue if task.future is not future]
            heapq.heapify(self._queue)
            for worker in self._workers:
                if worker.task and worker.task.future is future:
                    worker.process.kill()

    def close(self) -> None:
        """End all workers; messages still queued fail with WorkerDied."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            queued, self._queue = self._queue, []
        self._wake_out.send(None)
        self._thread.join()
        for worker in self._workers:
            if worker.task is None:
                worker.pipe.close()  # the worker reads the end of the pipe and leaves
            else:
                worker.process.terminate()
                queued.append(worker.task)
        for worker in self._workers:
            worker.process.join(5)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.pipe.close()
        self._wake_in.close()
        self._wake_out.close()
        for task in queued:
            _fail(task)

    # ------------------------------------------------------------------ the parent's side

    def _start(self) -> _Worker:
        ours, theirs = multiprocessing.Pipe()
        forkable = hasattr(os, "fork") and not torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        # A CUDA context does not survive a fork; a spawned worker imports the app by name instead.
        context: Any = multiprocessing.get_context("fork" if forkable else "spawn")
        inherited = [ours, *(worker.pipe for worker in self._workers)] if forkable else []
        process = context.Process(target=_work, args=(theirs, inherited, self._app, self._threads), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours)

    def _dispatch(self) -> None:
        for worker in self._workers:
            if worker.task is None and self._queue:
                worker.task = task = heapq.heappop(self._queue)
                try:
                    worker.pipe.send((task.message.metadata, task.context))
                    worker.pipe.send_bytes(task.content)
                except OSError:
                    pass  # it died just now: _serve sees the end of its pipe and fails the task

    def _serve(self) -> None:
        while True:
            with self._lock:
                pipes = {worker.pipe: worker for worker in self._workers}
            ready = wait([self._wake_in, *pipes])
            if self._wake_in in ready:
                return
            for pipe in ready:
                self._receive(pipes[pipe])  # type: ignore[index]

    def _receive(self, worker: _Worker) -> None:
        try:
            body: bytes | None = worker.pipe.recv_bytes()
        except (EOFError, OSError):
            body = None
        with self._lock:
            task, worker.task = worker.task, None
            if body is None:
                worker.pipe.close()
                worker.process.join()
                self._workers[self._workers.index(worker)] = self._start()
            self._dispatch()
        if task is None:
            return
        if body is None:
            _fail(task)
        elif task.future.set_running_or_notify_cancel():
            task.future.set_result(pickle.loads(body))


def _fail(task: Task) -> None:
    if task.future.set_running_or_notify_cancel():
        task.future.set_exception(WorkerDied())


# ---------------------------------------------------------------------- the worker's side


def _load(app: ClientApp | str) -> ClientApp:
    if not isinstance(app, str):
        return app
    module, _, name = app.partition(":")
    loaded: ClientApp = getattr(importlib.import_module(module), name)
    return loaded


def _work(pipe: Connection, inherited: list[Connection], app: ClientApp | str, threads: int) -> None:
    """Answer messages until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it ends us by the pipe
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other in inherited:  # the parent's ends: held open here, a dead parent would never be noticed
        other.close()
    torch.set_num_threads(threads)
    client_app = _load(app)
    while True:
        try:
            metadata, context = pipe.recv()
            content = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            return
        message = Message(content, metadata=metadata)  # type: ignore[call-overload]
        outcome = (_call(client_app, message, context), context.state)
        try:
            pipe.send_bytes(pickle.dumps(outcome, pickle.HIGHEST_PROTOCOL))
        except OSError:
            return


def _call(app: ClientApp, message: Message, context: Context) -> Message:
    try:
        return app(message, context)
    except Exception as error:
        home = context.node_config.get("home")
        if home:
            Path(str(home)).mkdir(parents=True, exist_ok=True)
            with (Path(str(home)) / "site.log").open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(traceback.format_exc())
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, type(error).__name__), reply_to=message)

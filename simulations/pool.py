"""Persistent worker processes that run a ClientApp, one message at a time each.

The processes are forked from a parent that has imported everything, so they start at once and share its memory. Each
computes with one thread: then a site's result does not depend on how many workers there are, and they do not fight for
cores. Models lie in shared memory, see ``simulations.segments``: one copy of what is sent for all workers, replies are
read where they were written. A worker that dies fails the one message it worked on and is replaced.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import send_handle
from typing import Any

import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client import lazy
from simulations.segments import Lease, Segment, Segments, Source, pack, unpack
from simulations.waiting import PoolClosed, Reply, Task, Waiting, WorkerDied
from simulations.worker import Order, load, work

MOST_LIFELESS = 10  # workers that died one after another without a message: whatever ends them would end the next


@dataclass(frozen=True)
class Content:
    """What messages carry, packed once for all that carry the same."""

    body: bytes
    size: int
    lease: Lease | None


@dataclass(order=True)
class LocalTask(Task):
    """A message of which ``content`` is a ``Content``, and where its reply may be put."""

    reply: Lease | None = field(compare=False, default=None)


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    device: str
    task: LocalTask | None = None
    doomed: bool = False  # it is being killed, whatever it still sends
    known: dict[int, Segment] = field(default_factory=dict)  # segments whose descriptors it has


class WorkerPool:
    """``workers`` processes that run ``app``, a ClientApp or its name as ``module:attribute``; a context manager.

    ``devices`` names a device for each worker, see ``simulations.devices``; without it the job's choice holds.
    """

    def __init__(self, app: ClientApp | str, workers: int, threads: int = 1, devices: Sequence[str] = ()) -> None:
        self._app, self._threads = app, threads
        load(app)  # now, so that forked workers find everything imported
        lazy.install()
        self._waiting: Waiting[LocalTask] = Waiting()
        self._lock = threading.Lock()
        self._lifeless = 0
        self._segments = Segments()
        self._wake_in, self._wake_out = multiprocessing.Pipe(duplex=False)
        # The first optimiser step and augmented batch import these (1 s, .2 s): once here, not in every worker.
        import torch._dynamo  # noqa: F401
        import torchvision.transforms.v2  # noqa: F401

        self._workers: list[_Worker] = []
        for number in range(workers):
            self._workers.append(self._start(devices[number % len(devices)] if devices else ""))
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

    def pack(self, content: RecordDict) -> Content:
        """Make ready to send; its arrays are written to shared memory, once."""
        lease = self._segments.take()
        body, size = pack(content, lease.segment if lease else None)
        return Content(body, size, lease if size else None)

    def submit(self, message: Message, context: Context, content: Content, priority: int = 0) -> Reply:
        """Queue a message; lower ``priority`` goes first, equal ones in the order of submission.

        The future gives the reply and the node's state after it, or raises WorkerDied or PoolClosed.
        """
        task = LocalTask(self._waiting.place(priority), message, context, content)
        with self._lock:
            self._waiting.add(task)
            self._dispatch()
        self._fail_left()
        return task.future

    def abandon(self, future: Reply) -> None:
        """Give up on a message: unqueue it, or kill the worker that is at it (and start another)."""
        with self._lock:
            self._waiting.drop(future)
            for worker in self._workers:
                if worker.task and worker.task.future is future:
                    worker.doomed = True
                    worker.process.kill()

    def close(self) -> None:
        """End all workers; messages that are not answered yet fail with PoolClosed."""
        with self._lock:
            if self._waiting.closed:
                return
            left = self._waiting.close()
        self._wake_out.send(None)
        self._thread.join()
        for worker in self._workers:
            if worker.task is None:
                worker.pipe.close()  # the worker reads the end of the pipe and leaves
            else:
                worker.process.terminate()
                left.append(worker.task)
        for worker in self._workers:
            worker.process.join(5)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.pipe.close()
        self._wake_in.close()
        self._wake_out.close()
        self._segments.close()
        for task in left:
            task.fail(PoolClosed())

    # ------------------------------------------------------------------

    def _start(self, device: str) -> _Worker:
        ours, theirs = multiprocessing.Pipe()
        forkable = _forkable()  # a spawned worker imports the app by name instead
        context: Any = multiprocessing.get_context("fork" if forkable else "spawn")
        inherited = [ours, *(worker.pipe for worker in self._workers)] if forkable else []
        args = theirs, inherited, self._segments if forkable else None, self._app, self._threads, device
        process = context.Process(target=work, args=args, daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours, device)

    def _replace(self, worker: _Worker) -> None:
        """Another worker in place of one that is gone; one fewer where no other can be started."""
        worker.pipe.close()
        worker.process.join()
        if self._waiting.closed:
            return
        place = self._workers.index(worker)
        try:
            if self._lifeless > MOST_LIFELESS:
                raise WorkerDied
            self._workers[place] = self._start(worker.device)
        except Exception:  # no process, memory or file is left for it, or its app has no name to be imported by
            del self._workers[place]

    def _fail_left(self) -> None:
        """With no worker left, nothing that waits will be answered."""
        with self._lock:
            left = [] if self._workers else self._waiting.empty()
        for task in left:
            task.fail(WorkerDied())

    def _dispatch(self) -> None:
        for worker in self._workers:
            if worker.task is None and self._waiting:
                worker.task = task = self._waiting.take()
                task.reply = self._segments.take()
                with contextlib.suppress(OSError):  # it died just now: _serve sees the end of its pipe
                    self._send(worker, task)

    def _send(self, worker: _Worker, task: LocalTask) -> None:
        used = {lease.segment.number: lease.segment for lease in (task.content.lease, task.reply) if lease}
        gone = tuple(number for number, segment in worker.known.items() if segment.fd < 0)
        for number in gone:
            del worker.known[number]
        news = tuple(used.keys() - worker.known.keys())
        order = Order(
            metadata=task.message.metadata,
            context=task.context,
            content=task.content.lease.segment.number if task.content.lease else 0,
            size=task.content.size,
            reply=task.reply.segment.number if task.reply else 0,
            news=news,
            gone=gone,
        )
        worker.pipe.send(order)
        for number in news:
            send_handle(worker.pipe, used[number].fd, worker.process.pid)
        worker.known.update(used)
        worker.pipe.send_bytes(task.content.body)

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
        size, held, body = 0, False, None
        try:
            size, held = worker.pipe.recv()
            body = worker.pipe.recv_bytes()
        except (EOFError, OSError):
            pass
        with self._lock:
            task, worker.task = worker.task, None
            if held and task is not None and task.content.lease is not None:
                task.content.lease.segment.dirty = True
            if body is None or worker.doomed:
                self._lifeless = self._lifeless + 1 if task is None else 0
                self._replace(worker)
            self._dispatch()
        self._fail_left()
        if task is None:
            return
        if body is None:
            task.fail(WorkerDied())
        elif task.future.set_running_or_notify_cancel():
            try:
                task.future.set_result(unpack(body, Source(task.reply, size) if task.reply and size else None))
            except Exception as problem:  # only what the app put into its reply can be at fault
                task.future.set_exception(WorkerDied(repr(problem)))


def _forkable() -> bool:
    """Whether a forked worker could use what this process found: not a GPU once CUDA was asked for here.

    CUDA's context does not survive a fork, and torch says so in the child alone; so a child is asked.
    """
    if not hasattr(os, "fork") or torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return False
    if not torch.cuda.device_count():
        return True
    if not (child := os.fork()):
        os._exit(int(torch.cuda._is_in_bad_fork()))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

"""Runs the cells of a study side by side, each in a process of its own; what is finished is not run again.

The processes come from a fork server that has imported everything, so that a cell starts at once and no thread of this
process is forked. Cells share nothing but the cache of decoded images.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from types import FrameType
from typing import Any

from consilium.study.cell import LOG, RUN, STATE, play, stamp
from consilium.study.plan import Cell, Plan
from shared.alone import alone
from shared.errors import UserError
from shared.files import write_text
from shared.tasks import load_task

MARK = "study.toml"  # a copy of the file: what tells a study's folder from another
CELLS, CACHE = "cells", "cache"
PRELOADED = [
    "consilium.study.cell", "simulations.simulate", "simulations.trivial", "client.app", "torch._dynamo",
    "torchvision.transforms.v2",
]  # fmt: skip
GRACE = 15.0  # seconds a cell has to end its workers

# Hears of a cell: "started", "news" with (round, rounds, metric), "done", "kept", "failed" with the reason.
Observer = Callable[[Cell, str, Any], None]


@dataclass(frozen=True)
class Outcome:
    """How a cell ended; ``result`` is its result.json, empty where there is none."""

    cell: Cell
    folder: Path
    state: str  # done or failed
    reason: str
    seconds: float
    result: dict[str, Any]

    @property
    def run(self) -> Path:
        """The run folder of the simulation."""
        return self.folder / RUN


@dataclass
class _Active:
    cell: Cell
    process: ForkServerProcess
    news: Connection
    cores: int


def run_cells(plan: Plan, text: str, out: Path, cores: int | None, observe: Observer) -> list[Outcome]:
    """Run what is not finished of the plan, into ``out``/cells; gives how each cell ended, in the plan's order.

    Args:
        text: the study's file, which is kept in ``out``.
        cores: processor cores to use; default all. Each cell has one, while there are as many cells as cores: two
            cells with a worker each end sooner than one after the other with two, since the workers of one cell wait
            for each other at the end of every round. Results do not depend on it.
        observe: hears what happens.

    Raises:
        UserError: ``out`` is not a study's folder, or another study runs in it.
        KeyboardInterrupt: Ctrl-C or SIGTERM; no process is left, and the next call goes on.
    """
    cores = cores or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    with _folder(out), _terminable():
        write_text(out / MARK, text)
        pending: deque[Cell] = deque()
        stamps = {data: stamp(data, out) for data in {cell.data for cell in plan.cells}}
        for cell in plan.cells:
            state = _state(out, cell)
            if state.get("state") == "done" and state.get("images") == stamps[cell.data]:
                observe(cell, "kept", None)
            else:
                pending.append(cell)
        _Scheduler(out, cores, observe, stamps).run(pending)
        return [_outcome(out, cell) for cell in plan.cells]


def check_jobs(plan: Plan) -> None:
    """What each task asks of its jobs, before anything runs.

    Raises:
        UserError: a job that its task refuses, by the name of the cell.
    """
    seen = set()
    for cell in plan.cells:
        job = cell.job.replace(name="job", seed=0)
        if job.sha256 not in seen:
            seen.add(job.sha256)
            try:
                load_task(job.task).check(job)
            except UserError as error:
                raise UserError(f"{cell.title}: {error}") from None


class _Scheduler:
    def __init__(self, out: Path, cores: int, observe: Observer, stamps: Mapping[Path, str]) -> None:
        self.out, self.cores, self.observe, self.stamps = out, cores, observe, stamps
        self.active: list[_Active] = []
        self.context: ForkServerContext = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)

    def run(self, pending: deque[Cell]) -> None:
        try:
            while pending or self.active:
                while pending and (free := self.cores - sum(one.cores for one in self.active)) > 0:
                    self._start(pending.popleft(), max(1, free // (len(pending) + 1)))
                self._listen()
        finally:
            self._stop()

    def _start(self, cell: Cell, cores: int) -> None:
        ours, theirs = self.context.Pipe(duplex=False)
        folder, cache = self.out / CELLS / cell.id, self.out / CACHE
        (folder / STATE).unlink(missing_ok=True)  # it may tell of other images
        process = self.context.Process(target=play, args=(cell, folder, cache, cores, theirs, self.stamps[cell.data]))
        process.start()
        theirs.close()
        self.active.append(_Active(cell, process, ours, cores))
        self.observe(cell, "started", None)

    def _listen(self) -> None:
        ready = wait([item for one in self.active for item in (one.news, one.process.sentinel)])
        for one in list(self.active):
            if one.news in ready:
                self._hear(one)
            if one.process.sentinel in ready:
                self._ended(one)

    def _hear(self, one: _Active) -> None:
        with contextlib.suppress(EOFError, OSError):
            while one.news.poll():
                self.observe(one.cell, "news", one.news.recv())
            return
        one.process.join()  # the pipe ends with the process

    def _ended(self, one: _Active) -> None:
        one.process.join()
        one.news.close()
        self.active.remove(one)
        if not _state(self.out, one.cell):
            _note_death(self.out / CELLS / one.cell.id, one.cell, one.process.exitcode)
        state = _state(self.out, one.cell)
        self.observe(one.cell, state["state"], state.get("reason"))

    def _stop(self) -> None:
        for one in self.active:
            one.process.terminate()
        for one in self.active:
            one.process.join(GRACE)
            if one.process.is_alive():
                one.process.kill()  # its workers see the end of their pipes and leave
                one.process.join()
            one.news.close()
        self.active.clear()


def _note_death(folder: Path, cell: Cell, code: int | None) -> None:
    why = f"its process was killed by signal {-code}" if code and code < 0 else f"its process ended with {code}"
    why += " (out of memory?)" if code == -signal.SIGKILL else f"; see {folder / LOG}"
    write_text(folder / STATE, json.dumps({"state": "failed", "reason": why, "cell": cell.id, "seconds": 0.0}))


def _state(out: Path, cell: Cell) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((out / CELLS / cell.id / STATE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
    return found


def _outcome(out: Path, cell: Cell) -> Outcome:
    state, folder = _state(out, cell), out / CELLS / cell.id
    result = folder / RUN / "result.json"
    found = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
    return Outcome(cell, folder, state["state"], state.get("reason", ""), float(state.get("seconds", 0.0)), found)


@contextlib.contextmanager
def _folder(out: Path) -> Iterator[None]:
    """The study's folder, for this process alone."""
    cannot = f"--out {out}: cannot write there"
    try:
        if out.exists() and any(out.iterdir()) and not (out / MARK).exists():
            raise UserError(f"--out {out}: holds files that are not a study of ours; name a new folder")
    except OSError as error:
        raise UserError(f"{cannot}: {error.strerror}") from None
    with alone(out / ".lock", f"--out {out}: a study runs in it already", cannot):
        if not (out / MARK).exists():
            write_text(out / MARK, "")
        yield


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the study as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

"""A cell of a study in a process of its own: one simulation, its baselines, or the trivial model."""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

from consilium.study.plan import BASELINES, FEDERATED, TRIVIAL, Cell
from server.store import write_json
from shared.errors import UserError

STATE, LOG, RUN = "cell.json", "log.txt", "run"
PAUSE = 0.5  # seconds between messages about rounds


def play(cell: Cell, folder: Path, cache: Path, workers: int, news: Connection, images: str) -> None:
    """Run the cell into ``folder`` and write there how it ended, and of which ``images`` (``stamp``) it is.

    ``news`` hears (round, rounds, metric or None).

    A half-finished one that lies there is begun anew. SIGTERM, and the end of the study's process, end it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the study's to handle: it ends us
    signal.signal(signal.SIGTERM, _leave)
    threading.Thread(target=_watch_parent, daemon=True).start()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    started = time.monotonic()
    with (folder / LOG).open("w", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        state = _outcome(cell, folder, cache, workers, news)
    state |= {"cell": cell.id, "images": images, "seconds": round(time.monotonic() - started, 1), "workers": workers}
    write_json(folder / STATE, state)


def stamp(data: Path, out: Path) -> str:
    """Another text once a file below ``data`` is another: of their names, sizes and times.

    Hidden ones, jobs and studies, and what lies in ``out`` are left out.
    """
    digest, own = hashlib.sha256(), out.resolve()
    for folder, folders, files in os.walk(data.resolve()):
        shown = [name for name in folders if not name.startswith(".") and Path(folder, name) != own]
        folders[:] = sorted(shown)
        for name in sorted(files):
            if name.startswith(".") or (name.endswith(".toml") and name != "site.toml"):
                continue
            path = os.path.join(folder, name)
            with contextlib.suppress(OSError):
                found = os.stat(path)
                words = f"{os.path.relpath(path, data.resolve())}\0{found.st_size}\0{found.st_mtime_ns}\n"
                digest.update(words.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def _outcome(cell: Cell, folder: Path, cache: Path, workers: int, news: Connection) -> dict[str, Any]:
    from server.rounds import RunFailed

    try:
        _KINDS[cell.kind](cell, folder / RUN, cache, workers, _Reporter(cell, news))
    except (UserError, RunFailed) as error:
        return {"state": "failed", "reason": str(error)}
    except Exception as error:
        traceback.print_exc(file=sys.stdout)
        return {"state": "failed", "reason": f"{type(error).__name__}: {error}; see {folder / LOG}"}
    return {"state": "done"}


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _watch_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()  # it was killed: nobody waits for this cell, and its workers end with it
        os._exit(1)


class _Reporter:
    """Sends how far the slowest model is."""

    def __init__(self, cell: Cell, news: Connection) -> None:
        self.cell, self.news, self.lock = cell, news, threading.Lock()
        self.rounds: dict[str, int] = {}
        self.score: float | None = None
        self.said = 0.0

    def __call__(self, name: str, event: dict[str, Any]) -> None:
        with self.lock:
            if event["event"] == "start":
                self.rounds.setdefault(name, 0)
            elif event["event"] == "round":
                self.rounds[name] = int(event["round"])
            elif event["event"] == "evaluation" and event["split"] == "val" and name in ("federated", "pooled"):
                row = event["metrics"].get(self.cell.job.best_metric) or {}
                self.score = row.get("value", self.score)
            if not self.rounds or time.monotonic() - self.said < PAUSE:
                return
            self.said = time.monotonic()
            with contextlib.suppress(OSError):  # the study is gone; _watch_parent ends us
                self.news.send((min(self.rounds.values()), self.cell.job.federation.rounds, self.score))


def _federated(cell: Cell, out: Path, cache: Path, workers: int, observe: _Reporter) -> None:
    from simulations.simulate import run

    run(cell.job, cell.data, out, workers=workers, observe=observe, pages=False, cache=cache)


def _baselines(cell: Cell, out: Path, cache: Path, workers: int, observe: _Reporter) -> None:
    from simulations.simulate import run

    more: dict[str, Any] = {"baselines": True, "federated": False}
    run(cell.job, cell.data, out, workers=workers, observe=observe, cache=cache, **more)


def _trivial(cell: Cell, out: Path, cache: Path, workers: int, observe: _Reporter) -> None:
    from simulations.trivial import trivial_scores

    write_json(out / "result.json", {"trivial": trivial_scores(cell.job, cell.data, out, cache)})


_KINDS = {FEDERATED: _federated, BASELINES: _baselines, TRIVIAL: _trivial}

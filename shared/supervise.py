"""Keeps the processes of a site or a server running: starts each again when it ends, and ends all when told to.

Linux ends the children when the supervisor itself is killed, so that none is left behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

POLL = 0.2  # seconds between looks at the processes
LONGEST_WAIT = 30.0  # seconds before a process that keeps ending is started again
GRACE = 10.0  # seconds from the request to end until a process is killed
HEALTHY = 60.0  # seconds after which a process is taken to run well, and its next start does not wait
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


@dataclass
class Child:
    """A process to keep running; its output goes to ``log``."""

    name: str
    command: Sequence[str]
    log: Path
    env: Mapping[str, str] = field(default_factory=dict)  # in place of one's own environment
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    wait: float = 0.0
    due: float = 0.0

    def start(self) -> None:
        """Start the process now."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(self.env) or None,
                preexec_fn=_die_with_parent,
                start_new_session=True,  # Ctrl-C reaches the supervisor, which ends all in order
            )
        self.started = time.monotonic()

    def ended(self) -> int | None:
        """The exit status of a process that has ended since the last look; it is then due to start again."""
        if self.process is None or self.process.poll() is None:
            return None
        status = self.process.returncode
        self.process = None
        lived = time.monotonic() - self.started
        self.wait = 0.5 if lived > HEALTHY else min(max(2 * self.wait, 0.5), LONGEST_WAIT)
        self.due = time.monotonic() + self.wait
        return status


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def supervise(
    children: Sequence[Child],
    ended: Callable[[Child, int], None],
    tick: Callable[[], None] = lambda: None,
    ending: Callable[[], None] = lambda: None,
) -> None:
    """Start ``children`` in their order and keep them running until SIGTERM, SIGINT, or ``tick`` or ``ended`` raises.

    Args:
        ended: hears each child that ended, with its exit status, before it is started again; may raise to give up.
        tick: is called between looks at the children.
        ending: is called once when told to stop, while the children still run.
    """
    with _told_to_stop() as stopped:
        try:
            for child in children:
                child.start()
            while not stopped():
                for child in children:
                    status = child.ended()
                    if status is not None:
                        ended(child, status)
                    if child.process is None and time.monotonic() >= child.due:
                        child.start()
                tick()
                time.sleep(POLL)
            ending()
        finally:
            end_all([child.process for child in reversed(children) if child.process is not None])


def end_all(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask the processes to end, then kill those that have not after ``GRACE`` seconds, and what they left behind."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + GRACE
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        with contextlib.suppress(ProcessLookupError):  # each leads a group of its own, of all that it started
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def _told_to_stop() -> Iterator[Callable[[], bool]]:
    told: list[int] = []
    kinds = (signal.SIGTERM, signal.SIGINT)
    before = {kind: signal.signal(kind, lambda number, _: told.append(number)) for kind in kinds}
    try:
        yield lambda: bool(told)
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def own_environment(**more: str) -> dict[str, str]:
    """This process's environment for a Flower program: nothing is fetched, nothing is reported, its commands found."""
    import sys

    found = {**os.environ, **FLOWER, **more}
    found["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), found.get("PATH", os.defpath)])
    return found


FLOWER = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
# For the programs that only pass models on, in pieces of 5 MiB by many threads. The C library would keep what they gave
# back for later, in heaps of each thread, and a SuperNode would grow from round to round; so pieces go back at once.
# (Not for what trains: there, memory that is kept is memory that need not be cleared again.)
PASSES_ON = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}

"""Processes are kept running, and none is left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from shared.supervise import Child, supervise

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]
FAIL = [sys.executable, "-c", "print('out'); raise SystemExit(3)"]


class Enough(Exception):
    """What a test ends the supervision with."""


def test_what_ends_is_started_again_later_each_time(tmp_path: Path) -> None:
    child, ends = Child("fails", FAIL, tmp_path / "log"), []

    def ended(one: Child, status: int) -> None:
        ends.append((time.monotonic(), one.wait))
        assert (one.name, status) == ("fails", 3)
        if len(ends) == 3:
            raise Enough

    with contextlib.suppress(Enough):
        supervise([child], ended)
    assert [wait for _, wait in ends] == [0.5, 1.0, 2.0]
    assert ends[1][0] - ends[0][0] >= 0.5
    assert ends[2][0] - ends[1][0] >= 1.0
    assert (tmp_path / "log").read_text() == "out\n" * 3


def test_the_end_of_one_does_not_touch_the_other_and_all_end_at_last(tmp_path: Path) -> None:
    stays, fails = Child("stays", SLEEP, tmp_path / "a"), Child("fails", FAIL, tmp_path / "b")
    seen: list[int] = []

    def ended(one: Child, _: int) -> None:
        assert one is fails
        assert stays.process is not None
        seen.append(stays.process.pid)
        if len(seen) == 2:
            raise Enough

    with contextlib.suppress(Enough):
        supervise([stays, fails], ended)
    assert len(set(seen)) == 1
    assert not psutil.pid_exists(seen[0])


def supervisor(folder: Path) -> tuple[subprocess.Popen[bytes], int]:
    """A process that supervises one that sleeps and does not want to end; and the sleeper's number."""
    code = (
        "import sys; from pathlib import Path; from shared.supervise import Child, supervise\n"
        f"child = Child('s', {SLEEP!r}, Path({str(folder / 'log')!r}))\n"
        "def tick():\n    Path(sys.argv[1]).write_text(str(child.process.pid))\n"
        "supervise([child], print, tick)\n"
    )
    own = subprocess.Popen([sys.executable, "-c", code, folder / "pid"], cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 20
    while not (folder / "pid").exists() or not (folder / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return own, int((folder / "pid").read_text())


def test_a_signal_ends_supervisor_and_child(tmp_path: Path) -> None:
    for kind in (signal.SIGTERM, signal.SIGINT):
        own, sleeper = supervisor(tmp_path)
        own.send_signal(kind)
        assert own.wait(15) == 0
        assert not psutil.pid_exists(sleeper)
        (tmp_path / "pid").unlink()


def test_a_supervisor_that_is_killed_takes_its_child_along(tmp_path: Path) -> None:
    own, sleeper = supervisor(tmp_path)
    os.kill(own.pid, signal.SIGKILL)
    own.wait()
    deadline = time.monotonic() + 10
    while psutil.pid_exists(sleeper) and psutil.Process(sleeper).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_what_a_child_started_and_left_behind_ends_too(tmp_path: Path) -> None:
    """Flower's executor starts programs of its own, which may outlive it."""
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    code = f"import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', {deaf!r}]); "
    code += f"open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid)); time.sleep(600)"
    child = Child("starts another", [sys.executable, "-c", code], tmp_path / "log")

    def tick() -> None:
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
            raise Enough

    with contextlib.suppress(Enough):
        supervise([child], lambda *_: None, tick)
    other = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 5
    while psutil.pid_exists(other) and psutil.Process(other).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_it_is_told_of_the_end_while_the_others_still_run(tmp_path: Path) -> None:
    child = Child("s", SLEEP, tmp_path / "log")
    seen: list[bool] = []

    def ending() -> None:
        assert child.process is not None
        seen.append(child.process.poll() is None)

    supervise([child], lambda *_: None, lambda: os.kill(os.getpid(), signal.SIGTERM), ending)
    assert seen == [True]
    assert child.process is not None
    assert child.process.poll() is not None

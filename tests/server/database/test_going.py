"""A run that was killed is called stopped, one that goes on running, one that ended by how it ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.database.engine import STORE, open_database
from server.database.going import states
from server.store import Store, broke_off
from shared.config import job_from_flat
from tests.conftest import called

BEGUN = """
import pathlib, sys
from server.store import Store
folder = pathlib.Path(sys.argv[1])
store = Store(folder)
store.add("start", job="0" * 64, name="x", rounds=4, version="1")
print("begun", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def going(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A program that began the run in ``runs/a`` and goes on until its input ends."""
    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    (folder / "job.toml").write_text(job_from_flat({"name": "x", "federation.rounds": 4}).toml())
    words = [sys.executable, "-c", BEGUN, str(folder)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        yield process
        process.kill()


def test_a_killed_run_is_stopped_and_one_that_is_resumed_runs(
    going: subprocess.Popen[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs" / "a"
    assert not broke_off(folder)
    assert "x: running 0/4 rounds" in called(capsys, "runs", "list", folder.parent)[1]
    os.kill(going.pid, signal.SIGKILL)
    going.wait()
    assert broke_off(folder)
    assert "x: stopped 0/4 rounds" in called(capsys, "runs", "list", folder.parent)[1]
    db = open_database(folder.parent / STORE, create=False)
    assert set(states(db).values()) == {"stopped"}
    assert set(states(db, lambda _: "unknown").values()) == {"unknown"}, "the federation's server knows best"
    again = Store(folder)
    again.add("start", job="0" * 64, name="x", rounds=4, version="1", resumed_after=0)
    assert states(db) == {}
    assert "x: running 0/4 rounds" in called(capsys, "runs", "list", folder.parent)[1]
    again.add("failed", reason="no site is there")
    assert "x: failed 0/4 rounds" in called(capsys, "runs", "list", folder.parent)[1]


def test_a_second_program_at_a_run_does_not_take_it_from_the_first(
    going: subprocess.Popen[str], tmp_path: Path
) -> None:
    folder = tmp_path / "runs" / "a"
    Store(folder).add("start", job="0" * 64, name="x", rounds=4, version="1")
    assert not broke_off(folder)


def test_of_a_folder_that_is_gone_nothing_is_said(tmp_path: Path) -> None:
    assert not broke_off(tmp_path / "gone")

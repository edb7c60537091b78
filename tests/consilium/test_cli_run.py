"""What a coordinator can get wrong at a federation's commands: one line each that says what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from shared.config import Job
from tests.conftest import called


def consilium(*words: object) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-m", "consilium", *map(str, words)], capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federation that was provisioned, and whose server is not started."""
    base = tmp_path_factory.mktemp("federation")
    file = base / "federation.toml"
    # Ports that nothing listens on: below 1024 and not assigned to anything.
    file.write_text('name = "council"\n[server]\nhost = "localhost"\nport = 1011\ninternal_port = 1012\n[sites.a]\n')
    code, said = consilium("provision", file, "--out", base / "dir")
    assert code == 0, said
    return base / "dir"


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "job.toml"
    path.write_text(Job().toml())
    return path


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["run", "JOB", "--federation", "/nowhere"], "consilium provision"),
        (["run", "JOB", "--federation", "DIR"], "consilium server start"),
        (["run", "--federation", "DIR"], "give one of"),
        (["run", "JOB", "--attach", "x", "--federation", "DIR"], "give one of"),
        (["run", "--federation", "DIR", "--attach", "no-such-run"], "no run 'no-such-run'; there are: none"),
        (["run", "--federation", "DIR", "--resume", "../../etc"], "no run"),
        (["run", "--federation", "DIR", "--stop", "no-such-run"], "no run"),
        (["run", "JOB", "--federation", "DIR", "--set", "federation.round=3"], "did you mean"),
        (["server", "start", "/nowhere"], "consilium provision"),
        (["server", "status", "/nowhere"], "consilium provision"),
        (["site", "start", "/nowhere/site.toml"], "site.toml"),
        (["site", "approve", "/nowhere/site.toml"], "site.toml"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], hint: str, folder: Path, job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, said = called(capsys, *[{"JOB": job, "DIR": folder}.get(word, word) for word in words])
    assert code == 2
    assert hint in said


def test_a_run_that_could_not_be_submitted_leaves_no_run_behind(folder: Path, job: Path) -> None:
    assert consilium("run", job, "--federation", folder)[0] == 2
    assert not list((folder / "runs").glob("*/submitted.json"))


def test_the_status_of_a_server_that_is_not_started(folder: Path) -> None:
    code, said = consilium("server", "status", folder)
    assert code == 1
    assert "not started" in said
    assert "certificate: valid for" in said


def test_the_runs_that_there_are_are_named(folder: Path) -> None:
    run = folder / "runs" / "tiny-1"
    run.mkdir(parents=True)
    (run / "submitted.json").write_text(json.dumps({"number": 1, "config": {}}))
    try:
        assert "there are: tiny-1" in consilium("run", "--federation", folder, "--attach", "tiny-2")[1]
    finally:
        (run / "submitted.json").unlink()

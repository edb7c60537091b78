"""A server that has just been started is told from one that is down, and its end from nothing."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from server import running, started
from server.control import Control, Status
from server.federation import Folder
from server.provision import provision
from server.status import status
from server.store import write_json
from shared.alone import alone
from shared.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    (tmp_path / "federation.toml").write_text('name = "f"\n[server]\nhost = "127.0.0.1"\n[sites.a]\n')
    provision(tmp_path / "federation.toml", tmp_path / "f", ())
    found = Folder(tmp_path / "f")
    found.state.mkdir()
    return found


def write_state(folder: Folder, since: float) -> None:
    facts = {"pid": 1, "started": since, "health": {"superlink": 1, "executor": 1}}  # ports where nothing answers
    started.state_file(folder).write_text(json.dumps(facts))


def told(folder: Folder) -> str:
    """What status says, and what every other command does that asks the server."""
    lines, well = status(folder.path)
    assert not well
    with pytest.raises(UserError) as caught, Control(folder) as control:
        control.nodes()
    return "\n".join([*lines, str(caught.value)])


def test_a_young_server_is_starting(folder: Folder) -> None:
    with alone(started.lock_file(folder), "taken", "cannot"):
        write_state(folder, time.time())
        said = told(folder)
        assert "superlink: is starting" in said
        assert "executor: is starting" in said
        assert "is starting: try again in a moment" in said
        assert "start it" not in said
        assert "its log" not in said


def test_an_older_one_that_does_not_answer_is_not_to_be_started_again(folder: Folder) -> None:
    with alone(started.lock_file(folder), "taken", "cannot"):
        write_state(folder, time.time() - started.YOUNG)
        said = told(folder)
        assert "superlink: does not answer; see its log" in said
        assert "is started but does not answer; see the logs" in said
        assert "start it" not in said


def test_what_a_killed_server_left_behind_is_no_server(folder: Folder) -> None:
    started.lock_file(folder).touch()
    write_state(folder, time.time())
    said = told(folder)
    assert f"f: not started; consilium server start {folder.path}" in said
    assert "is starting" not in said


def test_its_end_names_the_runs_that_break_off(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, name in enumerate(("over", "chest", "waits"), start=1):
        (folder.runs / name).mkdir(parents=True)
        write_json(folder.runs / name / "submitted.json", {"number": number})
    known = {1: Status("finished", "completed", ""), 2: Status("running", "", ""), 3: Status("pending", "", "")}

    class Server(Control):
        def statuses(self) -> dict[int, Status]:
            return known

    monkeypatch.setattr(running, "Control", Server)
    said: list[Any] = []
    running._tell(folder.path, said.append)
    assert len(said) == 2
    assert said[0].startswith("run chest breaks off")
    assert f"`consilium run --federation {folder.path} --resume chest`" in said[0]
    assert "--resume waits" in said[1]


def test_its_end_is_not_held_up_by_a_server_that_does_not_answer(folder: Folder) -> None:
    said: list[Any] = []
    running._tell(folder.path, said.append)
    assert said == []

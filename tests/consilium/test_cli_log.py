"""`consilium site log` as a data manager types it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from queue import Queue
from threading import Thread

import pytest
from click.testing import CliRunner, Result

from client.egress_log import ASKED, LEFT, append
from consilium.cli import commands
from shared.sitefile import OWN_FOLDER


def entry(
    run: str, round_: int, kind: str = "train", declined: str = "", epsilon: float | None = None
) -> dict[str, object]:
    listed = {"list": ["head.weight: float32 2x8", "head.bias: float32 2"]} if round_ == 1 else {}
    record = {"names": "0123456789abcdef", "count": 2, "bytes": 1234} | listed
    return {
        "time": f"2026-03-0{round_}T10:20:30Z",
        "run": run,
        "job": "chest",
        "round": round_,
        "kind": kind,
        "split": "test" if kind == "evaluate" else "",
        "seconds": 12.34 * (kind == "train"),
        "site": "north",
        "declined": declined,
        "bytes": 1234 * round_,
        "content": "ab" * 32,
        "epsilon": epsilon,
        "records": {} if declined else {"arrays": record},
    }


@pytest.fixture
def home(tmp_path: Path) -> Path:
    for one in (
        entry("7", 1),
        entry("7", 2, epsilon=1.2345),
        entry("7", 3, declined="too-few-patients"),
        entry("8", 4, "evaluate"),
    ):
        append(tmp_path, one)
    (tmp_path / "site.toml").write_text('name = "north"\n')
    return tmp_path


def log(*words: str) -> Result:
    return CliRunner(env={"COLUMNS": "120"}).invoke(commands, ["site", "log", *words])


def lines_of(result: Result, word: str) -> list[str]:
    return [line for line in result.output.splitlines() if word in line]


def test_every_reply_is_a_line_in_words(home: Path) -> None:
    done = log(str(home / "site.toml"))
    assert done.exit_code == 0
    words = " ".join(lines_of(done, "2026-03-02 10:20:30")[0].split())
    assert words == "2 2026-03-02 10:20:30 2 train the model 12.3 s trained model 2,468 1.23"
    assert "test the model on test images" in " ".join(done.output.split())
    assert "sums over images" in lines_of(done, "2026-03-04")[0]
    assert "too-few-patients" in done.output
    assert [line.strip() for line in lines_of(done, ", job ")] == ["run 7, job chest", "run 8, job chest"]


def test_the_sum_of_it_is_a_sentence_that_says_where_the_reasons_are(home: Path) -> None:
    done = log(str(home / "site.toml"))
    assert "4 replies, 12,340 bytes: 2 × trained model, 1 × sums over images. Nothing else left." in done.output
    assert "1 declined: only a code left." in done.output
    assert f"  {home / 'site.log'}" in done.output.splitlines()
    part = log(str(home / "site.toml"), "--run", "8").output
    assert "declined" not in part
    assert "Nothing else left" not in part


def test_a_narrow_terminal_loses_no_column(home: Path) -> None:
    done = CliRunner(env={"COLUMNS": "80"}).invoke(commands, ["site", "log", str(home)])
    assert "1.23" in lines_of(done, "2026-03-02 10:20:30")[0]
    assert "2,468" in lines_of(done, "2026-03-02 10:20:30")[0]
    told = [line for line in done.output.splitlines() if str(home) not in line]
    assert max(map(len, told)) <= 80
    assert "       came: test the model on test images; left: sums over images" in told  # not a word a line


def test_what_verify_says_fits_the_terminal(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = CliRunner().invoke(commands, ["site", "log", str(home), "--verify"])
    assert max(len(line) for line in done.output.splitlines() if str(home) not in line) <= 80


def test_every_kind_of_message_has_its_words() -> None:
    from client.egress import KINDS

    assert set(ASKED) == set(LEFT) == set(KINDS)


def test_lines_of_an_older_version_are_shown_without_what_they_lack(tmp_path: Path) -> None:
    old = {key: value for key, value in entry("7", 1).items() if key not in ("job", "split", "seconds")}
    append(tmp_path, old)
    done = log(str(tmp_path))
    assert done.exit_code == 0
    assert "trained model" in done.output
    assert "job" not in done.output.splitlines()[0]


def test_what_a_server_names_its_job_cannot_play_tricks_on_the_terminal(tmp_path: Path) -> None:
    append(tmp_path, entry("7", 1) | {"job": "\x1b[2J[bold]x\n"})
    done = log(str(tmp_path))
    assert "\x1b" not in done.output
    assert "job [2J[bold]x" in done.output


def test_follow_shows_what_comes_and_leaves_as_it_happens(tmp_path: Path) -> None:
    (tmp_path / "site.log").write_text("before\n")
    command = [sys.executable, "-m", "consilium", "site", "log", str(tmp_path), "--follow"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        assert process.stdout is not None
        lines: Queue[str] = Queue()
        Thread(target=lambda: [lines.put(line) for line in process.stdout or ()], daemon=True).start()
        heard = [lines.get(timeout=60)]
        while "following" not in heard[-1]:
            heard.append(lines.get(timeout=60))
        with (tmp_path / "site.log").open("a") as file:
            file.write("2026-03-01 10:20:30 came: run 7\n2026-03-01 half a li")
        assert lines.get(timeout=60) == "2026-03-01 10:20:30 came: run 7\n"
        append(tmp_path, entry("7", 1))
        assert lines.get(timeout=60) == "2026-03-01 10:20:30 left: run 7, round 1: trained model, 1,234 bytes\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert not any("before" in line for line in heard)
    finally:
        process.kill()
        process.wait()


def test_a_run_or_the_last_replies_can_be_picked(home: Path) -> None:
    assert "1 reply, " in log(str(home), "--run", "8").output
    last = log(str(home), "--last", "2")
    assert [bool(lines_of(last, f"2026-03-0{day}")) for day in (1, 2, 3, 4)] == [False, False, True, True]


def test_names_and_shapes_are_listed_from_the_line_that_has_them(home: Path) -> None:
    done = log(str(home), "--names", "--last", "1")
    assert "evaluate, arrays (2):" in done.output
    assert "head.weight: float32 2x8" in done.output


def test_verify_says_that_it_is_in_order(home: Path) -> None:
    done = log(str(home / "site.toml"), "--verify")
    assert done.exit_code == 0
    assert "IN ORDER" in done.output
    assert "4 lines" in done.output


def test_verify_names_the_line_and_ends_with_1(home: Path) -> None:
    path = home / OWN_FOLDER / "egress.log"
    path.write_bytes(path.read_bytes().replace(b'"round":2', b'"round":9'))
    done = log(str(home / "site.toml"), "--verify")
    assert done.exit_code == 1
    assert "BROKEN" in done.output
    assert "line 2 was changed" in done.output
    assert "line 2 was changed" in log(str(home)).output  # the table says so, too


def test_a_site_that_nothing_left_is_told_in_one_line(tmp_path: Path) -> None:
    done = log(str(tmp_path / "site.toml"))
    assert "no such log; nothing has left this site" in str(done.exception)


def test_a_line_that_somebody_made_up_is_shown_too(home: Path) -> None:
    """Sealed as ours are, but without what ours hold."""
    append(home, {"run": "9", "bytes": "many", "records": {}})
    done = log(str(home), "--names")
    assert done.exit_code == 0, done.exception
    assert lines_of(done, "unknown")[0].split() == ["5", "0", "unknown", "unknown", "0"]
    assert "5 replies" in done.output


def test_a_list_of_names_is_found_in_whichever_line_has_it(home: Path) -> None:
    """A line of before that refers to it may have been written by another process."""
    first = entry("9", 2)
    append(home, first | {"records": {"arrays": {"names": "feed", "count": 1, "bytes": 1}}})
    append(home, first | {"records": {"arrays": {"names": "feed", "count": 1, "bytes": 1, "list": ["late: float32"]}}})
    assert "late: float32" in log(str(home), "--run", "9", "--names").output

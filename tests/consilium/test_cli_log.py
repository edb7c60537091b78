"""`consilium site log` as a data manager types it."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from client.egress_log import append
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
        "round": round_,
        "kind": kind,
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
    assert lines_of(done, "2026-03-02 10:20:30")[0].split() == [
        *("2", "2026-03-02", "10:20:30", "7", "2", "trained", "model", "2,468", "abababab", "1.23")
    ]
    assert "sums over images" in lines_of(done, "2026-03-04")[0]
    assert "too-few-patients" in done.output
    assert "4 replies, 12,340 bytes" in done.output


def test_a_run_or_the_last_replies_can_be_picked(home: Path) -> None:
    assert "1 replies" in log(str(home), "--run", "8").output
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

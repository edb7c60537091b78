"""The log of what left: the chain, what --verify finds, and what a killed program leaves behind."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client import egress_log
from client.egress_log import HEAD, LOG, TORN, BrokenLog, append, verify
from shared.sitefile import OWN_FOLDER


def filled(home: Path, lines: int = 6) -> Path:
    for number in range(lines):
        append(home, {"kind": "train", "round": number, "bytes": 10 * number})
    return home / OWN_FOLDER / LOG


def test_a_log_that_nobody_touched_is_in_order_and_the_chain_is_plain_sha256(tmp_path: Path) -> None:
    path = filled(tmp_path)
    assert verify(tmp_path).faults == []
    before = "0" * 64
    for number, line in enumerate(path.read_text().splitlines(), start=1):  # as anybody would check it by hand
        body, _, seal = line.rpartition(',"sha256":"')
        assert sha256((body + "}").encode()).hexdigest() + '"}' == seal
        entry = json.loads(line)
        assert (entry["n"], entry["before"]) == (number, before)
        before = entry["sha256"]


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A site with a log of four lines, and the log's bytes."""
    home = tmp_path_factory.mktemp("home")
    return home, filled(home, 4).read_bytes()


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_changed_byte_is_found_in_its_line(data: st.DataObject, untouched: tuple[Path, bytes]) -> None:
    home, text = untouched[0], bytearray(untouched[1])
    path = home / OWN_FOLDER / LOG
    place = data.draw(st.integers(0, len(text) - 1))
    other = data.draw(st.integers(0, 255).filter(lambda byte: byte != text[place]))
    line = bytes(text[:place]).count(b"\n") + 1
    text[place] = other
    path.write_bytes(text)
    faults = verify(home).faults
    assert faults
    # A lost line end makes one line of two, or of the last one a torn one.
    assert faults[0].startswith(f"line {line} ")
    assert len(faults) == 1 or path.read_bytes().count(b"\n") != 4


@pytest.mark.parametrize("number", [1, 3, 5])
def test_a_dropped_line_is_named(number: int, tmp_path: Path) -> None:
    path = filled(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: number - 1] + lines[number:]))
    (fault,) = verify(tmp_path).faults
    assert fault.startswith(f"line {number} does not follow")


def test_lines_in_another_order_are_named(tmp_path: Path) -> None:
    path = filled(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2], lines[3] = lines[3], lines[2]
    path.write_bytes(b"".join(lines))
    assert verify(tmp_path).faults[0].startswith("line 3 does not follow")


def test_a_line_made_anew_with_its_own_sha256_shows_in_the_next(tmp_path: Path) -> None:
    path = filled(tmp_path)
    lines = path.read_text().splitlines()
    body = lines[2].rpartition(',"sha256":"')[0].replace('"bytes":20', '"bytes":2') + "}"
    lines[2] = f'{body[:-1]},"sha256":"{sha256(body.encode()).hexdigest()}"}}'
    path.write_text("\n".join(lines) + "\n")
    (fault,) = verify(tmp_path).faults
    assert fault.startswith("line 4 does not follow")


@pytest.mark.parametrize("left", [5, 1, 0])
def test_dropped_last_lines_show_against_the_note_only(left: int, tmp_path: Path) -> None:
    path = filled(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:left]))
    (fault,) = verify(tmp_path).faults
    assert fault.startswith(f"line {left + 1} is missing")
    (path.parent / HEAD).unlink()  # whoever removes the note, too, is found out only if more than a line is left
    assert bool(verify(tmp_path).faults) == (left > 1)


def test_a_note_that_cannot_be_read_is_a_fault_and_hides_none(tmp_path: Path) -> None:
    path = filled(tmp_path)
    (path.parent / HEAD).write_text("{}")
    assert any(HEAD in fault and "cannot be read" in fault for fault in verify(tmp_path).faults)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], *lines[3:]]))
    assert any("does not follow" in fault for fault in verify(tmp_path).faults)
    with pytest.raises(BrokenLog, match="cannot be read"):
        append(tmp_path, {"kind": "train"})


def test_without_its_note_a_log_of_two_lines_may_have_lost_some(tmp_path: Path) -> None:
    path = filled(tmp_path, 2)
    (path.parent / HEAD).unlink()
    (fault,) = verify(tmp_path).faults
    assert fault.startswith(f"{HEAD} is missing")


def test_nothing_is_appended_to_a_log_that_was_cut(tmp_path: Path) -> None:
    path = filled(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:4]))
    with pytest.raises(BrokenLog, match="shorter"):
        append(tmp_path, {"kind": "train"})
    (path.parent / HEAD).unlink()
    with pytest.raises(BrokenLog, match="missing"):
        append(tmp_path, {"kind": "train"})


def test_a_torn_last_line_is_kept_aside_and_reported(tmp_path: Path) -> None:
    path = filled(tmp_path)
    with path.open("ab") as file:
        file.write(b'{"n":7,"before":"ab')
    found = verify(tmp_path)
    assert found.faults == []
    assert "line 7 is torn" in found.remarks[0]
    append(tmp_path, {"kind": "query"})
    assert (path.parent / TORN).read_bytes() == b'{"n":7,"before":"ab\n'
    found = verify(tmp_path)
    assert found.faults == []
    assert TORN in found.remarks[0]
    assert found.entries[-1]["n"] == 7


def test_a_line_that_the_note_lacks_is_taken_into_account(tmp_path: Path) -> None:
    """The program was killed after the line and before the note."""
    path = filled(tmp_path)
    note = (path.parent / HEAD).read_bytes()
    append(tmp_path, {"kind": "query"})
    (path.parent / HEAD).write_bytes(note)
    assert verify(tmp_path).faults == []
    append(tmp_path, {"kind": "query"})
    assert verify(tmp_path).faults == []
    assert len(verify(tmp_path).entries) == 8


def test_killed_twice_before_the_first_note_the_log_is_still_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path := filled(tmp_path, 1)).with_name(HEAD).unlink()  # killed after the first line, before its note
    write_note = egress_log._write_head

    def killed(folder: Path, head: egress_log.Head) -> None:
        if head.lines == 2:
            raise KeyboardInterrupt
        write_note(folder, head)

    monkeypatch.setattr(egress_log, "_write_head", killed)
    with pytest.raises(KeyboardInterrupt):
        append(tmp_path, {"kind": "query"})
    monkeypatch.undo()
    assert path.read_bytes().count(b"\n") == 2
    assert verify(tmp_path).faults == []
    append(tmp_path, {"kind": "query"})
    assert verify(tmp_path).faults == []


def write_on(home: Path) -> None:
    number = 0
    while True:
        append(home, {"kind": "train", "round": number, "filling": "x" * 3000})
        number += 1


def test_a_program_killed_at_any_moment_leaves_a_log_in_order(tmp_path: Path) -> None:
    log = tmp_path / ".consilium" / LOG
    for attempt in range(12):
        before = log.stat().st_size if log.exists() else 0
        worker = multiprocessing.get_context("fork").Process(target=write_on, args=(tmp_path,))
        worker.start()
        while not log.exists() or log.stat().st_size == before:  # on a busy machine a process starts late
            assert worker.is_alive()
            time.sleep(0.001)
        time.sleep(0.003 * attempt)
        os.kill(worker.pid or 0, signal.SIGKILL)
        worker.join()
        assert verify(tmp_path).faults == []
    append(tmp_path, {"kind": "query"})
    found = verify(tmp_path)
    assert found.faults == []
    assert [entry["n"] for entry in found.entries] == list(range(1, len(found.entries) + 1))
    assert len(found.entries) > 12


def write_some(home: Path, lines: int) -> None:
    for number in range(lines):
        append(home, {"kind": "train", "round": number})


def test_two_programs_that_write_at_once_make_one_chain(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=write_some, args=(tmp_path, 40)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    found = verify(tmp_path)
    assert found.faults == []
    assert len(found.entries) == 120

"""The log of all that left a site: ``.consilium/egress.log``, one JSON object a line, each line sealing the one before.

A line holds ``n``, its number from 1; ``before``, the SHA-256 of the line before (64 zeros in the first); what left,
see ``client.egress``; and last ``sha256``, that of the line itself without this field. So a line that is changed,
dropped, added or moved shows. Lines dropped from the end show only against ``egress.head``, a note of how many there
are and the last one's SHA-256, rewritten after every line. Whoever can write to the folder can make both anew: who
wants to rule that out keeps copies of the note elsewhere.

A line is on the disk before its reply leaves. Where log and note do not belong together nothing is appended, and so
nothing leaves. A line cut short because the program was killed is moved to ``egress.torn``: nothing had left for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

from shared.sitefile import OWN_FOLDER

try:
    import fcntl
except ImportError:  # Windows has no such locks: there one process at a time may serve a site
    fcntl = None  # type: ignore[assignment]

LOG, HEAD, TORN = "egress.log", "egress.head", "egress.torn"
FIRST = "0" * 64
Entry = dict[str, Any]
# Each kind of message in plain words: what the server asks for, and what leaves if the site does not decline.
ASKED = {
    "query": "how many images are there",
    "query.survey": "what do the images look like",
    "train": "train the model",
    "train.scaffold": "train the model, say where it drifts",
    "evaluate": "test the model",
    "evaluate.personal": "make and test this site's own model",
    "evaluate.subgroups": "test the model by groups of patients",
    "train.keys": "make keys to mask with",
    "train.shares": "seal shares of the keys",
    "train.masked": "train the model, send it masked",
    "train.unmask": "open shares of the keys",
}
LEFT = {
    "query": "counts of images",
    "query.survey": "counts and grey values of images",
    "train": "trained model",
    "train.scaffold": "trained model and control variate",
    "evaluate": "sums over images",
    "evaluate.personal": "sums over images",
    "evaluate.subgroups": "sums over images by groups of patients",
    "train.keys": "public keys",
    "train.shares": "sealed shares of keys",
    "train.masked": "trained model under masks",
    "train.unmask": "open shares of keys",
}


class BrokenLog(Exception):
    """The log is not as it was left; ``str`` says how."""


class Head(NamedTuple):
    """How many lines and bytes the log has, and the SHA-256 of its last line."""

    lines: int = 0
    bytes: int = 0
    sha256: str = FIRST


@dataclass
class Verdict:
    """What ``verify`` found: the lines, what is wrong with them, and what is worth knowing but no fault."""

    entries: list[Entry] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def append(home: Path, entry: Entry) -> None:
    """Seal ``entry`` into the log of the site at ``home``; it is on the disk when this returns.

    Raises:
        BrokenLog: log and note do not belong together.
        OSError: it cannot be written.
    """
    folder = home / OWN_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOG).open("ab+") as file, _alone(file):
        head = _end(file, folder)
        line = _sealed({"n": head.lines + 1, "before": head.sha256, **entry})
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
        _write_head(folder, Head(head.lines + 1, head.bytes + len(line), line[-67:-3].decode()))


@contextlib.contextmanager
def _alone(file: IO[bytes]) -> Iterator[None]:
    """Two runs at one site take turns."""
    if fcntl is None:
        yield
        return
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


def _sealed(entry: Entry) -> bytes:
    body = json.dumps(entry, ensure_ascii=True, separators=(",", ":")).encode()
    return body[:-1] + b',"sha256":"' + hashlib.sha256(body).hexdigest().encode() + b'"}\n'


_TAIL = len(b',"sha256":"') + 64 + len(b'"}')


def _seal(line: bytes) -> str:
    """The SHA-256 that belongs at the end of a line."""
    return hashlib.sha256(line[:-_TAIL] + b"}").hexdigest()


def _end(file: IO[bytes], folder: Path) -> Head:
    """Where the log ends; a torn last line is moved aside, and a line that the note lacks is taken into account."""
    size = file.seek(0, os.SEEK_END)
    head = _read_head(folder)
    if head is not None and head.bytes == size:
        return head
    if head is not None and head.bytes > size:
        raise BrokenLog(f"{LOG} is shorter than {HEAD} says")
    file.seek(head.bytes if head else 0)
    *lines, torn = file.read().split(b"\n")
    if head is None and len(lines) > 1:
        raise BrokenLog(f"{HEAD} is missing")
    head = head or Head()
    for line in lines:
        fault, entry = _check(line, head.lines + 1, {head.sha256})
        if fault:
            raise BrokenLog(f"{LOG} line {head.lines + 1} {fault}")
        head = Head(head.lines + 1, head.bytes + len(line) + 1, entry["sha256"])
    if lines:  # at once: killed again before the next note, the log would be two lines ahead of it
        _write_head(folder, head)
    if torn:
        with (folder / TORN).open("ab") as aside:
            aside.write(torn + b"\n")
        file.truncate(head.bytes)
    return head


def _check(line: bytes, number: int, links: set[str]) -> tuple[str, Entry]:
    """What is wrong with a line that should have this number and link, or "", and what it holds."""
    try:
        entry: Entry = json.loads(line)
        if _seal(line) != entry["sha256"]:
            raise ValueError
        found = int(entry["n"]), str(entry["before"])
    except (ValueError, KeyError, TypeError):
        return "was changed: its SHA-256 is not that of its text", {}
    if found[0] != number or found[1] not in links:
        return "does not follow the line before it: one was dropped, added, moved or made anew", entry
    return "", entry


def _read_head(folder: Path) -> Head | None:
    try:
        found = json.loads((folder / HEAD).read_text(encoding="ascii"))
        return Head(int(found["lines"]), int(found["bytes"]), str(found["sha256"]))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise BrokenLog(f"{HEAD} cannot be read") from None


def _write_head(folder: Path, head: Head) -> None:
    name = f"{folder}/.{HEAD}.writing"  # one for all: who writes it has the log to himself
    handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.write(handle, json.dumps(head._asdict()).encode("ascii") + b"\n")
        os.fsync(handle)  # else a power cut could leave an empty note, and nothing would leave any more
    finally:
        os.close(handle)
    os.replace(name, f"{folder}/{HEAD}")


def verify(home: Path) -> Verdict:
    """Read the whole log of the site at ``home`` and say which lines are not as they were written.

    Raises:
        OSError: there is no log, or it cannot be read.
    """
    folder = home / OWN_FOLDER
    verdict = Verdict()
    try:
        note = _read_head(folder)  # before the log, which may grow meanwhile
    except BrokenLog as fault:
        note = Head(0)
        verdict.faults.append(str(fault))
    *lines, torn = (folder / LOG).read_bytes().split(b"\n")
    number, links, ends = 0, {FIRST}, {(0, FIRST)}
    for line in lines:
        fault_, entry = _check(line, number + 1, links)
        if fault_:
            verdict.faults.append(f"line {number + 1} {fault_}")
        number = int(entry["n"]) if entry else number + 1
        # After a changed line the next may follow its text or what it gives as its SHA-256: one fault is told once.
        links = {entry["sha256"]} if entry else {_seal(line), line[-66:-2].decode("ascii", "replace")}
        ends |= {(number, link) for link in links}
        verdict.entries.append(entry)
    _compare(verdict, note, number, ends)
    if torn:
        verdict.remarks.append(f"line {number + 1} is torn: the program was ended while it wrote; nothing had left")
    with contextlib.suppress(OSError):
        aside = (folder / TORN).read_bytes().count(b"\n")
        verdict.remarks.append(f"{TORN}: {aside} torn lines; the program was ended while it wrote; nothing had left")
    return verdict


def _compare(verdict: Verdict, note: Head | None, number: int, ends: set[tuple[int, str]]) -> None:
    """Hold the end of the log against the note of it."""
    if note is None:
        if number > 1:
            verdict.faults.append(f"{HEAD} is missing: whether lines are missing at the end cannot be told")
    elif note.lines > number:
        verdict.faults.append(f"line {number + 1} is missing: {HEAD} says that there are {note.lines} lines")
    elif (note.lines, note.sha256) not in ends:
        verdict.faults.append(f"line {note.lines} is another than {HEAD} says")

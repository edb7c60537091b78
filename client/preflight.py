"""What stands between a hospital and its first round, one line each: well, worth a look, or a stop, and what to do.

``before`` looks at the machine, the site's rules, its key and the server; ``after`` at what ``client.check`` found in
the images. Nothing is sent but one TLS handshake (two if the first fails) and one ``GET /consilium`` to the server.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

from client.check import Report
from shared.config import Job
from shared.terminal import wrapped


class Level(IntEnum):
    """How bad it is: the site may join with all but a stop."""

    OK = 0
    ATTENTION = 1
    STOP = 2


WORDS = {Level.OK: "OK", Level.ATTENTION: "ATTENTION", Level.STOP: "STOP"}
COLOURS = {Level.OK: "green", Level.ATTENTION: "yellow", Level.STOP: "red"}


class Finding(NamedTuple):
    """One line of the preflight: what was looked at, what was found, and what to do about it ("" if nothing)."""

    level: Level
    title: str
    words: str
    todo: str = ""

    def styled(self) -> list[str]:
        """As ``lines``, with the level in its colour."""
        import click

        first, *others = self.lines()
        word = WORDS[self.level]
        return [click.style(word, fg=COLOURS[self.level], bold=True) + first[len(word) :], *others]

    def lines(self) -> list[str]:
        """As text: the level as a word first, so that it reads without colour."""
        indent = " " * 12
        shown = wrapped(f"{WORDS[self.level]:<11} {self.title}: {self.words}", indent)
        return shown + (wrapped(f"{indent}To do: {self.todo}", f"{indent}       ") if self.todo else [])


def spoken(digest: bytes) -> str:
    """A fingerprint as twelve words to compare by phone: the same that the kit's guide shows (``server.pki.words``)."""
    from mnemonic import Mnemonic

    return str(Mnemonic("english").to_mnemonic(digest[:16]))


def ok(title: str, words: str) -> Finding:
    """Nothing is to be done."""
    return Finding(Level.OK, title, words)


def attention(title: str, words: str, todo: str) -> Finding:
    """It works, but ``todo`` would be better."""
    return Finding(Level.ATTENTION, title, words, todo)


def stop(title: str, words: str, todo: str) -> Finding:
    """The site cannot join before ``todo`` is done."""
    return Finding(Level.STOP, title, words, todo)


def before(file: Path, job: Job | None = None, offline: bool = False) -> Iterator[Finding]:
    """All that can be told without reading an image, as it is found.

    Args:
        file: the site.toml.
        offline: do not ask the server.

    Raises:
        UserError: the site.toml itself is wrong.
    """
    from client.preflight_machine import gpu, look_at_gpu, shared_memory
    from client.preflight_rules import key_file, privacy
    from client.preflight_server import server
    from shared.config import read_toml
    from shared.sitefile import read_connection, read_site

    site = read_site(file)
    connection = read_connection(file) if "server" in read_toml(file) else None
    yield privacy(file, connected=connection is not None)
    yield gpu(look_at_gpu(), job.train.device if job else "auto")
    yield shared_memory()
    if connection is None:
        yield attention(
            "server",
            f"site.toml of {site.name} has no [server] table: fit to try a job on this machine, not to join others",
            "take the table [server] from the start-up kit that the coordinator sends",
        )
        return
    yield key_file(connection.key)
    if not offline:
        yield from server(connection)


def after(report: Report, file: Path, job: Job | None) -> Iterator[Finding]:
    """What follows from the images that were read."""
    from client.preflight_machine import disk
    from client.preflight_rules import images
    from shared.sitefile import OWN_FOLDER, read_site

    yield from images(report, file, job)
    site = read_site(file)
    yield disk(site.cache or site.root / OWN_FOLDER / "cache", report.decoded)


def verdict(findings: Iterable[Finding], refused: str = "") -> str:
    """The last line: FIT, or REFUSED with the reason about the images, or what else stops."""
    stops = [finding.title for finding in findings if finding.level is Level.STOP]
    if refused:
        return f"REFUSED: {refused}"
    if stops:
        return f"REFUSED: {', '.join(stops)}; see the lines with STOP above"
    return "FIT to join"

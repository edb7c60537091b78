"""`consilium site log`: what came to a site, ran and left, and whether the log of it is as it was written."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

import click

from client.egress_log import ASKED, HEAD, LEFT, LOG, Entry, Verdict, verify
from shared.errors import CODES, UserError
from shared.sitefile import OWN_FOLDER
from shared.terminal import WIDTH, wrapped

TABLE = 104  # columns of a terminal: with fewer the table's words would break into lines of one or two


@click.command("log")
@click.argument("file", type=Path)
@click.option("--run", help="Only this run.")
@click.option("--last", type=click.IntRange(1), metavar="N", help="Only the last N replies.")
@click.option("--names", is_flag=True, help="List SHA-256, and the names, shapes and kinds of numbers, too.")
@click.option("--verify", "only_verify", is_flag=True, help="Say whether the log is as it was written, and no more.")
@click.option("--follow", is_flag=True, help="Go on showing what comes, runs and leaves, until Ctrl-C.")
def site_log(file: Path, run: str | None, last: int | None, names: bool, only_verify: bool, follow: bool) -> None:
    """Show what came to a site, what ran and what left: when, for which run and round, bytes and epsilon.

    FILE is the site.toml, or the site's folder (in a simulation OUT/sites/NAME). With --verify the exit code is 1 if a
    line was changed, dropped, added or moved, and the line is named.
    """
    home = file if file.is_dir() else file.parent
    path = home / OWN_FOLDER / LOG
    news = _News(home) if follow else None  # before reading, so that nothing falls in between
    try:
        verdict = verify(home)
    except OSError:
        if not news or not home.is_dir():
            raise UserError(
                f"{path}: no such log; nothing has left this site, or its node keeps its files elsewhere: name that "
                "folder"
            ) from None
        verdict = Verdict()
    for remark in verdict.remarks:
        click.echo(f"{path}: {remark}")
    for fault in verdict.faults:
        click.echo(f"BROKEN: {path}: {fault}")
    if only_verify:
        if not verdict.faults:
            end = verdict.entries[-1]["sha256"] if verdict.entries else "–"
            click.echo(f"IN ORDER: {path}\n  {len(verdict.entries)} lines; SHA-256 of the last one:\n  {end}")
            _say(f"Lines missing at the end show only against {HEAD} beside it: keep a copy elsewhere.")
        sys.exit(1 if verdict.faults else 0)
    entries = [_whole(entry) for entry in verdict.entries if entry]
    entries = [entry for entry in entries if run in (None, entry["run"])]
    shown = entries[-last:] if last else entries
    _print(shown)
    _summary(shown, home, whole=len(shown) == len(verdict.entries))
    if names:
        _print_names(shown, [_whole(entry) for entry in verdict.entries if entry])
    if news:
        news.show(run)


# What is shown of a line, and what stands for it in one that somebody made up and that lacks it.
_SHOWN = {"time": "", "run": "", "round": 0, "kind": "unknown", "declined": "", "bytes": 0, "content": ""}


def _whole(entry: Entry) -> Entry:
    """A line with all that ours hold, each of the kind that it has in ours."""
    told = {name: entry[name] if isinstance(entry.get(name), type(other)) else other for name, other in _SHOWN.items()}
    for name in ("epsilon", "seconds"):
        told[name] = entry[name] if isinstance(entry.get(name), int | float) else None
    records = entry.get("records")
    found = records.items() if isinstance(records, dict) else ()
    told["records"] = {
        name: facts for name, facts in found if isinstance(facts, dict) and {"names", "count"} <= set(facts)
    }
    return entry | told


def _print(entries: list[Entry]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    # Where no terminal says how wide it is, as wide as the table wants.
    console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDTH)
    for (run, job), group in groupby(entries, key=lambda entry: (_plain(entry["run"]), _plain(entry.get("job", "")))):
        own, title = list(group), f"run {run}" + (f", job {job}" if job else "")
        if console.width < TABLE:
            click.echo("\n".join([title, *(line for entry in own for line in _in_lines(entry))]))
            continue
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0), title_justify="left")
        table.title = escape(title)
        for head in ("line", "when (UTC)", "round"):
            table.add_column(head, no_wrap=True)
        table.add_column("what came", min_width=10)
        table.add_column("ran for", justify="right", no_wrap=True)
        table.add_column("what left", min_width=10)
        for head in ("bytes", "epsilon"):
            table.add_column(head, justify="right", no_wrap=True)
        for entry in own:
            took, epsilon = _took(entry), _epsilon(entry)
            cells = (str(entry["n"]), _when(entry), str(entry["round"]), _came(entry), took, _left(entry))
            table.add_row(*map(escape, cells), f"{entry['bytes']:,}", epsilon)
        console.print(table)


def _in_lines(entry: Entry) -> list[str]:
    """A reply where the terminal is too narrow for a table: figures, and below them in words what came and left."""
    figures = [f"{entry['n']:>5}", _when(entry), f"round {entry['round']}", f"{entry['bytes']:,} bytes", _took(entry)]
    figures += [f"epsilon {_epsilon(entry)}"] if _epsilon(entry) else []
    words = wrapped(f"       came: {_came(entry)}; left: {_left(entry)}", " " * 9)
    return ["  ".join(figure for figure in figures if figure), *words]


def _took(entry: Entry) -> str:
    return f"{entry['seconds']:.1f} s" if entry.get("seconds") else ""


def _epsilon(entry: Entry) -> str:
    return "" if entry["epsilon"] is None else f"{entry['epsilon']:.3g}"


def _say(text: str) -> None:
    """A sentence as wide as the terminal."""
    for line in wrapped(text, "  "):
        click.echo(line)


def _summary(entries: list[Entry], home: Path, whole: bool) -> None:
    """All of it in a sentence."""
    total = sum(entry["bytes"] for entry in entries)
    declined = sum(bool(entry["declined"]) for entry in entries)
    kinds = Counter(LEFT.get(entry["kind"], _plain(entry["kind"])) for entry in entries if not entry["declined"])
    listed = ", ".join(f"{number} × {kind}" for kind, number in kinds.items())
    rest = ". Nothing else left." if whole else ""
    replies = "1 reply" if len(entries) == 1 else f"{len(entries):,} replies"
    _say(f"{replies}, {total:,} bytes{f': {listed}' if listed else ''}{rest}")
    if declined:
        _say(
            f"{declined} declined: only a code left. Why stands in the site's own log, which may name files and "
            "patients and is for this site alone:"
        )
        click.echo(f"  {home / 'site.log'}")
    click.echo("--names lists what was in them, --verify checks the log, --follow goes on")


def _when(entry: Entry) -> str:
    return _plain(entry["time"]).replace("T", " ").rstrip("Z")


def _came(entry: Entry) -> str:
    """What the server asked for."""
    split = {"val": " on validation images", "test": " on test images"}.get(str(entry.get("split", "")), "")
    return ASKED.get(entry["kind"], _plain(entry["kind"])) + split


def _left(entry: Entry) -> str:
    """What left, or why nothing did."""
    if entry["declined"]:
        code = _plain(entry["declined"])
        return f"nothing but the code {code}: {CODES.get(code, 'unknown code')}"
    return LEFT.get(entry["kind"], _plain(entry["kind"]))


def _plain(text: object) -> str:
    """A word that a server sent, without what a terminal would act on."""
    return "".join(letter for letter in str(text) if letter.isprintable())


class _News:
    """What is appended to a site's two logs from now on: site.log says what came and ran, egress.log what left."""

    def __init__(self, home: Path) -> None:
        self.files = (home / "site.log", home / OWN_FOLDER / LOG)
        self.read = {path: path.stat().st_size if path.exists() else 0 for path in self.files}

    def show(self, run: str | None) -> None:
        """Print new lines as they come, until Ctrl-C."""
        click.echo("following; Ctrl-C ends it")
        while True:
            for path in self.files:
                for line in self._lines(path):
                    if path.name == LOG:
                        self._say(line, run)
                    else:
                        click.echo(_plain(line))
            time.sleep(0.5)

    def _lines(self, path: Path) -> list[str]:
        """The whole lines that a file has grown by; one that was made anew is read from its beginning."""
        try:
            if path.stat().st_size < self.read[path]:
                self.read[path] = 0
            with path.open("rb") as file:
                file.seek(self.read[path])
                whole, _, _ = file.read().rpartition(b"\n")
        except OSError:
            return []
        self.read[path] += len(whole) + 1 if whole else 0
        return whole.decode("utf-8", "replace").splitlines()

    def _say(self, line: str, run: str | None) -> None:
        try:
            entry = json.loads(line)
            if run in (None, entry["run"]):
                where = f"run {_plain(entry['run'])}, round {entry['round']}"
                click.echo(f"{_when(entry)} left: {where}: {_left(entry)}, {entry['bytes']:,} bytes")
        except (ValueError, KeyError, TypeError):
            click.echo(f"BROKEN: a line of {LOG} cannot be read; see --verify")


def _print_names(entries: list[Entry], whole: list[Entry]) -> None:
    """The lists that the entries refer to; a list stands in the first line of a run that needs it."""
    lists: dict[str, list[str]] = {}
    for entry in whole:
        for facts in entry["records"].values():
            if facts.get("list"):  # a line without may come first: another process wrote it
                lists.setdefault(facts["names"], facts["list"])
    for entry in entries:
        click.echo(f"line {entry['n']}: SHA-256 of what left {entry['content']}")
    shown: dict[tuple[str, str], Any] = {}
    for entry in entries:
        for name, facts in entry["records"].items():
            shown.setdefault((name, facts["names"]), (entry["kind"], facts["count"]))
    for (name, digest), (kind, count) in shown.items():
        click.echo(f"\n{kind}, {name} ({count}):")
        for part in lists.get(digest) or ["the list of names is not in the log"]:
            click.echo(f"  {part}")

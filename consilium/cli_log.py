"""`consilium site log`: what left a site, and whether the log of it is as it was written."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from client.egress_log import HEAD, LOG, Entry, verify
from shared.errors import CODES, UserError
from shared.sitefile import OWN_FOLDER

_WORDS = {
    "query": "counts of images",
    "query.survey": "counts and grey values of images",
    "train": "trained model",
    "evaluate": "sums over images",
}


@click.command("log")
@click.argument("file", type=Path)
@click.option("--run", help="Only this run.")
@click.option("--last", type=click.IntRange(1), metavar="N", help="Only the last N replies.")
@click.option("--names", is_flag=True, help="List the names, shapes and kinds of numbers, too.")
@click.option("--verify", "only_verify", is_flag=True, help="Say whether the log is as it was written, and no more.")
def site_log(file: Path, run: str | None, last: int | None, names: bool, only_verify: bool) -> None:
    """Show what left a site: when, for which run and round, what, how many bytes, and epsilon.

    FILE is the site.toml, or the site's folder (in a simulation OUT/sites/NAME). With --verify the exit code is 1 if a
    line was changed, dropped or moved, and the line is named.
    """
    home = file if file.is_dir() else file.parent
    path = home / OWN_FOLDER / LOG
    try:
        verdict = verify(home)
    except OSError:
        raise UserError(
            f"{path}: no such log; nothing has left this site, or its node keeps its files elsewhere: name that folder"
        ) from None
    for remark in verdict.remarks:
        click.echo(f"{path}: {remark}")
    for fault in verdict.faults:
        click.echo(f"BROKEN: {path}: {fault}")
    if only_verify:
        if not verdict.faults:
            end = verdict.entries[-1]["sha256"] if verdict.entries else "–"
            click.echo(f"IN ORDER: {path}: {len(verdict.entries)} lines, the last one's SHA-256 is {end}")
            click.echo(f"Lines missing at the end show only against {HEAD} beside it: keep a copy elsewhere.")
        sys.exit(1 if verdict.faults else 0)
    entries = [entry for entry in verdict.entries if entry and (run is None or entry["run"] == run)]
    _print(entries[-last:] if last else entries)
    if names:
        _print_names(entries[-last:] if last else entries, verdict.entries)


def _print(entries: list[Entry]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("line", "when (UTC)", "run", "round"):
        table.add_column(head, no_wrap=True)
    table.add_column("what left", min_width=22)
    for head in ("bytes", "SHA-256", "epsilon"):
        table.add_column(head, justify="right", no_wrap=True)
    for entry in entries:
        epsilon = "" if entry["epsilon"] is None else f"{entry['epsilon']:.3g}"
        when = str(entry["time"]).replace("T", " ").rstrip("Z")
        cells = (str(entry["n"]), when, str(entry["run"]), str(entry["round"]), _what(entry))
        table.add_row(*map(escape, cells), f"{entry['bytes']:,}", escape(str(entry["content"])[:8]), epsilon)
    console = Console()
    console.print(table)
    total = sum(entry["bytes"] for entry in entries)
    console.print(
        f"{len(entries)} replies, {total:,} bytes; --names lists what was in them, --verify checks the log",
        highlight=False,
    )


def _what(entry: Entry) -> str:
    """A line in words."""
    if entry["declined"]:
        code = str(entry["declined"])
        return f"nothing but the code {code}: {CODES.get(code, 'unknown code')}"
    return _WORDS.get(entry["kind"], str(entry["kind"]))


def _print_names(entries: list[Entry], whole: list[Entry]) -> None:
    """The lists that the entries refer to; a list stands in the first line of a run that needs it."""
    lists: dict[str, list[str]] = {}
    for entry in whole:
        for facts in entry.get("records", {}).values():
            lists.setdefault(facts["names"], facts.get("list", []))
    shown: dict[tuple[str, str], Any] = {}
    for entry in entries:
        for name, facts in entry["records"].items():
            shown.setdefault((name, facts["names"]), (entry["kind"], facts["count"]))
    for (name, digest), (kind, count) in shown.items():
        click.echo(f"\n{kind}, {name} ({count}):")
        for part in lists.get(digest) or ["the list of names is not in the log"]:
            click.echo(f"  {part}")

"""`consilium runs`: what the store holds, and bringing run folders into it."""

from __future__ import annotations

import time
from pathlib import Path

import click

from shared.errors import UserError

STORE_HELP = (
    "Database of the runs: the path of an SQLite file, or postgresql://USER@HOST/NAME.  "
    "[default: consilium.sqlite beside the run folder]"
)


@click.group()
def runs() -> None:
    """The runs there are: list them, or bring those of run folders into the store."""


@runs.command("list")
@click.argument("folder", type=Path, required=False)
@click.option("--store", default="", envvar="CONSILIUM_STORE", help=STORE_HELP)
@click.option("--sort", default="-started", help="A column to sort by, with - from the largest.  [default: -started]")
@click.option("--search", default="", help="Only runs whose name or folder contains this.")
@click.option("--limit", type=click.IntRange(1), default=50, help="At most so many.  [default: 50]")
@click.option("--all", "everything", is_flag=True, help="Baselines and reference networks too.")
def runs_list(folder: Path | None, store: str, sort: str, search: str, limit: int, everything: bool) -> None:
    """List the runs in FOLDER: that of the run folders, a run folder, or that of a federation.  [default: runs; with
    --store, what the store holds]"""
    from server.database.engine import open_database
    from server.database.going import states
    from server.database.mirror import bring_in, open_store
    from server.database.read import runs as listed

    if folder is None and store:
        db = open_database(store, create=False)
    else:
        folder = folder or Path("runs")
        db = open_store(folder, store)
        try:
            bring_in(db, folder)
        except UserError as error:
            click.echo(f"consilium: {error}; what was in it before:", err=True)
    kinds = ["federated", *(["pooled", "local", "reference"] if everything else [])]
    rows, total = listed(db, limit=limit, sort=sort, filter={"kind": kinds, "search": search}, states=states(db))
    for row in rows:
        best = (
            ""
            if row["best_value"] is None
            else f", best {row['metric']} {row['best_value']:.3f} in {row['best_round']}"
        )
        test = "" if row["test_value"] is None else f", test {row['test_value']:.3f}"
        begun = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["started"]))
        state = f"{row['status']} {row['done']}/{row['rounds']} rounds, {row['sites']} sites{best}{test}"
        more = f", {row['warnings']} warnings" if row["warnings"] else ""
        click.echo(f"{begun}  {row['path'] or '(folder is gone)'}  {row['name']}: {state}{more}")
    if total > len(rows):
        click.echo(f"{total - len(rows)} more; --limit shows them")
    if not total:
        click.echo("no run")


@runs.command("import")
@click.argument("folder", type=Path)
@click.option("--store", default="", envvar="CONSILIUM_STORE", help=STORE_HELP)
def runs_import(folder: Path, store: str) -> None:
    """Bring FOLDER, a run folder or a folder of run folders, into the store, or up to date there.

    A store that was lost is made anew by this from the journals, rounds.jsonl, in the run folders.
    """
    from server.database.mirror import bring_in, open_store

    news, wrong = bring_in(open_store(folder, store), folder)
    for path in news:
        click.echo(f"brought up to date: {path}")
    for text in wrong:
        click.echo(f"left out: {text}", err=True)
    if not news:
        click.echo("nothing new")

"""`consilium dashboard`: watch runs and sites in a browser."""

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.command()
@click.option("--store", help="The store: a path, or postgresql://…  [default: that of the federation, or as below]")
@click.option("--federation", type=Path, help="Folder that `consilium provision` set up: who is connected; stop runs.")
@click.option("--registry", type=Path, help="Folder of releases, to compare a run's model with the release before it.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8600, show_default=True, type=click.IntRange(0, 65535), help="0: any that is free.")
@click.option("--token-file", type=Path, help="File with the token to sign in.  [default: a new one each time]")
@click.option("--public-url", default="", help="How browsers reach it through a proxy, as https://fl.example.org.")
@click.option("--trust-header", default="", help="Header in which a proxy names who signed in, as X-Forwarded-User.")
def dashboard(
    store: str | None,
    federation: Path | None,
    registry: Path | None,
    host: str,
    port: int,
    token_file: Path | None,
    public_url: str,
    trust_header: str,
) -> None:
    """Serve the dashboard of a store; prints the address to open, once, with its token.

    Without --store it shows consilium.sqlite of this folder, of runs/ or of demo/. Only this machine reaches it unless
    --host says otherwise. It needs no network, and changes nothing but, with --federation, that it can stop a run.
    """
    from server.dashboard.serve import access_for, serve

    access = access_for(host, token_file, public_url, trust_header)
    serve(store or _usual(federation), access, host, port, federation, _say, registry)


def _usual(federation: Path | None) -> Path:
    """The store that is meant where none is named."""
    from server.database.engine import STORE
    from server.federation import Folder
    from shared.errors import UserError

    if federation is not None:
        Folder(federation).read()  # a name that is misspelt is no store that is missing
        store = federation / "runs" / STORE
        if not store.is_file():
            raise UserError(f"{federation}: no run yet; `consilium run JOB.toml --federation {federation}` begins one")
        return store
    places = [Path(STORE), Path("runs") / STORE, Path("demo") / STORE]
    for path in places:
        if path.is_file():
            return path
    raise UserError(f"no store in {', '.join(map(str, places))}: name one with --store")


def _say(text: str) -> None:
    click.echo(text)
    sys.stdout.flush()

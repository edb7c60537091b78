"""`consilium provision`, and a site's key: `consilium site keygen`, `consilium site fingerprint`."""

from __future__ import annotations

from pathlib import Path

import click

from shared.terminal import wrapped


@click.command()
@click.argument("federation", type=Path, required=False, metavar="[FEDERATION.toml]")
@click.option("--out", type=Path, required=True, help="The coordinator's folder: made, or brought up to date.")
@click.option("--revoke", metavar="SITE", help="Take this site's key out of use, at once and for good; nothing else.")
@click.option(
    "--reinstate", multiple=True, metavar="SITE", help="Let a revoked site back in, with a new key; repeatable."
)
def provision(federation: Path | None, out: Path, revoke: str | None, reinstate: tuple[str, ...]) -> None:
    """Make what a federation needs: authority, server certificate, a start-up kit for each hospital.

    Running it again adds new sites, renews the server's certificate when less than 60 days are left, and leaves the
    rest as it is. Without FEDERATION.toml it takes the file that was used last.

    \b
    consilium provision federation.toml --out DIR
    consilium provision --out DIR                       renew what expires soon
    consilium provision --out DIR --revoke hospital-b
    """
    from server import provision as work

    if revoke and (federation or reinstate):
        raise click.UsageError("--revoke stands alone: consilium provision --out DIR --revoke SITE")
    lines = work.revoke(out, revoke) if revoke else work.provision(federation, out, reinstate)
    for line in lines:
        _say(line)


@click.command("keygen")
@click.option("--out", type=Path, default=Path("node.key"), show_default=True, help="Where the private key goes.")
@click.option("--name", default="consilium", help="The site's name, as a comment in the public key.")
def site_keygen(out: Path, name: str) -> None:
    """Make this site's key pair here, so that the private half never travels.

    Writes node.key (0600, for this machine alone) and node.pub, which goes to the coordinator.
    """
    from server import pki
    from shared.errors import UserError

    pub = out.with_suffix(".pub")
    if out.suffix == ".pub":
        raise UserError(f"--out {out}: names the private key; the public one gets the ending .pub by itself")
    if len(name.split()) != 1 or not name.isprintable():
        raise UserError(f"--name {name!r}: must be one word")
    for path in (out, pub):
        if path.exists():
            raise UserError(f"{path}: is there already; a new key would lock this site out. Move it away first")
    private = pki.make_node_key()
    line = pki.public_line(pki.parse_private_key(private), name)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        pki.write_file(out, private, 0o600)
        pki.write_file(pub, line.encode())
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror}") from None
    click.echo(f"{out}: the private key; it stays on this machine")
    click.echo(f"{pub}: the public key; send this file to the coordinator")
    _tell(pki.key_digest(line), pki.ssh_form(pki.key_digest(line)))


@click.command("fingerprint")
@click.argument("files", type=Path, nargs=-1, required=True)
def site_fingerprint(files: tuple[Path, ...]) -> None:
    """Show the fingerprints of certificates and keys, in words to compare by phone.

    consilium site fingerprint ca.crt node.key
    """
    from server import pki

    told = [(path, *pki.fingerprint(path)) for path in files]
    for path, digest, usual in told:
        click.echo(path)
        _tell(digest, usual)


def _tell(digest: bytes, usual: str) -> None:
    from server import pki

    for line in (*pki.words_lines(digest), f"  {usual}"):
        click.echo(line)


def _say(line: str) -> None:
    """A line as wide as the terminal, what follows from it further in."""
    for part in wrapped(line, "    "):
        click.echo(part)

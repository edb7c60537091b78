"""`consilium provision`: makes and keeps the coordinator's folder: authority, certificates, sites' keys, kits.

Running it again adds what is new, renews what expires soon and leaves the rest as it is, to the byte. `consilium server
start` follows DIR/sites: a site whose public key lies there may connect, no other.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from cryptography.x509 import Certificate

from server import gateway, kits, pki
from server.federation import PORT, Federation, Folder, SiteEntry, read_federation
from shared.config import nearest
from shared.errors import UserError

UNIT_FOLDER = "/srv/consilium"  # where the systemd unit as it is shipped expects the coordinator's folder
STAMP = "%Y%m%dT%H%M%SZ"


def provision(file: Path | None, out: Path, reinstate: Sequence[str] = (), now: datetime | None = None) -> list[str]:
    """Bring the folder ``out`` in line with a federation.toml; returns what was done, a line each.

    Args:
        file: federation.toml; None is the one that was last provisioned there.
        reinstate: revoked sites that may come back, each with a new key.
        now: taken for the time (UTC).

    Raises:
        UserError: the file is wrong, the folder is another federation's, or a key is not to be had.
    """
    folder, now = Folder(Path(out)), now or datetime.now(UTC)
    federation = read_federation(file) if file else folder.read()
    _check(federation, folder, file, reinstate)
    with _locked(folder):
        lines = [_authority(federation, folder, now)]
        _keep_out_of_git(folder)
        lines.append(_server_certificate(federation, folder, now))
        lines += _server_files(federation, folder)
        for site in federation.sites:
            lines.append(f"{site.name}: {_site(federation, folder, site, site.name in reinstate, now)}")
        for name in sorted({*folder.site_names()} - {site.name for site in federation.sites}):
            lines.append(
                f"{name}: NOT in the federation's file, but may still connect; to end that: "
                f"consilium provision --out {out} --revoke {name}"
            )
        if file:
            _put(folder.federation, Path(file).read_bytes())
    return [part for line in lines for part in line.split("\n")]


def revoke(out: Path, site: str, now: datetime | None = None) -> list[str]:
    """Take a site's key and kit out of use: a running server stops admitting it within seconds.

    Raises:
        UserError: no such site.
    """
    folder, now = Folder(Path(out)), now or datetime.now(UTC)
    known = folder.site_names()  # nothing else is read: revoking must work whatever else is broken
    if site not in known:
        if since := _revoked_at(folder, site):
            return [f"{site}: was revoked before, on {since}"]
        raise UserError(f"--revoke {site}: no such site{nearest(site, known)}; there are: {', '.join(known) or 'none'}")
    with _locked(folder):
        _move_away(folder, site, now)
        kit = folder.kit(site).exists()
        folder.kit(site).unlink(missing_ok=True)
    return [f"{site}: revoked{', its kit deleted' if kit else ''}; a running server stops admitting it within seconds"]


def _check(federation: Federation, folder: Folder, file: Path | None, reinstate: Sequence[str]) -> None:
    """Refuse before anything is written."""
    out = folder.path
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; name a folder")
    ours = folder.federation.exists() or folder.ca_cert.parent.is_dir()
    if out.is_dir() and any(out.iterdir()) and not ours:
        raise UserError(f"--out {out}: holds files that are no federation of ours; name a new folder")
    if folder.ca_cert.exists():
        name = pki.common_name(pki.read_certificate(folder.ca_cert))
        if name != federation.name:
            raise UserError(f"--out {out}: holds the federation {name}, {file} is about {federation.name}")
    names = [site.name for site in federation.sites]
    for name in reinstate:
        if name not in names:
            raise UserError(f"--reinstate {name}: is not in the federation's file{nearest(name, names)}")
        if not _revoked_at(folder, name) or folder.node_pub(name).exists():
            raise UserError(f"--reinstate {name}: is not revoked")
    keys = {pki.read_node_pub(folder.node_pub(name)): name for name in folder.site_names()}
    for site in federation.sites:
        key = _given_key(folder, site)
        if key is None:
            continue
        if keys.setdefault(key, site.name) != site.name:
            raise UserError(
                f"sites.{site.name}.key: is the key of {keys[key]}; each site, also a renamed one, has its own"
            )
        _refuse_revoked(folder, site.name, key)


def _given_key(folder: Folder, site: SiteEntry) -> str | None:
    """The public key that the site made itself; None where the coordinator makes it."""
    if site.key is None:
        return None
    if not site.key.exists() and folder.node_pub(site.name).exists():
        return pki.read_node_pub(folder.node_pub(site.name))  # the copy of federation.toml lies elsewhere than its keys
    return pki.read_node_pub(site.key)


def _refuse_revoked(folder: Folder, site: str, key: str) -> None:
    for path in sorted(folder.revoked.glob("*/node.pub")):
        if pki.read_node_pub(path) == key:
            raise UserError(
                f"sites.{site}.key: this key was revoked ({path.parent.name}) and cannot come back; the site makes a "
                "new one with `consilium site keygen`"
            )


def _authority(federation: Federation, folder: Folder, now: datetime) -> str:
    """Make the authority, or check that it is whole."""
    if not folder.ca_cert.exists():
        if folder.server_cert.exists() or folder.site_names():
            raise UserError(
                f"{folder.ca_cert} is gone: put it back from your backup; a new authority would lock out every site"
            )
        certificate, key = pki.make_ca(federation.name, now)
        _put(folder.ca_key, key, 0o600)
        _put(folder.ca_cert, certificate)
        done = "made"
    else:
        done = "kept"
    ca = pki.read_certificate(folder.ca_cert)
    left = pki.days_left(ca, now)
    if left <= 0:
        raise UserError(f"{folder.ca_cert}: expired {ca.not_valid_after_utc:%Y-%m-%d}; provision into a new folder")
    late = "; sites need a new federation before then" if left < pki.SERVER_DAYS else ""
    told = f"authority: {done}, valid until {ca.not_valid_after_utc:%Y-%m-%d}{late}"
    return "\n".join([told, *pki.words_lines(pki.certificate_digest(ca))])


def _keep_out_of_git(folder: Folder) -> None:
    """The folder has private keys: where it lies in somebody's repository, git leaves it alone."""
    if not (ignore := folder.path / ".gitignore").exists():
        _put(ignore, b"*\n")


def _server_certificate(federation: Federation, folder: Folder, now: datetime) -> str:
    hosts = list(dict.fromkeys([federation.host, *federation.also, "localhost", "127.0.0.1"]))
    ca = pki.read_certificate(folder.ca_cert)
    why = _why_new(folder, hosts, ca, now)
    if why:
        if not folder.ca_key.exists():
            raise UserError(
                f"the server's certificate must be made anew ({why}), but {folder.ca_key} is not there: put it back "
                "for this command"
            )
        ca_key = pki.read_private_key(folder.ca_key)
        if not pki.belong_together(ca, ca_key):
            raise UserError(f"{folder.ca_key} is not the key of {folder.ca_cert}: put the right one back")
        certificate, key = pki.make_server_certificate(federation.name, hosts, ca, ca_key, now)
        _put(folder.server_key, key, 0o600)
        _put(folder.server_cert, certificate)
    server = pki.read_certificate(folder.server_cert)
    return (
        f"server certificate: {f'made ({why})' if why else 'kept'}, valid until {server.not_valid_after_utc:%Y-%m-%d} "
        f"({round(pki.days_left(server, now))} days), for {', '.join(hosts)}"
    )


def _why_new(folder: Folder, hosts: Sequence[str], ca: Certificate, now: datetime) -> str:
    """Why the server needs another certificate; empty if it does not."""
    if not folder.server_cert.exists() or not folder.server_key.exists():
        return "there was none"
    try:
        certificate, key = pki.read_certificate(folder.server_cert), pki.read_private_key(folder.server_key)
    except UserError:
        return "it was damaged"
    if not pki.belong_together(certificate, key):
        return "certificate and key did not belong together"
    if not pki.issued_by(certificate, ca):
        return "another authority had signed it"
    if not pki.is_for(certificate, hosts):
        return "the server's names changed"
    left = pki.days_left(certificate, now)
    if left < min(pki.RENEW_DAYS, pki.days_left(ca, now)):
        return f"{left:.0f} days were left" if left > 0 else "it had expired"
    return ""


def _server_files(federation: Federation, folder: Folder) -> list[str]:
    """What `consilium server start`, systemd and compose read."""
    where = str(folder.path.resolve())
    if not re.fullmatch(r"[A-Za-z0-9/._+@-]+", where):
        where = UNIT_FOLDER  # a path that systemd would have to be told in its own spelling
    texts = {
        folder.nginx_conf: gateway.configuration(federation),
        folder.unit: kits.template("server", "consilium-server.service").replace(UNIT_FOLDER, where),
        folder.compose: kits.template("server", "compose.yml").replace(
            f'"{PORT}:{PORT}"', f'"{federation.port}:{federation.port}"'
        ),
    }
    written = [path.name for path, text in texts.items() if _put(path, text.encode())]
    if not folder.superexec_secret.exists():
        _put(folder.superexec_secret, secrets.token_hex(32).encode(), 0o600)
        written.append(folder.superexec_secret.name)
    return [f"server: {', '.join(written) + ' written' if written else 'files kept'}"]


def _site(federation: Federation, folder: Folder, site: SiteEntry, reinstate: bool, now: datetime) -> str:
    """Bring one site's key and kit in line; returns what was done."""
    pub, kit = folder.node_pub(site.name), folder.kit(site.name)
    since = _revoked_at(folder, site.name)
    if since and not pub.exists() and not reinstate:
        return f"revoked on {since}, stays out; with a new key it comes back by --reinstate {site.name}"
    old = pki.read_node_pub(pub) if pub.exists() else None
    private = kits.private_key_of(kit) if site.key is None else None
    if site.key is not None:
        public = _given_key(folder, site) or ""
    elif old is None:
        private = private if private and not since else pki.make_node_key()
        public = _public(private)
    else:
        public = old
        if private is not None and _public(private) != old:
            private = None
    done = "kept" if public == old else "new" if old is None else "key replaced, the old one no longer counts"
    if old is not None and public != old:
        _move_away(folder, site.name, now)
    changed = False
    if kit.exists() or site.key is not None or old is None:
        packed = kits.pack(kits.contents(federation, site, folder.ca_cert.read_bytes(), public, private))
        changed = _put(kit, packed, 0o600)  # before the key counts: it may be the only copy of the private half
    _put(pub, f"{public} {site.name}\n".encode())
    if not kit.exists():
        return f"{done}; its kit was handed over and deleted, and is not made again (its key was only there)"
    lines = [f"{done}; kit {'written' if changed else 'kept'}", f"  {kit}"]
    if private and changed:
        lines.append("  it holds the site's private key: hand it over safely, then delete it here")
    elif private:
        lines.append("  it still holds the site's private key: once it is handed over, delete it here")
    return "\n".join([*lines, *pki.words_lines(pki.key_digest(public))])


def _public(private: bytes) -> str:
    return " ".join(pki.public_line(pki.parse_private_key(private), "-").split()[:2])


def _revoked_at(folder: Folder, site: str) -> str:
    """The day a site was last revoked, or nothing."""
    pattern = re.compile(re.escape(site) + r"-(\d{4})(\d\d)(\d\d)T\d{6}Z(\.\d+)?")
    paths = folder.revoked.iterdir() if folder.revoked.is_dir() else ()
    found = sorted(match.groups()[:3] for path in paths if (match := pattern.fullmatch(path.name)))
    return "-".join(found[-1]) if found else ""


def _move_away(folder: Folder, site: str, now: datetime) -> None:
    folder.revoked.mkdir(exist_ok=True)
    name, number = f"{site}-{now.astimezone(UTC).strftime(STAMP)}", 0
    target = folder.revoked / name
    while target.exists():
        number += 1
        target = folder.revoked / f"{name}.{number}"
    os.rename(folder.sites / site, target)


def _put(path: Path, content: bytes, mode: int = 0o644) -> bool:
    """Write a file unless it is so already; whether it was written."""
    if path.exists() and path.read_bytes() == content:
        if path.stat().st_mode & 0o777 != mode:
            path.chmod(mode)
        return False
    try:
        private = path.parent.name in ("ca", "kits")
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700 if private else 0o755)
        pki.write_file(path, content, mode)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    return True


@contextlib.contextmanager
def _locked(folder: Folder) -> Iterator[None]:
    """Only one at a time works on a folder."""
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder.path, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"--out {folder.path}: cannot write there: {error.strerror}") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out {folder.path}: another `consilium provision` is at work there") from None
        yield
    finally:
        os.close(handle)

"""A site's start-up kit: one zip with all it needs to join, equal to the byte for equal content.

Where the coordinator made the site's key, the kit is the only place it lies: DIR keeps the public half alone.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from cryptography import x509

from server import pki
from server.federation import Federation, SiteEntry

VERBATIM = ("compose.yml", "compose.gpu.yml", "consilium-site.service")
KEY = "node.key"


def template(*parts: str) -> str:
    """A file of server/kit."""
    return files("server").joinpath("kit", *parts).read_text(encoding="utf-8")


def contents(
    federation: Federation, site: SiteEntry, ca: bytes, public: str, private: bytes | None
) -> dict[str, bytes]:
    """The files of a site's kit by name.

    Args:
        ca: the authority's certificate, PEM.
        public: the site's public key, OpenSSH.
        private: its private half, where the coordinator made it.
    """
    texts = {name: template("site", name) for name in VERBATIM}
    texts["site.toml"] = Template(template("site", "site.toml")).substitute(site=site.name, address=federation.address)
    texts["guide.html"] = _guide(federation, site, x509.load_pem_x509_certificate(ca), public, private is not None)
    kit = {name: text.encode() for name, text in texts.items()} | {"ca.crt": ca}
    return kit | ({KEY: private} if private is not None else {})


def _guide(federation: Federation, site: SiteEntry, ca: x509.Certificate, public: str, made_here: bool) -> str:
    ca_digest, key_digest = pki.certificate_digest(ca), pki.key_digest(public)
    story = (
        "who you are: secret, for this machine alone; the coordinator made it and was asked to delete this kit"
        if made_here
        else "not in this kit: you made it with consilium site keygen and it never left your machine; put it beside "
        "site.toml"
    )
    facts = {
        "site": site.name,
        "federation": federation.name,
        "contact": site.contact or "none",
        "address": federation.address,
        "ca_words": pki.words(ca_digest),
        "ca_hex": pki.hexadecimal(ca_digest),
        "ca_until": f"{ca.not_valid_after_utc:%d %B %Y}",
        "key_words": pki.words(key_digest),
        "key_ssh": pki.ssh_form(key_digest),
        "key_story": story,
    }
    return Template(template("site", "guide.html")).substitute({name: escape(fact) for name, fact in facts.items()})


def pack(kit: Mapping[str, bytes]) -> bytes:
    """A zip of the files, with a fixed date; the private key unpacks with mode 0600, the rest with 0644."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(kit):
            entry = zipfile.ZipInfo(name)
            entry.create_system = 3  # Unix: the upper half of external_attr is the mode
            entry.external_attr = (0o100600 if name == KEY else 0o100644) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, kit[name])
    return buffer.getvalue()


def private_key_of(kit: Path) -> bytes | None:
    """The private key in a kit; None if there is no kit, or none in it."""
    try:
        with zipfile.ZipFile(kit) as archive:
            return archive.read(KEY)
    except (OSError, KeyError, zipfile.BadZipFile):
        return None

"""What the preflight makes of a server's answer: its authority and certificate, its clock, its versions."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import NameOID

from client.preflight import Finding, attention, ok, spoken, stop
from shared import __version__

TITLE = "server"
SOON = timedelta(days=30)  # a certificate that ends within it is worth a word
# Flower signs the time with every message; the server takes signatures from 305 s ago up to 5 s in the future.
BEHIND, BEHIND_STOP = 60.0, 240.0
AHEAD, AHEAD_STOP = 2.0, 4.0


@dataclass(frozen=True)
class Answer:
    """What came back: the HTTP status, what the gateway says of itself, its certificate, and the times.

    ``sent`` and ``received`` are this machine's, ``date`` the server's or None, all in seconds since 1970.
    """

    status: int
    certificate: x509.Certificate | None
    date: float | None
    sent: float
    received: float
    location: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


def _read_authorities(path: Path) -> list[x509.Certificate] | None:
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())
    except (OSError, ValueError):
        return None


def authority(path: Path) -> Finding:
    """The file of the authority that this site trusts, with the fingerprint to compare by phone."""
    title, todo = "authority", "take ca.crt from the start-up kit once more"
    found = _read_authorities(path)
    if found is None:
        there = "is not a certificate in PEM form" if path.is_file() else "no such file, or it cannot be read"
        return stop(title, f"{path}: {there}", todo)
    first = found[0]
    try:
        is_authority = first.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, ValueError):
        is_authority = False
    digest = first.fingerprint(hashes.SHA256())
    name = plain(common_name(first.subject))
    halves = " ".join(part.hex(":").upper() for part in (digest[:16], digest[16:]))  # one word would leave the screen
    words = f"{path} is {name}, fingerprint “{spoken(digest)}” (SHA-256 {halves})"
    if not is_authority:
        return attention(title, f"{words}; it says nothing of being an authority", todo)
    left = first.not_valid_after_utc - datetime.now(UTC)
    if left < timedelta(0):
        return stop(title, f"{words}; it has expired", "tell the coordinator: every site needs a new ca.crt")
    if left < SOON:
        return attention(
            title, f"{words}; it ends in {left.days} days", "tell the coordinator: every site needs a new one"
        )
    return ok(title, f"{words}; valid for {left.days} days")


def answered(answer: Answer, address: str, proxy: str) -> Finding:
    """Whether what answers is the gateway of a federation."""
    through = f" through the proxy {plain(proxy)}" if proxy else ""
    if answer.facts:
        return ok(
            TITLE,
            f"{address} answers{through} in {answer.received - answer.sent:.2f} s for the federation "
            f"{plain(answer.facts['federation'])}",
        )
    if 300 <= answer.status < 400:
        return stop(
            TITLE,
            f"{address} sends on to {plain(answer.location)}{through}: no server of a federation does that",
            "it looks like a log-in page of your network: ask IT to let this machine reach the server directly",
        )
    if answer.status in (502, 503, 504):
        return stop(
            TITLE,
            f"{address} is reached{through}, but what stands behind it does not run (HTTP {answer.status})",
            "nothing is wrong here; tell the coordinator, and check again later",
        )
    if answer.status in (401, 403, 429):
        return stop(
            TITLE,
            f"{address} is reached{through}, but turns this machine away (HTTP {answer.status})",
            "wait a minute and check again; if it stays so, tell the coordinator from which address you come",
        )
    return stop(
        TITLE,
        f"{address} answers{through}, but not as a Consilium server does (HTTP {answer.status})",
        "compare [server] address with the kit; if it is right, tell the coordinator, whose version may be older",
    )


def certificate(found: x509.Certificate) -> Finding:
    """For how long a certificate, which is trusted, is still valid."""
    title, end = "server's certificate", found.not_valid_after_utc
    left = end - datetime.now(UTC)
    words = f"is the authority's, for {', '.join(map(plain, names_of(found)))}, until {end:%Y-%m-%d %H:%M} UTC"
    if left < SOON:
        return attention(
            title,
            f"{words}: {left.days} more days",
            "tell the coordinator, who renews it with `consilium provision`; nothing changes at this site",
        )
    return ok(title, f"{words}: {left.days} more days")


def clock(date: float, sent: float, received: float) -> Finding:
    """How far this machine's clock is from the server's, which told whole seconds some time between two own times.

    Args:
        date: what the server said, in seconds since 1970; its own time was up to a second later.
    """
    title = "clock"
    ahead = sent - (date + 1)  # at least so much
    behind = date - received
    off = max(ahead, behind)
    if off <= min(AHEAD, BEHIND):
        return ok(title, f"agrees with the server's to {max(received - date, date + 1 - sent, 1):.0f} s")
    way = "ahead of" if ahead > behind else "behind"
    words = f"this machine's is {off:.0f} s {way} the server's"
    todo = "set this machine's clock by the network (timedatectl set-ntp true), or ask IT for a time server"
    limit, most = (AHEAD, AHEAD_STOP) if ahead > behind else (BEHIND, BEHIND_STOP)
    if off >= most:
        reach = "5 s in the future" if ahead > behind else "five minutes in the past"
        return stop(title, f"{words}; messages of {reach} are refused", todo)
    if off >= limit:
        return attention(title, words, todo)
    return ok(title, words)


def versions(facts: dict[str, Any]) -> Finding:
    """Whether server and site run the same program, and the same major and minor version of Flower."""
    title, flower = "versions", version("flwr")
    theirs, their_flower = plain(facts["version"]), plain(facts["flwr"])
    if theirs != __version__:
        return stop(
            title,
            f"the server runs consilium {theirs}, this site {__version__}",
            f"install consilium {theirs} here, or tell the coordinator that this site has {__version__}",
        )
    if their_flower.split(".")[:2] != flower.split(".")[:2]:
        wanted = ".".join(their_flower.split(".")[:2])
        return stop(
            title,
            f"the server runs flwr {their_flower}, this site {flower}",
            f"install flwr {wanted} here (pip install 'flwr=={wanted}.*'), or tell the coordinator",
        )
    return ok(title, f"consilium {theirs} on both sides; flwr {flower} here, {their_flower} there")


def names_of(found: x509.Certificate) -> list[str]:
    """The host names and addresses that a certificate is for."""
    try:
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return []
    return [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]


def common_name(name: x509.Name) -> str:
    """What a certificate calls its owner or its signer."""
    common = name.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(common[0].value) if common else name.rfc4514_string()


def plain(text: object) -> str:
    """A word of a machine that may not be the one it should be: short, and nothing that a terminal acts on."""
    return "".join(letter for letter in str(text) if letter.isprintable())[:100]

"""The network part of the preflight: the server's name, the way to it, its certificate, its clock, its versions.

One ``GET https://address/consilium`` by httpx, the library with which Flower's node speaks to the server: so it takes
the same proxy and trusts the same authority. Only if that handshake fails a second one, without trust, fetches the
certificate to say what is wrong with it; nothing is asked over it.
"""

from __future__ import annotations

import errno
import ipaddress
import json
import socket
import ssl
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx
from cryptography import x509

from client.preflight import Finding, Level, stop
from client.preflight_answer import (
    TITLE,
    Answer,
    answered,
    authority,
    certificate,
    clock,
    common_name,
    names_of,
    plain,
    versions,
)
from shared.sitefile import Connection

PATIENCE = 10.0  # seconds for each step of the connection
MOST = 64 * 1024  # bytes read of the answer

_EXPIRED, _NOT_YET = 10, 9  # X509_V_ERR_… of OpenSSL
_WRONG_NAME = (62, 64)


def server(connection: Connection) -> Iterator[Finding]:
    """All findings about the server; the first that stops is the last."""
    trusted = authority(connection.ca)
    yield trusted
    if trusted.level is Level.STOP:
        return
    host, port = split_address(connection.address)
    if port > 65535:
        yield stop(TITLE, f"{connection.address}: a port is at most 65535", "compare [server] address with the kit")
        return
    try:
        answer = ask(connection)
    except (httpx.HTTPError, OSError) as error:
        yield explain(error, host, port, connection.ca)
        return
    yield answered(answer, connection.address, proxy_for(host))
    if answer.certificate is not None:
        yield certificate(answer.certificate)
    if answer.date is not None:
        yield clock(answer.date, answer.sent, answer.received)
    if answer.facts:
        yield versions(answer.facts)


def split_address(address: str) -> tuple[str, int]:
    """Host and port of host:port, the brackets around an IPv6 address taken off."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


# --- asking -----------------------------------------------------------------------------------------------------------


def ask(connection: Connection) -> Answer:
    """Ask the gateway who it is.

    Raises:
        httpx.HTTPError, OSError: no answer over a connection that can be trusted.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # as Flower's node makes it
    context.load_verify_locations(cafile=connection.ca)
    with httpx.Client(verify=context, timeout=PATIENCE, headers={"user-agent": "consilium"}) as client:
        sent = datetime.now(UTC).timestamp()
        with client.stream("GET", f"https://{connection.address}/consilium") as response:
            received = datetime.now(UTC).timestamp()
            tls = response.extensions["network_stream"].get_extra_info("ssl_object")
            der = tls.getpeercert(True) if tls else None
            body = b""
            for piece in response.iter_raw():
                body += piece
                if len(body) > MOST:
                    break
    return Answer(
        response.status_code,
        x509.load_der_x509_certificate(der) if der else None,
        _seconds(response.headers.get("date", "")),
        sent,
        received,
        response.headers.get("location", ""),
        _facts(body) if response.status_code == 200 else {},
    )


def _seconds(date: str) -> float | None:
    try:
        return parsedate_to_datetime(date).timestamp()
    except (ValueError, TypeError):
        return None


def _facts(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except ValueError:
        return {}
    wanted = ("federation", "version", "flwr")
    return found if isinstance(found, dict) and all(isinstance(found.get(name), str) for name in wanted) else {}


def proxy_for(host: str) -> str:
    """The proxy that httpx, and so Flower's node, takes for this host, by the environment; "" if none.

    NO_PROXY holds names, of which parts before them are covered too, and single addresses; ranges such as 10.0.0.0/8
    are not understood.
    """
    found = urllib.request.getproxies()
    proxy = found.get("https") or found.get("all") or ""
    for word in found.get("no", "").lower().split(","):
        word = word.strip()
        if word == "*" or (word and (host.lower() == word or (not _is_address(word) and _below(host.lower(), word)))):
            return ""
    return _without_password(proxy)


def _below(host: str, name: str) -> bool:
    return name != "localhost" and host.endswith("." + name.lstrip("."))


def _is_address(word: str) -> bool:
    try:
        ipaddress.ip_address(word.split("/")[0])
    except ValueError:
        return False
    return True


def _without_password(proxy: str) -> str:
    scheme, mark, rest = proxy.rpartition("://")
    return scheme + mark + rest.rpartition("@")[2]


# --- what went wrong --------------------------------------------------------------------------------------------------


def explain(error: Exception, host: str, port: int, ca: Path) -> Finding:
    """One sentence of what is wrong with the way to the server, one of what to do."""
    where, proxy = f"{host}:{port}", proxy_for(host)
    causes = _chain(error)
    if proxy and not any(isinstance(cause, ssl.SSLError) for cause in causes):
        return stop(
            TITLE,
            f"{where} cannot be reached by the proxy {plain(proxy)} that this machine's settings name "
            f"({plain(error) or type(error).__name__})",
            f"ask IT to let this machine reach {where} through the proxy, or directly: then add {host} to NO_PROXY "
            "(names and single addresses; ranges are not understood)",
        )
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return _untrusted(cause, host, port, ca, proxy)
        if isinstance(cause, ssl.SSLError):
            return stop(
                TITLE,
                f"{where} answers, but not with TLS ({plain(cause.reason or 'no reason given')})",
                "compare the port of [server] address with the kit; if it is right, a firewall may look into the "
                f"connection: ask IT to let TLS 1.3 to {where} pass untouched",
            )
        if isinstance(cause, socket.gaierror):
            return stop(
                TITLE,
                f"the name {host} is not known here",
                "compare [server] address with the kit; if it is right, ask IT why this machine does not find it (DNS)",
            )
    return _no_way(causes, where)


def _no_way(causes: list[BaseException], where: str) -> Finding:
    codes = {cause.errno for cause in causes if isinstance(cause, OSError)}
    if errno.ECONNREFUSED in codes:
        return stop(
            TITLE,
            f"{where} refuses the connection: the machine is there, nothing listens on the port",
            "compare the port with the kit; if it is right, ask the coordinator whether the server is started",
        )
    if codes & {errno.ENETUNREACH, errno.EHOSTUNREACH}:
        return stop(TITLE, f"there is no way from here to {where}", "ask IT whether this machine has a network at all")
    if any(isinstance(cause, TimeoutError | httpx.TimeoutException) for cause in causes):
        connecting = any(isinstance(cause, httpx.ConnectTimeout) for cause in causes)
        told = "no answer within" if connecting else "connected, but nothing came back within"
        return stop(
            TITLE,
            f"{where}: {told} {PATIENCE:.0f} s",
            f"most often a firewall: ask IT to allow outgoing TCP connections from this machine to {where}",
        )
    return stop(
        TITLE,
        f"{where}: the connection was cut ({plain(causes[0]) or type(causes[0]).__name__})",
        "try again; if it stays so, ask the coordinator whether the server is well, and IT whether a firewall cuts it",
    )


def _chain(error: BaseException) -> list[BaseException]:
    """The error and what it came of."""
    found: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in found:
        found.append(cause)
        cause = cause.__cause__ or cause.__context__
    return found


def _untrusted(error: ssl.SSLCertVerificationError, host: str, port: int, ca: Path, proxy: str) -> Finding:
    shown = None if proxy else _untrusted_certificate(host, port)
    title = "server's certificate"
    if error.verify_code == _EXPIRED:
        when = f" since {shown.not_valid_after_utc:%Y-%m-%d %H:%M} UTC" if shown else ""
        return stop(
            title,
            f"has expired{when}, by this machine's clock ({datetime.now(UTC):%Y-%m-%d %H:%M} UTC)",
            "set the clock if it is wrong; else tell the coordinator, who renews it with `consilium provision`",
        )
    if error.verify_code == _NOT_YET:
        when = f" before {shown.not_valid_before_utc:%Y-%m-%d %H:%M} UTC" if shown else ""
        return stop(
            title,
            f"is not valid yet{when}, by this machine's clock ({datetime.now(UTC):%Y-%m-%d %H:%M} UTC)",
            "set this machine's clock; if it is right, tell the coordinator",
        )
    if error.verify_code in _WRONG_NAME:
        names = f", only for {', '.join(map(plain, names_of(shown)))}" if shown else ""
        return stop(
            title,
            f"is not for {host}{names}",
            "write the name from the kit as [server] address; if it is that, ask the coordinator to add it to the "
            "certificate ([server] also in federation.toml)",
        )
    by = f": it was signed by {plain(common_name(shown.issuer))}" if shown else ""
    return stop(
        title,
        f"is not vouched for by {ca}{by}",
        "compare the authority's fingerprint with the coordinator's, by phone; if it is right, a device of your "
        f"network opens encrypted connections (TLS inspection): ask IT to exempt {host}:{port}",
    )


def _untrusted_certificate(host: str, port: int) -> x509.Certificate | None:
    try:
        pem = ssl.get_server_certificate((host, port), timeout=PATIENCE)
        return x509.load_pem_x509_certificate(pem.encode())
    except (OSError, ValueError):
        return None

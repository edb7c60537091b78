"""Serves the dashboard: checks how it may be reached, makes a token, runs until Ctrl-C."""

from __future__ import annotations

import ipaddress
import re
import secrets
import socket
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import uvicorn

from server.dashboard.app import create_app
from server.dashboard.guard import LOOPBACK, SHORTEST, Access
from shared.errors import UserError

PORT = 8600


def access_for(host: str, token_file: Path | None, public_url: str = "", header: str = "") -> Access:
    """Who may ask a dashboard that listens on ``host``.

    Raises:
        UserError: beyond this machine without a token of one's own, or trusting a header that anybody could send.
    """
    local = is_loopback(host)
    if not local and token_file is None:
        raise UserError(f"--host {host}: others can reach it there; give a token of your own with --token-file FILE")
    if header and not local:
        raise UserError(f"--trust-header: whoever reaches {host} could send it; only together with --host 127.0.0.1")
    if header and not re.fullmatch(r"[A-Za-z0-9-]{1,64}", header):
        raise UserError(f"--trust-header {header!r}: is no name of a header, as X-Forwarded-User")
    hosts, origin = set(LOOPBACK), ""
    if not local:
        hosts |= {host.strip("[]").lower()} | ({socket.gethostname().lower()} if _everywhere(host) else set())
    if public_url:
        parts = urlsplit(public_url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/") or parts.query:
            raise UserError(f"--public-url {public_url}: must be as https://consilium.example.org, without a path")
        hosts.add(parts.hostname)
        origin = f"{parts.scheme}://{parts.netloc}".lower()
    token = _token(token_file) if token_file is not None else secrets.token_urlsafe(32)
    return Access(token, frozenset(hosts), origin, header, addresses=not local)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def serve(
    store: str | Path,
    access: Access,
    host: str,
    port: int,
    federation: Path | None,
    say: Callable[[str], None],
    registry: Path | None = None,
) -> None:
    """Serve until Ctrl-C; ``say`` hears the address, with the token, once.

    Raises:
        UserError: the store cannot be opened, or the port is taken.
    """
    app = create_app(store, access, federation, registry)
    plain = host.strip("[]")
    family = socket.AF_INET6 if ":" in plain else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((plain, port))
        listener.listen(128)  # before the address is said: who comes at once waits, and is not refused
    except OSError as error:
        listener.close()
        raise UserError(f"--host {host} --port {port}: cannot listen there: {error.strerror}") from None
    config = uvicorn.Config(
        app, http="h11", access_log=False, log_level="error", server_header=False, proxy_headers=False
    )  # access_log: it would hold the token of the first request
    server = uvicorn.Server(config)
    app.state.watcher.stopping = lambda: server.should_exit
    number = listener.getsockname()[1]
    shown = f"[{plain}]" if ":" in plain else plain
    say(f"dashboard: {access.origin or f'http://{shown}:{number}'}/?token={access.token}")
    say("Ctrl-C ends it. Whoever has this address sees every run; the token leaves it on the first visit.")
    if not is_loopback(host) and not access.origin.startswith("https://"):
        say("note: this is not encrypted; put a proxy with TLS before it, and name it with --public-url https://…")
    with listener:
        server.run(sockets=[listener])


def _everywhere(host: str) -> bool:
    return host in ("0.0.0.0", "::", "[::]")


def _token(path: Path) -> str:
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        raise UserError(f"--token-file {path}: cannot be read") from None
    if len(token) < SHORTEST or not re.fullmatch(r"[!-~]+", token):
        raise UserError(f"--token-file {path}: must hold one word of {SHORTEST} characters or more, none beyond ASCII")
    return token

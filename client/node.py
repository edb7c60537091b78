"""A site in a federation: `consilium site start` keeps Flower's SuperNode and the site's worker running.

The SuperNode speaks with the federation's server, the worker does the work. Both are started again when they end, for
ever: a site that was cut off joins again by itself. All connections go outwards; what listens is on this machine only.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from client.policy import read_policy
from client.sitelog import write_log
from shared.alone import alone
from shared.config import read_toml
from shared.errors import UserError
from shared.sitefile import OWN_FOLDER, Connection, read_connection, read_site
from shared.supervise import PASSES_ON, Child, own_environment, supervise

SUPERNODE, WORKER = "connection", "worker"
CONNECTED = "connected; waiting for work"
_FORBIDDEN = "the server, or something before it, forbids the connection; ask your network's people"
# What Flower's SuperNode says when it cannot join, and what a data manager is to do. The first that is found counts.
TROUBLES = {
    "Hostname mismatch": "the server's certificate is for another name than server.address; ask the coordinator for "
    "the right address",
    "certificate has expired": "the server's certificate has expired; ask the coordinator to renew it",
    "certificate is not yet valid": "the server's certificate is not valid yet; is this machine's clock right?",
    "CERTIFICATE_VERIFY_FAILED": "the server is not the one that server.ca vouches for; do not go on, and call the "
    "coordinator",
    "WRONG_VERSION_NUMBER": "what answers at server.address does not speak TLS; ask the coordinator for the right one",
    "[code: 2004]": "the server does not know this site's key, or still takes the site for connected; if it lasts for "
    "minutes, read the key's words to the coordinator (`consilium site check` shows them)",
    "Client error '403": _FORBIDDEN,
    "RunNotRunningException": _FORBIDDEN,  # the same, as Flower names it
    "Client error '": "what answers at server.address is not the federation's server; ask the coordinator for the "
    "right address",
    "Connection attempt failed": "the server cannot be reached; trying again until it can",
}


def start(site_file: Path, say: Callable[[str], None]) -> None:
    """Take part in the federation that site.toml names, until SIGTERM or Ctrl-C.

    Args:
        say: hears in plain words what happens.

    Raises:
        UserError: the site's file does not allow it to start; says what to do.
    """
    site_file = site_file.resolve()
    connection = _ready(site_file)
    folder = site_file.parent / OWN_FOLDER
    # Two programs of one site would be one site twice.
    with alone(folder / "start.lock", f"{site_file}: this site is started already", f"{folder}: cannot be written"):
        port = connection.local_port or _free_port()
        secret = _new_secret(folder / "worker.secret")
        children = [
            Child(
                SUPERNODE,
                _supernode(connection, port, secret),
                folder / "connection.log",
                _environment(folder) | PASSES_ON,
            ),
            Child(WORKER, _worker(site_file, port, secret), folder / "worker.log", _environment(folder)),
        ]
        say(f"{read_site(site_file).name}: connecting to {connection.address}; Ctrl-C ends it")
        watch = _Watch(site_file, say)
        supervise(children, watch.ended, watch.tick)
        say("stopped")


def _ready(site_file: Path) -> Connection:
    connection = read_connection(site_file)
    if "privacy" not in read_toml(site_file):
        raise UserError(
            f"{site_file}: no [privacy] table: write down what may leave this site before it joins (docs/hospital.md)"
        )
    read_policy(site_file)
    for key, path in (("ca", connection.ca), ("key", connection.key)):
        if not path.is_file():
            raise UserError(f"server.{key}: no file {path}; it is in the start-up kit that the coordinator sent")
    if connection.key.stat().st_mode & 0o077:
        raise UserError(f"{connection.key}: others can read this key; do `chmod 600 {connection.key}`")
    return connection


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _new_secret(path: Path) -> Path:
    """What the worker proves itself with to the SuperNode, so that no other program here gets the site's messages."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(secrets.token_bytes(32))
    return path


def _environment(folder: Path) -> dict[str, str]:
    return own_environment(FLWR_HOME=str(folder / "flower"))


def _supernode(connection: Connection, port: int, secret: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "client.supernode"),
        *("--superlink", connection.address, "--root-certificates", str(connection.ca)),
        *("--auth-supernode-private-key", str(connection.key), "--isolation", "process"),
        *("--host", "127.0.0.1", "--port", str(port), "--superexec-auth-secret-file", str(secret)),
    ]


def _worker(site_file: Path, port: int, secret: Path) -> list[str]:
    return [sys.executable, "-m", "client.worker", f"127.0.0.1:{port}", str(site_file), str(secret)]


class _Watch:
    """Says what happens at the site: its own log as it grows, and why a process ended."""

    def __init__(self, site_file: Path, say: Callable[[str], None]) -> None:
        self.home, self.say = site_file.parent, say
        self.read = {name: _size(self.home / path) for name, path in _LOGS.items()}
        self.said = ""
        self.joined = False  # in the life of this SuperNode

    def tick(self) -> None:
        for line in self._news("site"):
            self.say(line)
        for line in self._news(SUPERNODE):
            self._hear(line)

    def _news(self, name: str) -> list[str]:
        """The whole lines that a log has grown by."""
        path = self.home / _LOGS[name]
        if _size(path) <= self.read[name]:
            return []
        with path.open("rb") as file:
            file.seek(self.read[name])
            whole, _, _ = file.read().rpartition(b"\n")
        self.read[name] += len(whole) + 1 if whole else 0
        return whole.decode("utf-8", "replace").splitlines()

    def _hear(self, line: str) -> None:
        for words, meaning in TROUBLES.items():
            if words in line:
                self._once(meaning)
                return
        if "SuperNode ID:" in line or "Connection successful" in line:
            self.joined = True
            self._once(CONNECTED)

    def _once(self, text: str) -> None:
        if text != self.said:
            self.said = text
            write_log(self.home, text)  # and so it is said

    def ended(self, child: Child, status: int) -> None:
        self.tick()
        if child.name == WORKER:
            write_log(self.home, f"the worker ended (status {status}) and is started again; see {_LOGS[WORKER]}")
            return
        joined, self.joined = self.joined, False
        if status == 0:  # so Flower ends when the server does not accept its signature, and says nothing
            self._once(
                "the coordinator has taken this site out of the federation, or this machine's clock was set"
                if joined
                else "the server does not accept this machine's signature: is its clock right? It may be 5 seconds "
                "ahead and 5 minutes behind; `consilium site check` tells"
            )
        elif self.said in ("", CONNECTED):  # of a trouble that is known was said already what it means
            self._once(f"the connection ended (status {status}) and is begun again; see {_LOGS[SUPERNODE]}")


_LOGS = {
    "site": Path("site.log"),
    SUPERNODE: Path(OWN_FOLDER, "connection.log"),
    WORKER: Path(OWN_FOLDER, "worker.log"),
}


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0

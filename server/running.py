"""`consilium server start`: keeps Flower's SuperLink, its executor and the gateway running, and the keys in order."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from server.control import Control, keep_keys, submitted
from server.expiry import expiry
from server.federation import Folder
from server.gateway import command, configuration
from server.started import lock_file, state_file
from shared.alone import alone
from shared.errors import UserError
from shared.files import write_text
from shared.supervise import PASSES_ON, Child, own_environment, supervise

LOOK = 10.0  # seconds between looks at how long the certificate is valid
LOOKS_OFTEN = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.4"}  # seconds until a run that was submitted is taken up
SUPERLINK, EXECUTOR, GATEWAY = "superlink", "executor", "gateway"


def start(path: Path, say: Callable[[str], None]) -> None:
    """Run the server of the federation in ``path`` until SIGTERM or Ctrl-C.

    Args:
        say: hears in plain words what happens.

    Raises:
        UserError: it cannot start; says what to do.
    """
    folder = Folder(path.resolve())
    federation = folder.read()
    try:
        folder.gateway.mkdir(parents=True, exist_ok=True)
        folder.state.chmod(0o700)
    except OSError as error:
        raise UserError(f"{folder.state}: cannot be written: {error.strerror}") from None
    taken, cannot = f"{folder.path}: this server is started already", f"{folder.state}: cannot be written"
    with alone(lock_file(folder), taken, cannot):
        if folder.nginx_conf.read_text(encoding="utf-8") != configuration(federation):
            write_text(folder.nginx_conf, configuration(federation))  # it tells the versions, which may be new ones
        for port, host in ((federation.port, federation.listen), (federation.internal_port, "127.0.0.1")):
            _require_free(host, port)
        health = {SUPERLINK: _free_port(), EXECUTOR: _free_port()}
        children = _children(folder, federation.internal_port, health)
        write_text(state_file(folder), json.dumps({"pid": os.getpid(), "started": time.time(), "health": health}))
        say(f"{federation.name}: hospitals reach it at {federation.address}; Ctrl-C ends it")
        try:
            watch = _Watch(folder, children, say)
            supervise(children, lambda child, status: say(_ended(child, status)), watch.tick, lambda: _tell(path, say))
        finally:
            state_file(folder).unlink(missing_ok=True)
        say("stopped")


def _require_free(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"port {port} of {host} cannot be had ({error.strerror}); choose another in [server]"
            ) from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _children(folder: Folder, port: int, health: dict[str, int]) -> list[Child]:
    env = own_environment(FLWR_HOME=str(folder.state / "flower"))
    address, secret = f"127.0.0.1:{port}", str(folder.superexec_secret)
    superlink = [
        *(
            sys.executable,
            "-m",
            "server.superlink",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--isolation",
            "process",
        ),
        *("--ssl-certfile", str(folder.server_cert), "--ssl-keyfile", str(folder.server_key)),
        *("--ssl-ca-certfile", str(folder.ca_cert), "--enable-supernode-auth"),
        *("--database", str(folder.state / "superlink.db"), "--superexec-auth-secret-file", secret),
        *("--disable-runtime-dependency-installation", "--health-server-address", f"127.0.0.1:{health[SUPERLINK]}"),
    ]
    executor = [
        *("flower-superexec", "--runtime-api-address", address, "--root-certificates", str(folder.ca_cert)),
        *("--superexec-auth-secret-file", secret, "--health-server-address", f"127.0.0.1:{health[EXECUTOR]}"),
    ]
    return [
        Child(SUPERLINK, superlink, folder.state / "superlink.log", env | PASSES_ON),
        Child(EXECUTOR, executor, folder.state / "executor.log", env | LOOKS_OFTEN),
        Child(GATEWAY, command(folder), folder.gateway / "gateway.log", env),
    ]


def _ended(child: Child, status: int) -> str:
    return f"{child.name} ended (status {status}) and is started again in {child.wait:.0f} s; see {child.log}"


def _tell(path: Path, say: Callable[[str], None]) -> None:
    """Name the runs that the end of the server breaks off, and how each goes on."""
    folder = Folder(path.resolve())
    try:
        with Control(folder) as control:
            going = {number for number, status in control.statuses().items() if not status.over}
    except (UserError, OSError):  # it does not answer: nothing is known of its runs
        return
    for run in sorted(folder.runs.glob("*/submitted.json")):
        if submitted(run.parent) in going:
            say(
                f"run {run.parent.name} breaks off; when the server is started again, it goes on with "
                f"`consilium run --federation {path} --resume {run.parent.name}`"
            )


class _Watch:
    """Keeps what the processes know equal to the files of the folder."""

    def __init__(self, folder: Folder, children: list[Child], say: Callable[[str], None]) -> None:
        self.folder, self.say = folder, say
        self.superlink, _, self.gateway = children
        self.keys: object = None
        self.trouble = ""  # with the keys, which was told
        self.files = self._stamps()
        self.ready = False
        self.due, self.expiry = 0.0, ""

    def tick(self) -> None:
        if time.monotonic() >= self.due:
            self.due = time.monotonic() + LOOK
            self._look_at_certificate()
        keys = [(name, self._stamp(self.folder.node_pub(name))) for name in self.folder.site_names()]
        if keys != self.keys:
            with Control(self.folder) as control:
                if not control.answers():
                    return
                try:
                    for line in keep_keys(control, self.folder):
                        self._say(line)
                    self.keys, self.trouble = keys, ""
                except UserError as error:  # it must not end the others' runs; a key taken away must still go
                    if str(error) != self.trouble:
                        self._say(f"keys: {error}; this is tried again and again")
                    self.trouble = str(error)
        if not self.ready:
            self.ready = True
            self._say("ready")
        files = self._stamps()
        if files != self.files:
            self.files = files
            self._say("certificate or gateway changed: the server takes them up")
            for child in (self.superlink, self.gateway):
                if child.process is not None:
                    child.process.terminate()

    def _look_at_certificate(self) -> None:
        line, _ = expiry(self.folder)
        if line != self.expiry and "renew" in line:  # once a day from some weeks before its end on
            self._say(line)
        self.expiry = line

    def _stamps(self) -> list[float]:
        return [self._stamp(path) for path in (self.folder.server_cert, self.folder.nginx_conf)]

    def _stamp(self, path: Path) -> float:
        return path.stat().st_mtime if path.exists() else 0.0

    def _say(self, text: str) -> None:
        self.say(f"{datetime.now(UTC):%H:%M:%S} {text}")

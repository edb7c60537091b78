"""A real federation on this machine for tests: provisioned, its server and its sites started as processes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

CONSILIUM = [sys.executable, "-m", "consilium"]
PRIVACY = "\n[privacy]\nmin_patients = 2\n"
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Poll until ``condition`` holds; a test that waits for ever says nothing.

    ``seconds`` are those of a machine that has nothing else to do. On one with much work they are as many more.
    """
    began, longest = time.monotonic(), seconds
    while not condition():
        longest = max(longest, seconds * os.getloadavg()[0] / (os.cpu_count() or 1))
        assert time.monotonic() < began + longest, f"after {longest:.0f} s there was still no: {what}"
        time.sleep(0.1)


def called_here(*arguments: object) -> tuple[int, str]:
    """Exit code and all words of a command, called in this process."""
    from consilium.cli import main

    said = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        patch.setattr(sys, "argv", ["consilium", *map(str, arguments)])
        patch.setenv("COLUMNS", "120")
        try:
            main()
            code = 0
        except SystemExit as left:
            code = int(left.code or 0)
    return code, said.getvalue()


def _words(process: psutil.Process) -> list[str]:
    """The command line of a process; nothing of one that ends just now."""
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


@dataclass
class Live:
    """The federation in ``path``; ``sites`` holds the folder of each site's images and site.toml."""

    path: Path
    sites: dict[str, Path]
    privacy: str = PRIVACY
    host: str = "localhost"
    listen: str = "127.0.0.1"
    inside: dict[str, list[str]] = field(default_factory=dict)  # what a process, or the "server", is started by
    env: dict[str, dict[str, str]] = field(default_factory=dict)  # of a process, beside this one's own
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def provision(self) -> None:
        """Set it up, and unpack each start-up kit as its hospital would."""
        lines = ['name = "council"', "[server]", f'host = "{self.host}"', f'listen = "{self.listen}"']
        self.port, self.internal_port = free_port(), free_port()
        lines += [f"port = {self.port}", f"internal_port = {self.internal_port}"]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.parent / "federation.toml"
        self.file.write_text("\n".join([*lines, *(f"[sites.{name}]" for name in self.sites)]) + "\n")
        self.consilium("provision", self.file, "--out", self.path)
        for name, folder in self.sites.items():
            with zipfile.ZipFile(self.path / "kits" / f"{name}.zip") as kit:
                kit.extract("ca.crt", folder)
                kit.extract("node.key", folder)
                sent = kit.read("site.toml").decode()
            (folder / "node.key").chmod(0o600)
            own = folder / "site.toml"
            own.write_text(own.read_text() + self.privacy + sent[sent.index("[server]") :])

    def consilium(self, *arguments: object, code: int = 0) -> str:
        """What a command prints; it must end with ``code``.

        It runs in this process, which has imported everything already; only where the server is a machine of its own
        it is a process there.
        """
        if "server" not in self.inside:
            left, said = called_here(*arguments)
        else:
            done = subprocess.run(
                [*self.inside["server"], *CONSILIUM, *map(str, arguments)], capture_output=True, text=True, env=ENV
            )
            left, said = done.returncode, done.stdout + done.stderr
        assert left == code, said
        return said

    def start(self, name: str, *arguments: object) -> None:
        """Start a command that stays; its output goes to a file."""
        with self.output(name).open("ab") as output:
            self.processes[name] = subprocess.Popen(
                [*self.inside.get(name, []), *CONSILIUM, *map(str, arguments)],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=ENV | self.env.get(name, {}),
            )

    def start_server(self) -> None:
        self.start("server", "server", "start", self.path)
        until(lambda: "ready" in self.said("server"), 60, f"server: {self.said('server')}")

    def start_site(self, name: str) -> None:
        """Start a site and wait until the server sees it."""
        self.start(name, "site", "start", self.sites[name] / "site.toml")
        until(lambda: self.said(name).rstrip().endswith("waiting for work"), 90, f"{name}: {self.said(name)}")

    def output(self, name: str) -> Path:
        return self.path.parent / f"{name}.out"

    def said(self, name: str) -> str:
        path = self.output(name)
        return path.read_text(errors="replace") if path.exists() else ""

    def end(self, name: str) -> None:
        """Ctrl-C."""
        process = self.processes.pop(name)
        process.send_signal(signal.SIGTERM)
        process.wait(30)

    def end_all(self) -> None:
        for name in list(self.processes):
            self.end(name)

    def submit(self, job: Path, *settings: str) -> str:
        """Submit a job without following it; gives the run's name."""
        options = [part for setting in settings for part in ("--set", setting)]
        said = self.consilium("run", job, "--federation", self.path, "--detach", *options)
        return said.split()[1].rstrip(";")

    def follow(self, run: str, code: int = 0) -> str:
        return self.consilium("run", "--federation", self.path, "--attach", run, code=code)

    def folder(self, run: str) -> Path:
        return self.path / "runs" / run

    def events(self, run: str, kind: str = "") -> list[dict[str, Any]]:
        path = self.folder(run) / "rounds.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        events: list[dict[str, Any]] = [json.loads(line) for line in lines if line.endswith("}")]
        return [event for event in events if not kind or event["event"] == kind]

    def children(self, name: str, word: str) -> Sequence[psutil.Process]:
        """The processes below one that was started here whose command line has ``word`` in it."""
        family = psutil.Process(self.processes[name].pid).children(recursive=True)
        return [process for process in family if word in " ".join(_words(process))]

"""A real PostgreSQL server for the tests: Debian's, in a folder of its own, on a Unix socket only."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def _program(name: str) -> str:
    places = [str(path) for path in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    found = shutil.which(name, path=os.pathsep.join([*places, os.environ.get("PATH", "")]))
    if found is None:
        pytest.skip(f"PostgreSQL's {name} is not installed (apt install postgresql)")
    return found


def _account() -> str | None:
    """PostgreSQL does not run as root: then it is run as the account that its package made, or as nobody."""
    if os.getuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


@contextmanager
def server() -> Iterator[str]:
    """Gives the URL of an empty database; skips the test where there is no PostgreSQL."""
    pytest.importorskip("psycopg", reason="the driver is not installed: pip install --editable '.[postgres]'")
    initdb, postgres, account = _program("initdb"), _program("postgres"), _account()
    folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))  # a socket's path is 107 bytes at most
    if account:
        shutil.chown(folder, account)
    log = (folder.parent / f"{folder.name}.log").open("wb")
    run = {"cwd": folder, "user": account, "stdout": log, "stderr": log}
    try:
        given = [initdb, "-D", "data", "-U", "consilium", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"]
        subprocess.run(given, check=True, timeout=120, **run)
        options = [f"unix_socket_directories={folder}", "listen_addresses=", "fsync=off", "shared_buffers=64MB"]
        process = subprocess.Popen([postgres, "-D", "data", *(x for o in options for x in ("-c", o))], **run)
        try:
            url = f"postgresql://consilium@/postgres?host={folder}"
            _answers(url, process)
            yield url
        finally:
            process.send_signal(signal.SIGINT)  # to shut down fast
            process.wait(30)
    finally:
        log.close()
        Path(log.name).unlink()
        shutil.rmtree(folder, ignore_errors=True)


def _answers(url: str, process: subprocess.Popen[bytes]) -> None:
    import psycopg

    deadline = time.monotonic() + 60
    while True:
        try:
            psycopg.connect(url).close()
            return
        except psycopg.OperationalError:
            assert process.poll() is None, "PostgreSQL ended at once"
            assert time.monotonic() < deadline, "PostgreSQL does not answer"
            time.sleep(0.1)

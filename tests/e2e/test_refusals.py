"""What a site or the server says when it cannot join: at real processes, one trouble at a time.

A site of the federation that is in order stays connected all the while; what happens to the others is not its concern.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from server import pki
from server.federation import Folder
from shared import __version__
from shared.config import job_from_flat
from tests.client.gateway import Authority, serving, write_key
from tests.conftest import ROOT, write_site
from tests.e2e.live import Live, until

NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
CC = shutil.which("cc")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NGINX is None, reason="the gateway needs nginx, which is not installed here"),
]
CLOCK = "does not accept this machine's signature: is its clock right?"


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    base = tmp_path_factory.mktemp("refusals")
    sites = {name: base / "hospitals" / name for name in "ab"}
    for name, folder in sites.items():
        write_site(folder, name)
    federation = Live(base / "dir", sites)
    federation.provision()
    try:
        federation.start_server()
        federation.start_site("a")
        yield federation
    finally:
        federation.end_all()


@pytest.fixture(scope="module")
def job(live: Live) -> Path:
    flat = {
        "name": "one",
        "data.classes": "left,right",
        "data.size": 16,
        "model.width": 4,
        "train.batch_size": 8,
        "federation.rounds": 1,
        "federation.start_timeout": 5.0,
        "evaluation.every": 1,
    }
    path = live.path.parent / "one.toml"
    path.write_text(job_from_flat(flat).toml())
    return path


def another(live: Live, name: str, **server: object) -> Path:
    """A copy of site b under another process's name, with other lines in its [server] table."""
    folder = live.path.parent / "hospitals" / name
    shutil.copytree(live.sites["b"], folder)
    file = folder / "site.toml"
    lines = file.read_text().splitlines()
    for key, value in server.items():
        lines = [f'{key} = "{value}"' if line.startswith(f"{key} = ") else line for line in lines]
    file.write_text("\n".join(lines) + "\n")
    return file


def says(live: Live, name: str, file: Path, words: str) -> str:
    """Start that site and wait for it to say these words; it goes on trying, and ends when it is told to."""
    live.start(name, "site", "start", file)
    try:
        until(lambda: words in live.said(name), 60, f"{words!r}; it said: {live.said(name)}")
        assert live.processes[name].poll() is None
        assert "Traceback" not in live.said(name)
    finally:
        live.end(name)
    assert live.said(name).rstrip().endswith("stopped")
    return live.said(name)


REFUSALS = {
    "another authority": "the server is not the one that server.ca vouches for",
    "another name": "the server's certificate is for another name than server.address",
    "plain HTTP": "does not speak TLS",
    "401": CLOCK,
    "403": "forbids the connection",
    "404": "is not the federation's server",
    "nobody": "the server cannot be reached; trying again until it can",
    "unknown key": "does not know this site's key",
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_site_that_cannot_join_says_why(live: Live, kind: str, tmp_path: Path) -> None:
    status = int(kind) if kind.isdigit() else 0
    stranger = Authority(tmp_path / "other", "Other CA")
    with serving(stranger.sign("localhost", "127.0.0.1") if status else None, status=status, body=b"no") as other:
        changed: dict[str, dict[str, object]] = {
            "another authority": {"ca": stranger.file},
            # The same machine by a name that its certificate does not have.
            "another name": {"address": f"127.1:{live.port}"},
            "plain HTTP": {"address": other.address},
            "nobody": {"address": "localhost:1"},
            "unknown key": {"key": write_key(tmp_path / "stranger.key")},
        }
        name = f"b-{kind.replace(' ', '-')}"
        own = changed.get(kind, {"address": other.address, "ca": stranger.file})
        says(live, name, another(live, name, **own), REFUSALS[kind])


# The kernel has one wall clock for all, and libfaketime 0.9.10 breaks Python's waits from 3.11 on, which are by the
# monotonic clock. So the wall clock of one site's processes is shifted where they ask the C library for it.
SHIFTED = """
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = syscall(SYS_clock_gettime, clock, now);
    if (!failed && clock == CLOCK_REALTIME) now->tv_sec += atoi(getenv("AHEAD"));
    return failed;
}
time_t time(time_t *seconds) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (seconds) *seconds = now.tv_sec;
    return now.tv_sec;
}
"""


@pytest.mark.skipif(CC is None, reason="a clock of its own for one process needs a C compiler, none is here")
@pytest.mark.parametrize("ahead", [60, -400])
def test_a_site_whose_clock_is_wrong_is_told_so(live: Live, ahead: int, tmp_path: Path) -> None:
    (tmp_path / "clock.c").write_text(SHIFTED)
    library = tmp_path / "clock.so"
    subprocess.run([str(CC), "-shared", "-fPIC", "-o", library, tmp_path / "clock.c"], check=True)
    name = f"b{ahead}"
    live.env[name] = {"LD_PRELOAD": str(library), "AHEAD": str(ahead)}
    said = says(live, name, another(live, name), CLOCK)
    assert "connected" not in said


def test_nobody_else_was_disturbed(live: Live, job: Path) -> None:
    """Not by any of the above: the site in order never had to connect again, and works."""
    assert live.said("a").count("connected; waiting for work") == 1
    assert "cannot be reached" not in live.said("a")
    assert "1 of 2" in live.consilium("server", "status", live.path)
    name = live.submit(job)
    live.follow(name)
    (event,) = live.events(name, "round")
    assert [item["site"] for item in event["trained"]] == ["a"]


def test_an_older_release_at_a_site_runs_nothing_of_ours(live: Live, job: Path) -> None:
    older = live.path.parent / "older"
    for package in ("client", "consilium", "server", "shared", "simulations"):
        shutil.copytree(ROOT / package, older / package, ignore=shutil.ignore_patterns("__pycache__"))
    (older / "shared" / "__init__.py").write_text('__version__ = "0.0.9"\n')
    live.env["b-older"] = {"PYTHONPATH": str(older), "PYTHONSAFEPATH": "1"}
    file = another(live, "b-older")
    live.start("b-older", "site", "start", file)
    try:
        until(lambda: "connected; waiting for work" in live.said("b-older"), 90, live.said("b-older"))
        name = live.submit(job)
        said = live.follow(name)
        assert "b not used: site-declined: bundle-refused" in said
        (event,) = live.events(name, "round")
        assert [item["site"] for item in event["trained"]] == ["a"]
        assert f"is consilium {__version__}, here 0.0.9 is installed" in live.said("b-older")
    finally:
        live.end("b-older")


def test_a_server_whose_certificate_has_expired_and_is_renewed(live: Live, job: Path) -> None:
    folder = Folder(live.path)
    ca, key = (
        x509.load_pem_x509_certificate(folder.ca_cert.read_bytes()),
        load_pem_private_key(folder.ca_key.read_bytes(), None),
    )
    assert isinstance(key, EllipticCurvePrivateKey)
    past = datetime.now(UTC) - timedelta(days=pki.SERVER_DAYS + 1)
    expired, secret = pki.make_server_certificate("council", ["localhost", "127.0.0.1"], ca, key, past)
    site = psutil.Process(live.processes["a"].pid)
    pki.write_file(folder.server_key, secret, 0o600)
    pki.write_file(folder.server_cert, expired)
    words = "the server's certificate has expired; ask the coordinator to renew it"
    until(lambda: words in live.said("a"), 90, f"{words!r} in {live.said('a')}")
    renew = f"consilium provision {folder.federation} --out {live.path}"
    until(lambda: renew in live.said("server"), 60, f"advice at the server: {live.said('server')}")
    assert renew in live.consilium("server", "status", live.path, code=1)
    assert renew in live.consilium("run", job, "--federation", live.path, code=2)

    live.consilium("provision", live.file, "--out", live.path)
    until(lambda: live.said("a").rstrip().endswith("connected; waiting for work"), 120, live.said("a"))
    assert site.is_running()
    live.follow(live.submit(job))

"""`consilium site check` of a start-up kit as `consilium provision` makes it, against the gateway as nginx runs it."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from consilium.cli import commands
from server import gateway
from server.federation import Folder
from server.provision import provision
from tests.conftest import write_site

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not here")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """A federation of two hospitals on this machine, provisioned."""
    file = tmp_path / "federation.toml"
    file.write_text(
        f'name = "chest-council"\n[server]\nhost = "localhost"\nlisten = "127.0.0.1"\nport = {free_port()}\n'
        f"internal_port = {free_port()}\n[sites.hospital-north]\n[sites.hospital-river]\n"
    )
    provision(file, tmp_path / "council")
    return Folder(tmp_path / "council")


@pytest.fixture
def running(folder: Folder) -> Iterator[Folder]:
    """Its gateway; Flower's SuperLink behind it is not started."""
    process = subprocess.Popen(gateway.command(folder))
    port = int(re.findall(r"^port = (\d+)", (folder.path / "federation.toml").read_text(), re.MULTILINE)[0])
    deadline = time.monotonic() + 20
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            break
        except OSError:
            assert time.monotonic() < deadline
            assert process.poll() is None
    yield folder
    process.terminate()
    process.wait(20)


@pytest.fixture
def kit(folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The site.toml of a kit, unpacked and filled in, with images."""
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "north"
    write_site(home, "a", 80)
    with zipfile.ZipFile(folder.path / "kits" / "hospital-north.zip") as packed:
        packed.extractall(home)
    (home / "node.key").chmod(0o600)
    text = (home / "site.toml").read_text()
    text = text.replace('dir = "images"', 'dir = "."').replace('format = "auto"', 'format = "csv"')
    (home / "site.toml").write_text(text.replace("declared_images = 0", "declared_images = 40"))
    return home / "site.toml"


def check(*words: object) -> Result:
    return CliRunner().invoke(commands, ["site", "check", *map(str, words)])


def lines(done: Result) -> dict[str, str]:
    """Level by title."""
    found = re.findall(r"^(OK|ATTENTION|STOP) +([^:]+):", done.output, re.MULTILINE)
    return {title: level for level, title in found}


def test_a_kit_that_was_filled_in_is_fit_at_the_real_gateway(running: Folder, kit: Path) -> None:
    done = check(kit)
    assert done.exit_code == 0, done.output
    found = lines(done)
    for title in (
        "privacy rules",
        "key of this site",
        "authority",
        "server",
        "server's certificate",
        "clock",
        "versions",
    ):
        assert found[title] == "OK", done.output
    assert "for the federation chest-council" in " ".join(done.output.split())


def test_the_fingerprints_are_those_of_the_kits_guide(running: Folder, kit: Path) -> None:
    done = " ".join(check(kit).output.split())
    told = re.findall(r"fingerprint “([a-z ]+)”", done)
    guide = " ".join(re.sub(r"<[^>]+>", " ", (kit.parent / "guide.html").read_text()).split())
    assert len(told) == 2
    for words in told:
        assert words in guide


def test_every_line_fits_a_terminal_of_80_columns(running: Folder, kit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = check(kit).output.splitlines()
    assert max(len(line) for line in shown if "/" not in line) <= 80
    assert any("SHA-256" in line for line in shown)


def test_a_kit_of_another_federation_is_refused_before_anything_is_asked(
    running: Folder, kit: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.toml"
    other.write_text('name = "other"\n[server]\nhost = "localhost"\n[sites.x]\n')
    provision(other, tmp_path / "other")
    shutil.copy(tmp_path / "other" / "ca" / "ca.crt", kit.parent / "ca.crt")
    done = check(kit)
    assert done.exit_code == 1
    assert lines(done)["server's certificate"] == "STOP"
    assert "is not vouched for by" in " ".join(done.output.split())


def test_where_the_gateway_is_not_started_nothing_listens(folder: Folder, kit: Path) -> None:
    done = check(kit)
    assert done.exit_code == 1
    assert lines(done)["server"] == "STOP"
    assert "nothing listens on the port" in " ".join(done.output.split())

"""`consilium site start` where it cannot start, and what it says of a SuperNode that ended; no federation is needed."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from client.node import start
from shared.errors import UserError
from tests.client.gateway import Authority, serving, write_key
from tests.conftest import write_site
from tests.e2e.live import CONSILIUM, ENV, PRIVACY, free_port, until


def joined(folder: Path, address: str = "", privacy: str = PRIVACY) -> Path:
    """A site.toml with all that it needs, whose server nobody is."""
    file = write_site(folder, "a")
    Authority(folder)
    write_key(folder / "node.key")
    server = f'\n[server]\naddress = "{address or f"127.0.0.1:{free_port()}"}"\nca = "ca.crt"\nkey = "node.key"\n'
    file.write_text(file.read_text() + privacy + server)
    return file


def refused(file: Path) -> str:
    """What a start that cannot be says; nothing was started."""
    said: list[str] = []
    before = set(psutil.Process().children(recursive=True))  # another test's helper may be there
    with pytest.raises(UserError) as error:
        start(file, said.append)
    assert said == []
    assert set(psutil.Process().children(recursive=True)) <= before  # nothing was started
    assert "\n" not in str(error.value)
    return str(error.value)


def test_without_rules_it_does_not_start(tmp_path: Path) -> None:
    said = refused(joined(tmp_path / "a", privacy=""))
    assert "no [privacy] table" in said
    assert "before it joins" in said


def test_a_rule_that_is_none_stops_it(tmp_path: Path) -> None:
    assert "min_patients" in refused(joined(tmp_path / "a", privacy='\n[privacy]\nmin_patients = "many"\n'))


@pytest.mark.parametrize("name", ["ca.crt", "node.key"])
def test_a_file_of_the_kit_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    file = joined(tmp_path / "a")
    (file.parent / name).unlink()
    said = refused(file)
    assert str(file.parent / name) in said
    assert "start-up kit" in said


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620])
def test_a_key_that_others_can_read_is_not_used(tmp_path: Path, mode: int) -> None:
    file = joined(tmp_path / "a")
    key = file.parent / "node.key"
    key.chmod(mode)
    said = refused(file)
    assert "others can read this key" in said
    command = said[said.index("`") + 1 : said.rindex("`")]
    subprocess.run(command, shell=True, check=True)  # what it says to do is what helps
    assert key.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("key", ["address", "ca", "key"])
def test_a_line_of_the_server_table_that_lacks_is_named(tmp_path: Path, key: str) -> None:
    file = joined(tmp_path / "a")
    file.write_text("\n".join(line for line in file.read_text().splitlines() if not line.startswith(f"{key} = ")))
    assert f"[server] lacks {key}" in refused(file)


class Started:
    """`consilium site start` as a process."""

    def __init__(self, file: Path) -> None:
        self.output = file.parent / "output"
        with self.output.open("wb") as output:
            command = [*CONSILIUM, "site", "start", str(file)]
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=ENV)

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        self.process.wait(30)

    def said(self) -> str:
        return self.output.read_text()

    def until(self, words: str, times: int = 1) -> None:
        until(lambda: self.said().count(words) >= times, 60, f"{words!r}; it said {self.said()}")


@pytest.mark.slow
def test_a_second_start_of_a_site_is_refused_and_leaves_the_first_alone(tmp_path: Path) -> None:
    file = joined(tmp_path / "a")
    with Started(file) as first:
        first.until("the server cannot be reached; trying again until it can")
        before = {child.pid for child in psutil.Process(first.process.pid).children(recursive=True)}
        second = subprocess.run([*CONSILIUM, "site", "start", str(file)], capture_output=True, text=True, env=ENV)
        assert second.returncode == 2
        assert "this site is started already" in second.stdout + second.stderr
        assert "Traceback" not in second.stderr
        assert {child.pid for child in psutil.Process(first.process.pid).children(recursive=True)} == before
    assert first.process.returncode == 0
    assert first.said().rstrip().endswith("stopped")
    assert not any(psutil.pid_exists(pid) for pid in before)
    with Started(file) as again:  # the lock went with the process
        again.until("the server cannot be reached")


@pytest.mark.slow
def test_a_connection_that_ends_is_begun_again(tmp_path: Path) -> None:
    """Flower's SuperNode gives up on some answers, and on one of them stays as a process that does nothing."""
    ca = Authority(tmp_path / "a-ca")
    with serving(ca.sign("127.0.0.1"), status=403, body=b"no") as server:
        file = joined(tmp_path / "a", server.address)
        (file.parent / "ca.crt").write_bytes(ca.file.read_bytes())
        with Started(file) as site:
            site.until("forbids the connection; ask your network's people")
            until(lambda: len(server.asked) >= 3, 60, "a further try")
            assert site.said().count("forbids the connection") == 1  # not at every try
            server.status = 404
            site.until("is not the federation's server; ask the coordinator for the right address")


LIVES = """
import client.supernode, sys, threading
def flower_supernode():
    assert sys.argv[0] == "flower-supernode"
    threading.Thread(target=threading.Event().wait).start()  # as its service for the worker does, it stays
    {ends}
client.supernode.flower_supernode = flower_supernode
client.supernode.main()
"""


@pytest.mark.parametrize(
    ("ends", "status"),
    [
        ("return", 1),
        ("raise RuntimeError('no')", 1),
        ("raise KeyboardInterrupt", 1),
        ("sys.exit(0)", 0),
        ("sys.exit(3)", 3),
        ("threading.Thread(target=lambda: 1 / 0).start(); threading.Event().wait()", 1),
    ],
)
def test_a_supernode_ends_as_soon_as_it_does_not_work(ends: str, status: int) -> None:
    command = [sys.executable, "-c", LIVES.format(ends=ends)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=ENV)
    assert done.returncode == status, done.stderr
    assert ("Traceback" in done.stderr) == any(word in ends for word in ("raise", "1 / 0"))


def test_what_supervises_a_site_does_not_carry_pytorch() -> None:
    """It stays for as long as the site does; the worker has it."""
    probe = "import sys, client.node; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe]).returncode == 0

"""A federation whose server and sites are machines of their own to the network, behind firewalls, joined by a switch.

Each is a network namespace of this kernel with nftables: a site lets nothing in that it did not ask for, and nothing
out but to the server's gateway; the server lets nothing in but to its gateway, and nothing out that was not asked for.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.config import job_from_flat
from tests.conftest import write_site
from tests.e2e.live import Live, until

PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin:/usr/local/sbin"
MISSING = [name for name in ("nginx", "ip", "nft", "ss") if shutil.which(name, path=PATH) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed here: {', '.join(MISSING)}"),
]
SERVER = "10.213.77.1"
ADDRESSES = {"server": SERVER, "a": "10.213.77.11", "b": "10.213.77.12", "c": "10.213.77.13"}
LOOPBACK = ("127.", "[::1]:", "[::ffff:127.")
CUT = 60.0  # seconds

FIREWALL = """
table inet council {{
    chain incoming {{
        type filter hook input priority 0; policy drop;
        iif lo accept
        ct state established,related accept
        {incoming}
        counter
    }}
    chain outgoing {{
        type filter hook output priority 0; policy drop;
        oif lo accept
        ct state established,related accept
        {outgoing}
        counter
    }}
}}
"""


def run(*words: object, stdin: str = "") -> str:
    done = subprocess.run(
        [*map(str, words)], input=stdin, capture_output=True, text=True, env={**os.environ, "PATH": PATH}
    )
    assert done.returncode == 0, f"{' '.join(map(str, words))}: {done.stderr}"
    return done.stdout


class Network:
    """The namespaces; ``names`` gives that of each machine."""

    def __init__(self) -> None:
        mark = f"council{os.getpid()}"
        self.names = {name: f"{mark}-{name}" for name in ADDRESSES}
        self.switch = f"{mark}-switch"

    def start(self) -> None:
        """Put the machines on the switch, which is there."""
        run("ip", "-n", self.switch, "link", "add", "br0", "type", "bridge")
        run("ip", "-n", self.switch, "link", "set", "br0", "up")
        for name, own in self.names.items():
            run("ip", "netns", "add", own)
            ends = ("name", "eth0", "netns", own, "type", "veth", "peer", "name", name, "netns", self.switch)
            run("ip", "link", "add", *ends)
            run("ip", "-n", self.switch, "link", "set", "dev", name, "master", "br0", "up")
            run("ip", "-n", own, "address", "add", f"{ADDRESSES[name]}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                run("ip", "-n", own, "link", "set", device, "up")

    def guard(self, port: int) -> None:
        """Put up the firewalls; ``port`` is the gateway's."""
        site = {"incoming": "", "outgoing": f"ip daddr {SERVER} tcp dport {port} ct state new accept"}
        server = {"incoming": f"tcp dport {port} ct state new accept", "outgoing": ""}
        for name in self.names:
            self.inside(name, "nft", "-f", "-", stdin=FIREWALL.format(**(server if name == "server" else site)))

    def inside(self, name: str, *words: object, stdin: str = "") -> str:
        return run("ip", "netns", "exec", self.names[name], *words, stdin=stdin)

    def cable(self, name: str, state: str) -> None:
        """``down``: the machine's cable is pulled out of the switch; ``up``: put back."""
        run("ip", "-n", self.switch, "link", "set", "dev", name, state)

    def end(self) -> None:
        for own in [*self.names.values(), self.switch]:
            with contextlib.suppress(AssertionError):  # it was never made
                run("ip", "netns", "del", own)


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    network = Network()
    probe = subprocess.run(
        ["ip", "netns", "add", network.switch], env={**os.environ, "PATH": PATH}, capture_output=True, text=True
    )
    if probe.returncode:
        pytest.skip(f"no network namespaces here: {probe.stderr.strip()}")
    try:
        network.start()
        yield network
    finally:
        network.end()


@pytest.fixture(scope="module")
def live(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    base = tmp_path_factory.mktemp("network")
    sites = {name: base / "hospitals" / name for name in "abc"}
    for name, folder in sites.items():
        write_site(folder, name)
    inside = {
        name: [shutil.which("ip", path=PATH) or "ip", "netns", "exec", own] for name, own in network.names.items()
    }
    federation = Live(base / "dir", sites, host=SERVER, listen=SERVER, inside=inside)
    federation.provision()
    network.guard(federation.port)
    try:
        federation.start_server()
        for name in sites:
            federation.start_site(name)
        yield federation
    finally:
        federation.end_all()


@pytest.fixture(scope="module")
def job(live: Live) -> Path:
    flat = {
        "name": "walls",
        "data.classes": "left,right",
        "data.size": 16,
        "model.width": 4,
        "train.local_steps": 2,
        "train.batch_size": 8,
        "federation.rounds": 3,
        "federation.min_sites": 2,
        "evaluation.every": 1,
    }
    path = live.path.parent / "walls.toml"
    path.write_text(job_from_flat(flat).toml())
    return path


def listening(network: Network, name: str) -> set[str]:
    """Where something waits for connections or datagrams at that machine, as address:port."""
    lines = network.inside(name, "ss", "--no-header", "--listening", "--numeric", "--tcp", "--udp").splitlines()
    return {line.split()[4] for line in lines}


def test_a_job_completes_though_no_site_can_be_reached(live: Live, network: Network, job: Path) -> None:
    name = live.submit(job)
    until(lambda: live.events(name, "round"), 120, "first round")
    for site in live.sites:
        places = listening(network, site)
        assert places, "the site's own processes talk somewhere"
        assert all(place.startswith(LOOPBACK) for place in places), places
    outside = {place for place in listening(network, "server") if not place.startswith(LOOPBACK)}
    assert outside == {f"{SERVER}:{live.port}"}
    live.follow(name)
    rounds = live.events(name, "round")
    assert [len(event["trained"]) for event in rounds] == [3, 3, 3]
    assert not any(event["dropped"] for event in rounds)


def test_the_firewalls_hold(live: Live, network: Network) -> None:
    """Else the test above would show nothing."""

    def reached(source: str, target: str, port: int) -> bool:
        probe = f"import socket; socket.create_connection(({target!r}, {port}), 1.5)"
        return not subprocess.run([*live.inside[source], "python3", "-c", probe], capture_output=True).returncode

    assert reached("a", SERVER, live.port)
    assert not reached("a", SERVER, live.internal_port)
    assert not reached("a", ADDRESSES["b"], live.port)
    for site in live.sites:
        for place in listening(network, site):
            assert not reached("server", ADDRESSES[site], int(place.rpartition(":")[2]))


def test_a_site_cut_off_for_a_minute_is_missed_and_joins_again(live: Live, network: Network, job: Path) -> None:
    name = live.submit(job, "federation.rounds=2000", "federation.round_timeout=40", "evaluation.every=2000")
    until(lambda: live.events(name, "round"), 120, "first round")
    before = len(live.said("b"))

    def rounds(with_b: bool) -> list[dict[str, Any]]:
        events = live.events(name, "round")
        return [event for event in events if ("b" in {item["site"] for item in event["trained"]}) == with_b]

    network.cable("b", "down")
    began = time.monotonic()
    try:
        until(lambda: rounds(with_b=False), 120, "a round without b")
        until(lambda: time.monotonic() - began > CUT, 2 * CUT, "end of the cut")
    finally:
        network.cable("b", "up")
    back = live.events(name, "round")[-1]["round"]
    until(lambda: rounds(with_b=True)[-1]["round"] > back, 120, "a round with b after the cut")
    live.consilium("run", "--federation", live.path, "--stop", name)

    events = live.events(name, "round")
    assert [event["round"] for event in events] == [*range(1, len(events) + 1)]
    for event in events:
        lost = {item["site"]: item["reason"] for item in event["dropped"]}
        assert {item["site"] for item in event["trained"]} | lost.keys() == set("abc")
        assert set(lost.items()) <= {("b", "no-reply"), ("b", "site-gone")}
    said = live.said("b")[before:]
    assert "the server cannot be reached; trying again until it can" in said
    assert said.rindex("connected; waiting for work") > said.index("cannot be reached")

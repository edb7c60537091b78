"""The way to the server: against real TLS servers on loopback, each wrong in one way."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives import hashes

from client.preflight import Finding, Level
from client.preflight_answer import clock
from client.preflight_server import proxy_for, server
from server.pki import words
from shared.sitefile import Connection
from tests.client.gateway import DAY, FACTS, Authority, Server, serving

OK, ATTENTION, STOP = Level.OK, Level.ATTENTION, Level.STOP


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ca")


def look(address: str, authority: Authority | Path) -> dict[str, Finding]:
    """The findings by title; each title comes once."""
    ca = authority if isinstance(authority, Path) else authority.file
    found = list(server(Connection(address, ca, ca, 9094)))
    assert len({finding.title for finding in found}) == len(found)
    assert all(finding.todo for finding in found if finding.level)
    return {finding.title: finding for finding in found}


def levels(found: dict[str, Finding]) -> dict[str, Level]:
    return {title: finding.level for title, finding in found.items()}


def test_a_server_as_it_should_be_is_asked_once_and_found_well(authority: Authority) -> None:
    with serving(authority.sign("127.0.0.1")) as good:
        found = look(good.address, authority)
    assert levels(found) == {
        "authority": OK, "server": OK, "server's certificate": OK, "clock": OK, "versions": OK,
    }  # fmt: skip
    assert good.asked == ["GET /consilium"]
    assert "chest-council" in found["server"].words
    assert words(authority.certificate.fingerprint(hashes.SHA256())) in found["authority"].words
    assert "364 more days" in found["server's certificate"].words
    (digest,) = re.findall(r"SHA-256 ([0-9A-F: ]+)", found["authority"].words)
    assert bytes.fromhex(digest.replace(":", "")) == authority.certificate.fingerprint(hashes.SHA256())


def test_a_certificate_of_another_authority_is_named_with_its_signer(authority: Authority, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other", "Inspecting Firewall")
    with serving(other.sign("127.0.0.1")) as wrong:
        found = look(wrong.address, authority)
    assert levels(found) == {"authority": OK, "server's certificate": STOP}
    assert "signed by Inspecting Firewall" in found["server's certificate"].words
    assert "TLS inspection" in found["server's certificate"].todo
    assert wrong.asked == []  # nothing is sent over a connection that is not trusted


def test_a_certificate_for_another_name_says_for_which(authority: Authority) -> None:
    with serving(authority.sign("consilium.example.org", "10.1.2.3")) as wrong:
        found = look(wrong.address, authority)
        named = look(wrong.address.replace("127.0.0.1", "localhost"), authority)
    assert levels(found) == levels(named) == {"authority": OK, "server's certificate": STOP}
    assert "not for 127.0.0.1, only for consilium.example.org, 10.1.2.3" in found["server's certificate"].words
    assert "not for localhost" in named["server's certificate"].words
    assert wrong.asked == []


@pytest.mark.parametrize(
    ("start", "end", "word"), [(-9 * DAY, -2 * DAY, "has expired since"), (2 * DAY, 9 * DAY, "not valid yet before")]
)
def test_a_certificate_out_of_its_time_says_when_and_speaks_of_the_clock(
    authority: Authority, start: timedelta, end: timedelta, word: str
) -> None:
    with serving(authority.sign("127.0.0.1", start=start, end=end)) as wrong:
        found = look(wrong.address, authority)
    assert found["server's certificate"].level is STOP
    assert word in found["server's certificate"].words
    assert "clock" in found["server's certificate"].todo
    assert wrong.asked == []


@pytest.mark.parametrize(("days", "level"), [(29, ATTENTION), (31, OK)])
def test_a_certificate_that_ends_soon_is_worth_a_word(authority: Authority, days: int, level: Level) -> None:
    with serving(authority.sign("127.0.0.1", end=days * DAY + timedelta(hours=1))) as soon:
        found = look(soon.address, authority)
    assert found["server's certificate"].level is level
    assert f"{days} more days" in found["server's certificate"].words
    assert found["server"].level is OK


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"status": 502, "body": b"<html>"}, "what stands behind it does not run (HTTP 502)"),
        ({"status": 404, "body": b""}, "not as a Consilium server does (HTTP 404)"),
        ({"body": b"It works!"}, "not as a Consilium server does (HTTP 200)"),
        ({"facts": {"version": 1}}, "not as a Consilium server does (HTTP 200)"),
        ({"status": 403}, "turns this machine away (HTTP 403)"),
        ({"status": 302, "location": "https://login.hospital.example/"}, "sends on to https://login.hospital"),
    ],
)
def test_another_answer_than_the_gateways_stops_but_clock_and_certificate_are_still_told(
    authority: Authority, settings: dict[str, Any], words: str
) -> None:
    with serving(authority.sign("127.0.0.1"), **settings) as wrong:
        found = look(wrong.address, authority)
    assert levels(found) == {"authority": OK, "server": STOP, "server's certificate": OK, "clock": OK}
    assert words in found["server"].words


def test_a_server_cannot_play_tricks_on_the_terminal(authority: Authority) -> None:
    with serving(authority.sign("127.0.0.1"), facts=FACTS | {"federation": "\x1b[2Jcouncil\n" + "x" * 5000}) as odd:
        words = look(odd.address, authority)["server"].words
    assert "[2Jcouncilxxx" in words
    assert words.isprintable()
    assert len(words) < 300


def test_an_answer_without_end_is_not_read_to_the_end(authority: Authority) -> None:
    with serving(authority.sign("127.0.0.1"), body=b"x" * 50_000_000) as odd:
        assert look(odd.address, authority)["server"].level is STOP


def test_plain_http_is_told_from_a_bad_certificate(authority: Authority) -> None:
    with serving(None) as wrong:
        found = look(wrong.address, authority)
    assert levels(found) == {"authority": OK, "server": STOP}
    assert "not with TLS" in found["server"].words or "cut" in found["server"].words
    assert wrong.asked == []


def test_where_nothing_listens_the_machine_is_still_there(authority: Authority) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        found = look(f"127.0.0.1:{free.getsockname()[1]}", authority)
    assert levels(found) == {"authority": OK, "server": STOP}
    assert "nothing listens" in found["server"].words


def test_a_name_that_nobody_knows_is_a_matter_of_dns(authority: Authority) -> None:
    found = look("no-such-host.invalid:8443", authority)
    assert "the name no-such-host.invalid is not known" in found["server"].words
    assert "DNS" in found["server"].todo


@pytest.fixture
def silent() -> Iterator[str]:
    """A port where connections are taken and nothing is ever said."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"127.0.0.1:{listening.getsockname()[1]}"


def test_silence_is_laid_to_a_firewall(silent: str, authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.preflight_server.PATIENCE", 0.3)
    found = look(silent, authority)
    assert found["server"].level is STOP
    assert "firewall" in found["server"].todo


def test_a_connection_that_is_cut_says_so(authority: Authority) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def cut() -> None:
            for _ in range(2):
                taken, _ = listening.accept()
                taken.close()

        threading.Thread(target=cut, daemon=True).start()
        found = look(f"127.0.0.1:{listening.getsockname()[1]}", authority)
    assert found["server"].level is STOP
    assert "firewall" in found["server"].todo


def test_a_port_that_cannot_be_is_no_crash(authority: Authority) -> None:
    assert "at most 65535" in look("127.0.0.1:99999", authority)["server"].words


@pytest.mark.parametrize(
    ("ahead", "level", "words"),
    [
        (0, OK, "agrees"),
        (-60, STOP, "ahead of the server's; messages of 5 s in the future are refused"),
        (30, OK, "behind"),
        (70, ATTENTION, "behind"),
        (250, STOP, "behind the server's; messages of five minutes in the past are refused"),
        (90000, STOP, "behind"),
    ],
)
def test_a_clock_is_measured_against_the_servers(authority: Authority, ahead: float, level: Level, words: str) -> None:
    """``ahead`` is the server's clock: then the site's is behind."""
    with serving(authority.sign("127.0.0.1"), ahead=ahead) as skewed:
        found = look(skewed.address, authority)
    assert found["clock"].level is level
    assert words in found["clock"].words


@pytest.mark.parametrize(
    ("date", "level"),
    [(995, OK), (994.9, ATTENTION), (993.1, ATTENTION), (992.9, STOP), (1059.8, OK), (1060, ATTENTION), (1240, STOP)],
)
def test_the_limits_of_the_clock(date: float, level: Level) -> None:
    """Asked at 998, answered at 999.9: the server's second began at ``date``, its clock was at most 1 s further.

    The site is thus surely ahead by 998 - (date + 1), or behind by date - 999.9.
    """
    assert clock(date, 998.0, 999.9).level is level


@pytest.mark.parametrize(
    ("facts", "level", "words"),
    [
        ({"version": "0.0.9"}, STOP, "the server runs consilium 0.0.9"),
        ({"flwr": "1.38.2"}, STOP, "install flwr 1.38 here"),
        ({"flwr": ".".join([*FACTS["flwr"].split(".")[:2], "99"])}, OK, ".99 there"),
    ],
)
def test_versions_must_agree(authority: Authority, facts: dict[str, str], level: Level, words: str) -> None:
    with serving(authority.sign("127.0.0.1"), facts=FACTS | facts) as other:
        found = look(other.address, authority)
    assert found["versions"].level is level
    assert words in found["versions"].words + found["versions"].todo


def _missing(folder: Path) -> Path:
    return folder / "ca.crt"


def _key_instead(folder: Path) -> Path:
    (folder / "ca.crt").write_text("-----BEGIN PRIVATE KEY-----\nMII=\n-----END PRIVATE KEY-----\n")
    return folder / "ca.crt"


def _expired(folder: Path) -> Path:
    return Authority(folder / "old", lasts=-DAY).file


@pytest.mark.parametrize(
    ("make", "words"),
    [(_missing, "no such file"), (_key_instead, "not a certificate in PEM form"), (_expired, "has expired")],
)
def test_without_an_authority_nothing_is_asked(tmp_path: Path, make: Callable[[Path], Path], words: str) -> None:
    with serving(Authority(tmp_path / "a").sign("127.0.0.1")) as good:
        found = look(good.address, make(tmp_path))
    assert levels(found) == {"authority": STOP}
    assert words in found["authority"].words
    assert good.asked == []


# --- proxies ----------------------------------------------------------------------------------------------------------


def test_a_proxy_of_the_environment_is_taken_and_named(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(authority.sign("127.0.0.1")) as good, serving(None) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://user:geheim@{proxy.address}")
        found = look(good.address, authority)
        assert proxy.asked == [f"CONNECT {good.address}"]
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        direct = look(good.address, authority)
    assert levels(found) == levels(direct)
    assert set(levels(found).values()) == {OK}
    assert f"through the proxy http://{proxy.address}" in found["server"].words
    assert "geheim" not in str(found)
    assert "proxy" not in direct["server"].words
    assert len(proxy.asked) == 1


@pytest.mark.parametrize("status", [407, 403])
def test_a_proxy_that_turns_the_site_away_is_named(
    authority: Authority, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    with serving(None, status=status) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://user:geheim@{proxy.address}")
        found = look("consilium.example.org:8443", authority)
    assert levels(found) == {"authority": OK, "server": STOP}
    assert f"by the proxy http://{proxy.address}" in found["server"].words
    assert str(status) in found["server"].words
    assert "NO_PROXY" in found["server"].todo
    assert "geheim" not in str(found)


@pytest.mark.parametrize("host", ["consilium.example.org", "example.org", "10.0.0.5", "localhost", "127.0.0.1", "::1"])
@pytest.mark.parametrize(
    "exceptions",
    ["", "*", "example.org", ".example.org", "*.example.org", "10.0.0.0/8", "10.0.0.5", "a, localhost", "ample.org",
     "::1", "EXAMPLE.ORG", "0.0.5"],
)  # fmt: skip
def test_the_proxy_that_is_named_is_the_one_that_httpx_takes(
    host: str, exceptions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    monkeypatch.setenv("NO_PROXY", exceptions)
    with httpx.Client(trust_env=True) as client:
        url = httpx.URL(f"https://[{host}]:8443/" if ":" in host else f"https://{host}:8443/")
        taken = client._transport_for_url(url) is not client._transport
    assert bool(proxy_for(host)) is taken


def test_the_server_of_these_tests_is_one(authority: Authority) -> None:
    """The oracle of the oracle: plain httpx with trust in the authority gets the facts."""
    import ssl

    with serving(authority.sign("127.0.0.1")) as good:
        assert isinstance(good, Server)
        context = ssl.create_default_context(cafile=str(authority.file))
        context.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)
        assert httpx.get(f"https://{good.address}/consilium", verify=context).json() == FACTS

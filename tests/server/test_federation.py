"""federation.toml: what it takes, and that every mistake is one line that says what to do."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.federation import Folder, is_address, is_host, read_federation
from shared.errors import UserError

GOOD = """
name = "chest-council"
[server]
host = "fl.example.org"
[sites.north]
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "federation.toml"
    path.write_text(text)
    return path


def test_a_folder_without_a_federation_and_a_file_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^{tmp_path}: no federation was set up here; do so with `consilium provision"):
        Folder(tmp_path).read()
    path = write(tmp_path, GOOD)
    with pytest.raises(UserError, match=r"is a file; name the folder that was given to `consilium provision --out`$"):
        Folder(path).read()


def test_everything_it_may_say(tmp_path: Path) -> None:
    federation = read_federation(
        write(
            tmp_path,
            """
name = "chest-council"
[server]
host = "fl.example.org"
also = ["10.0.0.5", "fd00::5"]
listen = "::"
port = 443
internal_port = 9000
[sites.hospital-north]
contact = "it@north.example.org"
[sites.south]
key = "keys/south.pub"
""",
        )
    )
    assert (federation.name, federation.address, federation.also) == (
        "chest-council",
        "fl.example.org:443",
        ("10.0.0.5", "fd00::5"),
    )
    assert (federation.listen, federation.port, federation.internal_port) == ("::", 443, 9000)
    north, south = federation.sites
    assert (north.name, north.contact, north.key) == ("hospital-north", "it@north.example.org", None)
    assert (south.name, south.contact, south.key) == ("south", "", tmp_path / "keys" / "south.pub")


def test_what_is_left_out_has_its_default(tmp_path: Path) -> None:
    federation = read_federation(write(tmp_path, GOOD))
    assert (federation.listen, federation.port, federation.internal_port) == ("0.0.0.0", 8443, 8444)


def test_an_address_of_version_6_stands_in_brackets(tmp_path: Path) -> None:
    text = GOOD.replace("fl.example.org", "fd00::5")
    assert read_federation(write(tmp_path, text)).address == "[fd00::5]:8443"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('name = "chest-council"', "", ["name:", "chest-council"]),
        ("chest-council", "chest council", ["name:"]),
        ('"chest-council"', "7", ["name = 7", "text in quotes"]),
        ('host = "fl.example.org"', "", ["host is missing"]),
        ("host", "hots", ["'server.hots'", "did you mean 'host'"]),
        ("[server]", "[sever]", ["'sever'", "did you mean 'server'"]),
        ("fl.example.org", "https://fl.example.org", ["server.host", "neither a host name nor"]),
        ("fl.example.org", "10.0.0", ["server.host"]),
        ("[sites.north]", 'also = ["x y"]', ["server.also", "'x y'"]),
        ("[sites.north]", 'also = "10.0.0.5"', ["server.also", "list of texts"]),
        ("[sites.north]", 'listen = "localhost"', ["server.listen", "IP address"]),
        ("[sites.north]", "port = 0", ["server.port = 0", "65535"]),
        ("[sites.north]", "port = true", ["server.port = True", "whole number"]),
        ("[sites.north]", "port = 8444", ["both 8444"]),
        ("[sites.north]", '[sites."a b"]', ["'a b'"]),
        ("[sites.north]", '[sites."../x"]', ["'../x'"]),
        ("[sites.north]", "[sites.north]\n[sites.North]", ["upper and lower case"]),
        ("[sites.north]", '[sites.north]\nkey = ""', ["sites.north.key is empty"]),
        ("[sites.north]", '[sites.north]\nkay = "n.pub"', ["'sites.north.kay'", "did you mean 'key'"]),
        ("[sites.north]", '[sites.north]\ncontact = "a\\nb"', ["sites.north.contact"]),
        ("[sites.north]", '[sites]\nnorth = "n.pub"', ["sites.north", "must be a table"]),
        ("[server]", "server = 1\n[other]", ["server = 1", "must be a table"]),
    ],
)
def test_a_mistake_is_one_line_that_names_file_and_key(tmp_path: Path, old: str, new: str, words: list[str]) -> None:
    path = write(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(UserError) as caught:
        read_federation(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    for word in words:
        assert word in text


@given(st.ip_addresses())
def test_every_address_is_one(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    assert is_address(str(address))
    assert is_host(str(address))


@pytest.mark.parametrize("text", ["", "-a.b", "a..b", "a_b", "a.b.", "x" * 64, "1.2.3.4.5", "fe80::1%eth0", "a\n"])
def test_what_is_no_host(text: str) -> None:
    assert not is_host(text)


def test_a_folder_without_a_federation_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="consilium provision"):
        Folder(tmp_path).read()


def test_the_sites_of_a_folder_are_those_with_a_key(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    for name in ("b", "a", "c"):
        (folder.sites / name).mkdir(parents=True)
    for name in ("b", "a"):
        folder.node_pub(name).write_text("key")
    assert folder.site_names() == ["a", "b"]

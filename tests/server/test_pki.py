"""Keys and certificates, judged by OpenSSL and OpenSSH."""

from __future__ import annotations

import os
import re
import ssl
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.supercore.primitives.asymmetric import uses_nist_ec_curve

from server import pki
from shared.errors import UserError

NOW = datetime.now(UTC).replace(microsecond=0)
HOSTS = ["fl.example.org", "10.0.0.5", "fd00::5", "localhost", "127.0.0.1"]


def tool(*words: object, stdin: str = "") -> str:
    done = subprocess.run(list(map(str, words)), input=stdin, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A folder with ca.crt, ca.key, server.crt, server.key."""
    ca, ca_key = pki.make_ca("council", NOW)
    pki.write_file(tmp_path / "ca.crt", ca)
    pki.write_file(tmp_path / "ca.key", ca_key, 0o600)
    pair = pki.make_server_certificate(
        "council",
        HOSTS,
        pki.read_certificate(tmp_path / "ca.crt"),
        pki.read_private_key(tmp_path / "ca.key"),
        NOW,
    )
    pki.write_file(tmp_path / "server.crt", pair[0])
    pki.write_file(tmp_path / "server.key", pair[1], 0o600)
    return tmp_path


@pytest.mark.parametrize("host", ["-verify_hostname fl.example.org", "-verify_ip 10.0.0.5", "-verify_ip fd00::5"])
def test_openssl_verifies_the_chain_strictly_for_every_name(made: Path, host: str) -> None:
    words = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", made / "ca.crt"]
    assert "OK" in tool(*words, *host.split(), made / "server.crt")


def test_openssl_refuses_another_name_another_authority_and_the_day_after(made: Path) -> None:
    def verdict(ca: Path, *more: str) -> int:
        words = ["openssl", "verify", "-x509_strict", "-CAfile", str(ca), *more, str(made / "server.crt")]
        return subprocess.run(words, capture_output=True, timeout=60).returncode

    pki.write_file(made / "other.crt", pki.make_ca("council", NOW)[0])
    end = NOW + timedelta(days=pki.SERVER_DAYS)
    assert verdict(made / "ca.crt", "-verify_hostname", "evil.example.org") != 0
    assert verdict(made / "other.crt") != 0
    assert verdict(made / "ca.crt", "-attime", str(int(end.timestamp()) - 60)) == 0
    assert verdict(made / "ca.crt", "-attime", str(int(end.timestamp()) + 60)) != 0
    assert verdict(made / "ca.crt", "-attime", str(int(NOW.timestamp()) - 1800)) == 0  # a clock half an hour slow


def test_what_openssl_reads_in_them(made: Path) -> None:
    ca = tool("openssl", "x509", "-in", made / "ca.crt", "-noout", "-text")
    server = tool("openssl", "x509", "-in", made / "server.crt", "-noout", "-text")
    assert "CA:TRUE, pathlen:0" in ca
    assert "secp384r1" in ca
    assert re.search(r"Key Usage: critical\s+Certificate Sign, CRL Sign\n", ca)
    assert "CA:FALSE" in server
    assert "prime256v1" in server
    assert re.search(r"Key Usage: critical\s+Digital Signature\n", server)
    assert re.search(r"Extended Key Usage: ?\s+TLS Web Server Authentication\n", server)
    dates = [
        datetime.strptime(line.split("=")[1], "%b %d %H:%M:%S %Y %Z")
        for line in tool("openssl", "x509", "-in", made / "server.crt", "-noout", "-dates").splitlines()
    ]
    assert timedelta(days=390) < dates[1] - dates[0] <= timedelta(days=397)


def test_a_server_certificate_does_not_outlive_its_authority(made: Path) -> None:
    ca = pki.read_certificate(made / "ca.crt")
    late = NOW + timedelta(days=pki.CA_DAYS - 10)
    pem, _ = pki.make_server_certificate("council", HOSTS, ca, pki.read_private_key(made / "ca.key"), late)
    pki.write_file(made / "late.crt", pem)
    assert pki.read_certificate(made / "late.crt").not_valid_after_utc == ca.not_valid_after_utc


def test_fingerprints_are_those_of_the_usual_tools(made: Path) -> None:
    digest, shown = pki.fingerprint(made / "ca.crt")
    usual = tool("openssl", "x509", "-in", made / "ca.crt", "-noout", "-fingerprint", "-sha256").strip()
    assert shown == f"SHA-256 {usual.split('=')[1]}"
    assert bytes.fromhex(usual.split("=")[1].replace(":", "")) == digest


def test_a_site_key_is_one_that_openssh_and_flower_read(tmp_path: Path) -> None:
    from flwr.supernode.cli.flower_supernode import load_ssh_private_key  # what Flower itself reads it with

    private = pki.make_node_key()
    pki.write_file(tmp_path / "node.key", private, 0o600)
    line = pki.public_line(pki.parse_private_key(private), "north")
    (tmp_path / "node.pub").write_text(line)
    assert tool("ssh-keygen", "-y", "-f", tmp_path / "node.key").split()[:2] == line.split()[:2]
    bits, shown, name, kind = tool("ssh-keygen", "-lf", tmp_path / "node.pub").split()
    assert (bits, name, kind) == ("384", "north", "(ECDSA)")
    assert pki.fingerprint(tmp_path / "node.pub") == pki.fingerprint(tmp_path / "node.key")
    assert pki.fingerprint(tmp_path / "node.pub")[1] == shown
    key = load_ssh_private_key(private, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert uses_nist_ec_curve(key.public_key())


def test_keys_that_ssh_keygen_made_are_taken_where_flower_takes_them(tmp_path: Path) -> None:
    for kind, bits in (("ecdsa", "256"), ("ecdsa", "384"), ("ecdsa", "521")):
        path = tmp_path / f"{kind}{bits}"
        tool("ssh-keygen", "-q", "-t", kind, "-b", bits, "-N", "", "-C", "a comment", "-f", path)
        assert pki.read_node_pub(path.with_suffix(".pub")) == " ".join(path.with_suffix(".pub").read_text().split()[:2])
    tool("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "ed")
    with pytest.raises(UserError, match=r"NIST curves, its kind is ssh-ed25519.*keygen"):
        pki.read_node_pub(tmp_path / "ed.pub")
    with pytest.raises(UserError, match="PRIVATE key, which must never leave"):
        pki.read_node_pub(tmp_path / "ecdsa384")
    cut = (tmp_path / "ecdsa384.pub").read_text()[:60]
    (tmp_path / "cut.pub").write_text(cut)
    with pytest.raises(UserError, match=r"cut\.pub: the key is damaged"):
        pki.read_node_pub(tmp_path / "cut.pub")


def test_an_encrypted_key_is_refused_in_one_line(tmp_path: Path) -> None:
    tool("ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "secret", "-f", tmp_path / "locked")
    with pytest.raises(UserError, match="is not an unencrypted private key"):
        pki.read_private_key(tmp_path / "locked")


def test_words_name_the_first_128_bits(tmp_path: Path) -> None:
    # Trezor's published vectors of BIP-39 for 128 bits.
    assert pki.words(bytes.fromhex("7f" * 16) + b"rest") == " ".join(["legal winner thank year wave sausage worth"]) + (
        " useful legal winner thank yellow"
    )
    assert pki.words(bytes(32)) == "abandon " * 11 + "about"
    digest = os.urandom(32)
    assert pki.words(digest) != pki.words(bytes([digest[0] ^ 1]) + digest[1:])
    assert pki.words(digest) == pki.words(digest[:16])


def test_a_private_file_is_never_readable_to_others_not_even_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []
    real = os.fsync

    def watch(handle: int) -> None:
        modes.extend(path.stat().st_mode & 0o777 for path in tmp_path.iterdir())
        real(handle)

    opened = os.open

    def first(path: object, flags: int, mode: int = 0o777, **more: object) -> int:
        handle = opened(path, flags, mode, **more)  # type: ignore[arg-type]
        modes.append(os.fstat(handle).st_mode & 0o777)
        return handle

    monkeypatch.setattr(os, "fsync", watch)
    monkeypatch.setattr(os, "open", first)
    before = os.umask(0)
    try:
        pki.write_file(tmp_path / "key", b"secret", 0o600)
    finally:
        os.umask(before)
    assert modes == [0o600, 0o600]
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600


def test_a_file_that_cannot_be_written_whole_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_bytes(b"old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        pki.write_file(tmp_path / "key", b"new", 0o600)
    assert [path.name for path in tmp_path.iterdir()] == ["key"]
    assert (tmp_path / "key").read_bytes() == b"old"


def test_python_takes_the_certificate_under_its_strictest_rules(made: Path) -> None:
    """Python 3.13 turns VERIFY_X509_STRICT on by default; httpx, which Flower calls with, uses Python's ssl."""
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context(cafile=str(made / "ca.crt"))
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    server.load_cert_chain(made / "server.crt", made / "server.key")
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    here = client.wrap_bio(to_client, to_server, server_hostname="fl.example.org")
    there = server.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(3):
        for side in (here, there):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    assert here.version() == "TLSv1.3"
    assert ("DNS", "fl.example.org") in here.getpeercert()["subjectAltName"]

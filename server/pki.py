"""Keys and certificates of a federation: its own authority, the server's certificate, the sites' key pairs.

Flower's sites cannot present client certificates. So the server proves itself to a site by a certificate of the
federation's own authority (CA), and a site proves itself to the server by an ECDSA key that is registered there.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import os
from base64 import b64decode, b64encode
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from server.federation import is_address
from shared.errors import UserError

CA_DAYS = 3652  # ten years
SERVER_DAYS = 396  # with the hour below no more than the 397 days that strict clients accept
BEFORE = timedelta(hours=1)  # certificates begin a little earlier, for sites whose clock is slow
RENEW_DAYS = 60  # a server certificate with less left is renewed
NODE_KEY = "ecdsa-sha2-nistp384"
NIST = {"ecdsa-sha2-nistp256": "P-256", NODE_KEY: "P-384", "ecdsa-sha2-nistp521": "P-521"}


def write_file(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Write a file whole or not at all; it has its ``mode`` from the first byte on, so a key is never readable."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(handle, mode)  # whatever the umask took away
            file.write(content)
            file.flush()
            os.fsync(handle)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def make_ca(name: str, now: datetime) -> tuple[bytes, bytes]:
    """A new authority named for the federation: certificate and key (P-384), both PEM."""
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Consilium certificate authority"),
            x509.NameAttribute(NameOID.COMMON_NAME, name),
        ]
    )
    own = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    certificate = (
        _builder(subject, subject, key.public_key(), now, CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign_certificates=True), critical=True)
        .add_extension(own, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own), critical=False)
        .sign(key, hashes.SHA384())
    )
    return certificate.public_bytes(serialization.Encoding.PEM), _pem(key)


def make_server_certificate(
    name: str, hosts: Sequence[str], ca: x509.Certificate, ca_key: ec.EllipticCurvePrivateKey, now: datetime
) -> tuple[bytes, bytes]:
    """A new certificate for the server, with a new key (P-256): both PEM.

    Args:
        hosts: names and addresses by which the server is reached.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Consilium server"),
            x509.NameAttribute(NameOID.COMMON_NAME, name),
        ]
    )
    issuer = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    certificate = (
        _builder(subject, ca.subject, key.public_key(), now, SERVER_DAYS, ca.not_valid_after_utc)
        .add_extension(x509.SubjectAlternativeName(_names(hosts)), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(sign_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer), critical=False)
        .sign(ca_key, hashes.SHA384())
    )
    return certificate.public_bytes(serialization.Encoding.PEM), _pem(key)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    now: datetime,
    days: int,
    latest: datetime | None = None,
) -> x509.CertificateBuilder:
    end = now + timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BEFORE)
        .not_valid_after(min(end, latest) if latest else end)
    )


def _usage(sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _names(hosts: Sequence[str]) -> list[x509.GeneralName]:
    return [x509.IPAddress(ipaddress.ip_address(host)) if is_address(host) else x509.DNSName(host) for host in hosts]


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def read_certificate(path: Path) -> x509.Certificate:
    """The first certificate of a PEM file.

    Raises:
        UserError: it cannot be read or holds none.
    """
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{path}: is not a certificate (PEM)") from None


def read_private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """An unencrypted EC key of a PEM or OpenSSH file.

    Raises:
        UserError: it cannot be read or is no such key.
    """
    try:
        return parse_private_key(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{path}: is not an unencrypted private key on a NIST curve") from None


def parse_private_key(content: bytes) -> ec.EllipticCurvePrivateKey:
    """An unencrypted EC key, PEM or OpenSSH. Raises ValueError if it is no such key."""
    load = (
        serialization.load_ssh_private_key
        if b"BEGIN OPENSSH PRIVATE KEY" in content
        else serialization.load_pem_private_key
    )
    try:
        key = load(content, password=None)
    except (TypeError, UnsupportedAlgorithm) as error:
        raise ValueError(str(error)) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("not on an elliptic curve")
    return key


def belong_together(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> bool:
    """Whether ``key`` is the one the certificate speaks of."""
    form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    return certificate.public_key().public_bytes(*form) == key.public_key().public_bytes(*form)


def issued_by(certificate: x509.Certificate, ca: x509.Certificate) -> bool:
    """Whether the authority signed the certificate."""
    try:
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def is_for(certificate: x509.Certificate, hosts: Sequence[str]) -> bool:
    """Whether the certificate names exactly these hosts, in this order."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return False
    return list(names) == _names(hosts)


def common_name(certificate: x509.Certificate) -> str:
    """The name it was made out to: here the federation's."""
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else ""


def days_left(certificate: x509.Certificate, now: datetime | None = None) -> float:
    """How many days from ``now`` (UTC) a certificate is still valid; negative once it has expired."""
    return (certificate.not_valid_after_utc - (now or datetime.now(UTC))) / timedelta(days=1)


def make_node_key() -> bytes:
    """A site's private key (P-384) in OpenSSH's format, unencrypted: the only one that Flower reads."""
    key = ec.generate_private_key(ec.SECP384R1())
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )


def public_line(key: ec.EllipticCurvePrivateKey, comment: str) -> str:
    """The public half as a line in OpenSSH's format."""
    form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    return f"{key.public_key().public_bytes(*form).decode()} {comment}\n"


def read_node_pub(path: Path) -> str:
    """A site's public key, ``type base64``, without its comment.

    Raises:
        UserError: the file is no public key that Flower takes.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the site makes it with `consilium site keygen`") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if b"PRIVATE KEY" in text:
        raise UserError(
            f"{path}: this is a PRIVATE key, which must never leave the site; have the site make a new pair with "
            "`consilium site keygen` and send only the .pub file"
        )
    words = text.decode("ascii", errors="replace").split()
    kind = words[0] if words else ""
    if len(words) < 2 or kind not in NIST:
        found = (
            f"its kind is {kind}" if kind.startswith(("ssh-", "ecdsa-", "sk-")) else "it is none in OpenSSH's format"
        )
        raise UserError(f"{path}: Flower takes ECDSA keys on NIST curves, {found}; use `consilium site keygen`")
    try:
        key = serialization.load_ssh_public_key(" ".join(words[:2]).encode())
    except (ValueError, UnsupportedAlgorithm):
        raise UserError(f"{path}: the key is damaged; copy the .pub file once more, whole") from None
    form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    return key.public_bytes(*form).decode()


def certificate_digest(certificate: x509.Certificate) -> bytes:
    """SHA-256 of the certificate, as every tool computes it."""
    return certificate.fingerprint(hashes.SHA256())


def key_digest(line: str) -> bytes:
    """SHA-256 of an OpenSSH public key, as `ssh-keygen -l` computes it."""
    return hashlib.sha256(b64decode(line.split()[1])).digest()


def hexadecimal(digest: bytes) -> str:
    """As `openssl x509 -fingerprint` writes it."""
    return digest.hex(":").upper()


def ssh_form(digest: bytes) -> str:
    """As `ssh-keygen -l` writes it."""
    return "SHA256:" + b64encode(digest).decode().rstrip("=")


def fingerprint(path: Path) -> tuple[bytes, str]:
    """Digest of a certificate, or of a site's key (public or private half), and as the usual tools write it.

    Raises:
        UserError: it is none of these.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if b"BEGIN CERTIFICATE" in content:
        digest = certificate_digest(read_certificate(path))
        return digest, f"SHA-256 {hexadecimal(digest)}"
    private = b"PRIVATE KEY" in content
    digest = key_digest(public_line(read_private_key(path), "-") if private else read_node_pub(path))
    return digest, ssh_form(digest)


def words(digest: bytes) -> str:
    """The first 128 bits of a digest as twelve English words, to be read over the phone.

    BIP-39's list of 2,048 words: no two begin with the same four letters, and the last word holds a checksum. 128 bits
    are more than anybody can search for a second key that reads the same.
    """
    from mnemonic import Mnemonic

    return str(Mnemonic("english").to_mnemonic(digest[:16]))


def words_lines(digest: bytes) -> list[str]:
    """The same for a screen: two lines of six, which no terminal breaks."""
    told = words(digest).split()
    return ["  words to compare by phone:", f"    {' '.join(told[:6])}", f"    {' '.join(told[6:])}"]

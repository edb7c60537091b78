"""The coordinator's key that signs releases: Ed25519, in PEM files."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from shared.errors import UserError


def keygen(path: Path) -> tuple[Path, str]:
    """Write a new private key (PEM, for its owner's eyes) and its public half beside it; gives that and its print.

    Raises:
        UserError: there is a file of that name, or it cannot be written.
    """
    public = path.with_name(path.name + ".pub")
    if path.exists() or public.exists():
        raise UserError(f"{path}: there is a key of that name already; name another file")
    key = Ed25519PrivateKey.generate()
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(key.private_bytes(*form))
        public.write_bytes(to_pem(key.public_key()))
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    return public, fingerprint(key.public_key())


def to_pem(key: Ed25519PublicKey) -> bytes:
    """The public key as text, as it stands beside a release."""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def fingerprint(key: Ed25519PublicKey) -> str:
    """SHA-256 of the raw public key, in hexadecimal."""
    raw = key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return hashlib.sha256(raw).hexdigest()


def read_private(path: Path) -> Ed25519PrivateKey:
    """A key that ``keygen`` wrote. Raises UserError if it is not there, or is none."""
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; `consilium registry keygen` makes a key") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise UserError(f"{path}: is no unencrypted private key; `consilium registry keygen` makes one") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise UserError(f"{path}: is not an Ed25519 key; `consilium registry keygen` makes one")
    return key


def read_public(path: Path) -> Ed25519PublicKey:
    """Its public half. Raises UserError if it is not there, is none, or differs by a byte from how it is written."""
    try:
        content = path.read_bytes()
        key = serialization.load_pem_public_key(content)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, UnsupportedAlgorithm):
        raise UserError(f"{path}: is no public key (PEM)") from None
    if not isinstance(key, Ed25519PublicKey):
        raise UserError(f"{path}: is not an Ed25519 key")
    if content != to_pem(key):
        raise UserError(f"{path}: was changed since it was written")
    return key

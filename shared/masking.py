"""Secure aggregation's cryptography: keys, masks, shares. No messages here, so that the mathematics is tested alone.

After Bonawitz et al., "Practical secure aggregation for privacy-preserving machine learning", CCS 2017: every pair of
sites agrees on a mask that one adds and the other subtracts, every site adds one more of its own, and the seeds of all
are shared among the sites so that those which last the round out can take away what a lost site left in the sum.
Every seed is of one round only.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
from Crypto.Protocol.SecretSharing import Shamir
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

SEED = 16  # bytes of a seed and of a share of one: 128 bits, one block of Shamir's scheme over GF(2^128)
KEY = 32  # bytes of a public key, and of a key that HKDF gives
SEALED = 12 + 2 * SEED + 16  # bytes of a sealed pair of shares: nonce, pair, tag
CHUNK = 1 << 16  # numbers masked at a time: 256 KiB, which stays in a core's cache
TRIES = 500  # choices of shares tried before a seed is given up, if some of them are false


def new_seed() -> bytes:
    """Fresh randomness of the operating system, ``SEED`` bytes."""
    return os.urandom(SEED)


def threshold(sites: int, share: float, least: int = 0) -> int:
    """How many of a round's sites must last it out: ``share`` of them, always more than half, and not below ``least``.

    More than half, because a server that told two halves different stories of who was lost could else learn both
    kinds of share of a site.
    """
    return max(sites // 2 + 1, math.ceil(share * sites - 1e-9), least)


def derive(secret: bytes, *purpose: str) -> bytes:
    """A key of ``KEY`` bytes by HKDF with SHA-256 (RFC 5869); another for every purpose."""
    return HKDF(SHA256(), KEY, salt=None, info=_packed(purpose)).derive(secret)


def _packed(words: Sequence[str]) -> bytes:
    return json.dumps(["consilium secure aggregation", *words]).encode()  # JSON: no two lists of words are one text


def public_key(seed: bytes) -> bytes:
    """The X25519 public key (RFC 7748) that belongs to a seed, ``KEY`` bytes."""
    return _private(seed).public_key().public_bytes_raw()


def _private(seed: bytes) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(derive(seed, "private key"))


def commitment(seed: bytes) -> bytes:
    """What a site shows of its own mask's seed at first: by it the seed, once put together, is known to be right."""
    return derive(seed, "commitment")


def agree(seed: bytes, theirs: bytes, *purpose: str) -> bytes:
    """The key that the owner of ``seed`` and that of the public key ``theirs`` have in common, for one purpose.

    Raises:
        ValueError: ``theirs`` is not a public key.
    """
    return derive(_private(seed).exchange(X25519PublicKey.from_public_bytes(theirs)), *purpose)


# ---------------------------------------------------------------------- masks


def add_masks(vector: np.ndarray, plus: Iterable[bytes] = (), minus: Iterable[bytes] = ()) -> None:
    """Add to ``vector``, uint32 (d,), in place and modulo 2^32, the masks of some keys, and subtract those of others.

    A mask is the AES-256 key stream in counter mode. A key must have been derived for this mask alone.
    """
    streams = [
        (operation, Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor())
        for operation, keys in ((np.add, plus), (np.subtract, minus))
        for key in keys
    ]
    zeros, room = bytes(4 * CHUNK), np.empty(CHUNK + 4, "<u4")  # update_into wants room for one block more
    into = room.view(np.uint8).data
    for start in range(0, len(vector), CHUNK):
        part = vector[start : start + CHUNK]
        for operation, stream in streams:
            stream.update_into(zeros[: 4 * len(part)], into)
            operation(part, room[: len(part)], out=part)


def own_mask(seed: bytes, tag: str) -> bytes:
    """The key of a site's own mask in the round named by ``tag``."""
    return derive(seed, "own mask", tag)


def pair_masks(me: str, seed: bytes, others: Mapping[str, bytes], tag: str) -> tuple[list[bytes], list[bytes]]:
    """Keys of the masks that ``me`` adds and of those it subtracts, one for each of ``others`` (name: public key).

    Of two sites the one whose name comes first adds: in the sum of both, the mask is gone.

    Raises:
        ValueError: a public key is none.
    """
    plus: list[bytes] = []
    minus: list[bytes] = []
    for name, theirs in others.items():
        pair = sorted((me, name))
        (plus if me == pair[0] else minus).append(agree(seed, theirs, "pair mask", tag, *pair))
    return plus, minus


# ---------------------------------------------------------------------- shares


def share_out(seed: bytes, needed: int, count: int) -> list[bytes]:
    """``count`` shares of a seed, ``SEED`` bytes each (Shamir 1979): ``needed`` give it back, fewer tell nothing."""
    return [share for _, share in Shamir.split(needed, count, seed, ssss=False)]


def put_together(shares: Mapping[int, bytes], needed: int, shown_of: Callable[[bytes], bytes], shown: bytes) -> bytes:
    """The seed behind shares, given by their place in what ``share_out`` gave.

    False shares among them do no harm while ``needed`` true ones are found within ``TRIES`` choices.

    Args:
        shown_of: ``public_key`` or ``commitment``: the right seed is the one that gives ``shown``.

    Raises:
        ValueError: too few shares, or too many false ones.
    """
    if len(shares) >= needed:
        numbered = [(place + 1, share) for place, share in sorted(shares.items())]
        for chosen in _choices(numbered, needed):
            seed = Shamir.combine(chosen, ssss=False)
            if shown_of(seed) == shown:
                return seed
    raise ValueError("the shares do not give the seed")


def _choices(shares: list[tuple[int, bytes]], needed: int) -> Iterator[list[tuple[int, bytes]]]:
    """All choices of so many shares if these are few, else ``TRIES`` at random.

    In order the first thousands of choices would all hold the first share, and that may be the false one.
    """
    if math.comb(len(shares), needed) <= TRIES:
        return map(list, itertools.combinations(shares, needed))
    draw = random.Random(0)
    return (draw.sample(shares, needed) for _ in range(TRIES))


def seal(key: bytes, pair: bytes, *about: str) -> bytes:
    """A pair of shares encrypted for its receiver and bound to ``about`` (ChaCha20-Poly1305, RFC 8439)."""
    nonce = os.urandom(12)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, pair, _packed(about))


def unseal(key: bytes, sealed: bytes, *about: str) -> bytes:
    """What ``seal`` sealed.

    Raises:
        ValueError: it was sealed by another key or about something else, or was changed on its way.
    """
    try:
        return ChaCha20Poly1305(key).decrypt(sealed[:12], sealed[12:], _packed(about))
    except InvalidTag:
        raise ValueError("the sealed shares are not in order") from None

"""Masks, seeds and shares against the libraries used in another way, closed forms and statistics."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from Crypto.Protocol.SecretSharing import Shamir
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from shared.fixedpoint import encode
from shared.masking import (
    CHUNK,
    KEY,
    SEALED,
    SEED,
    add_masks,
    agree,
    commitment,
    derive,
    new_seed,
    own_mask,
    pair_masks,
    public_key,
    put_together,
    seal,
    share_out,
    threshold,
    unseal,
)

SEEDS = {name: bytes([number]) * SEED for number, name in enumerate("abcdef")}
PUBLIC = {name: public_key(seed) for name, seed in SEEDS.items()}


# ---------------------------------------------------------------------- keys


def test_two_sites_agree_on_a_key_that_a_third_does_not_get() -> None:
    key = agree(SEEDS["a"], PUBLIC["b"], "x")
    assert key == agree(SEEDS["b"], PUBLIC["a"], "x")
    assert len(key) == KEY
    assert key != agree(SEEDS["c"], PUBLIC["a"], "x")
    assert key != agree(SEEDS["a"], PUBLIC["b"], "y")


def test_no_two_lists_of_purposes_give_one_key() -> None:
    purposes = [("ab",), ("a", "b"), ("a,b",), ('a", "b',), ("a", "", "b"), ("b", "a"), ()]
    assert len({derive(b"secret", *purpose) for purpose in purposes}) == len(purposes)


@pytest.mark.parametrize("key", [bytes(32), b"\x01" + bytes(31), b"short", b""])
def test_a_public_key_that_is_none_is_refused(key: bytes) -> None:
    """Points of small order would give a secret that everybody knows."""
    with pytest.raises(ValueError):
        agree(SEEDS["a"], key, "x")


def test_seeds_are_fresh_and_the_public_key_is_x25519() -> None:
    assert len({new_seed() for _ in range(100)}) == 100
    seed = new_seed()
    assert len(seed) == SEED
    private = X25519PrivateKey.from_private_bytes(derive(seed, "private key"))
    assert public_key(seed) == private.public_key().public_bytes_raw()
    assert commitment(seed) not in (public_key(seed), own_mask(seed, ""), seed)


@pytest.mark.parametrize(
    ("sites", "share", "expected"),
    [
        (2, 0.51, 2),
        (3, 0.51, 2),
        (3, 0.67, 3),
        (4, 0.51, 3),
        (8, 0.67, 6),
        (16, 0.67, 11),
        (100, 0.67, 67),
        (5, 1.0, 5),
    ],
)
def test_the_threshold_is_the_share_and_more_than_half(sites: int, share: float, expected: int) -> None:
    assert threshold(sites, share) == expected
    assert 2 * threshold(sites, share) > sites


# ---------------------------------------------------------------------- masks


def stream(key: bytes, count: int) -> np.ndarray:
    """The same mask in one piece."""
    whole = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(4 * count))
    return np.frombuffer(whole, "<u4").astype(np.uint64)


@pytest.mark.parametrize("count", [0, 1, 3, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
def test_masks_are_key_streams_added_modulo_two_to_the_32(count: int) -> None:
    keys = [derive(b"k", str(number)) for number in range(5)]
    vector = np.random.default_rng(0).integers(0, 2**32, count, np.uint32)
    expected = vector.astype(np.uint64)
    for key in keys[:3]:
        expected = (expected + stream(key, count)) % 2**32
    for key in keys[3:]:
        expected = (expected + 2**32 - stream(key, count)) % 2**32
    add_masks(vector, keys[:3], keys[3:])
    np.testing.assert_array_equal(vector, expected)


def test_pairwise_masks_vanish_in_the_sum_and_own_masks_stay() -> None:
    total = np.zeros(1000, np.uint32)
    for name, seed in SEEDS.items():
        others = {other: key for other, key in PUBLIC.items() if other != name}
        plus, minus = pair_masks(name, seed, others, "round 1")
        vector = np.zeros(1000, np.uint32)
        add_masks(vector, plus, minus)
        assert np.count_nonzero(vector) > 990
        total += vector
    assert not total.any()


def test_another_round_has_other_masks() -> None:
    keys = {pair_masks("a", SEEDS["a"], {"b": PUBLIC["b"]}, tag)[0][0] for tag in ("j 1", "j 2", "k 1")}
    assert len(keys) == 3
    assert own_mask(SEEDS["a"], "j 1") != own_mask(SEEDS["a"], "j 2")


@pytest.mark.parametrize("kept", ["own mask", "one pair mask"])
def test_a_single_masked_update_looks_uniform(kept: str) -> None:
    """Even if all masks but one are known. Seeds are fixed, so the test gives the same figures each time."""
    update = np.concatenate([np.zeros(200_000), np.full(200_000, 0.01), np.linspace(-1, 1, 200_000)])
    plain = encode(update.copy(), 0.7, 40, [0.6], bound=1.0, sites=8)
    masked = plain.copy()
    key = (
        own_mask(SEEDS["a"], "t") if kept == "own mask" else pair_masks("a", SEEDS["a"], {"b": PUBLIC["b"]}, "t")[0][0]
    )
    add_masks(masked, [key])

    def p_values(vector: np.ndarray) -> list[float]:
        bytes_ = stats.chisquare(np.bincount(vector.view(np.uint8), minlength=256)).pvalue
        return [float(bytes_), float(stats.kstest(vector / 2**32, "uniform").pvalue)]

    assert min(p_values(masked)) > 1e-3
    assert max(p_values(plain)) < 1e-12  # what was masked is seen by these tests
    assert abs(np.corrcoef(masked.astype(float), plain.view(np.int32).astype(float))[0, 1]) < 5 / math.sqrt(len(plain))
    assert stats.chisquare(np.bincount((masked - np.roll(masked, 1)).view(np.uint8), minlength=256)).pvalue > 1e-3


# ---------------------------------------------------------------------- shares


@pytest.mark.parametrize(("needed", "count"), [(2, 2), (2, 3), (3, 5), (4, 6)])
def test_any_enough_shares_give_the_seed_and_fewer_are_refused(needed: int, count: int) -> None:
    seed = new_seed()
    shares = dict(enumerate(share_out(seed, needed, count)))
    assert all(len(share) == SEED for share in shares.values())
    for some in range(count + 1):
        for chosen in itertools.combinations(shares, some):
            held = {place: shares[place] for place in chosen}
            if some >= needed:
                assert put_together(held, needed, commitment, commitment(seed)) == seed
            else:
                with pytest.raises(ValueError, match="do not give"):
                    put_together(held, needed, commitment, commitment(seed))


@given(st.binary(min_size=SEED, max_size=SEED), st.binary(min_size=SEED, max_size=SEED), st.integers(2, 6))
@settings(max_examples=25, deadline=None)
def test_one_share_too_few_fits_every_seed_equally(seed: bytes, other: bytes, needed: int) -> None:
    """To the shares at hand belongs, for any seed, one last share that would give it: they tell nothing (Shamir)."""
    held = [(place + 1, share) for place, share in enumerate(share_out(seed, needed, needed)[: needed - 1])]
    # A polynomial through the held shares and the other seed: interpolated at the last place, from the value at 0.
    last = lagrange([(0, other), *held], needed)
    assert Shamir.combine([*held, (needed, last)], ssss=False) == other


def lagrange(points: list[tuple[int, bytes]], at: int) -> bytes:
    """The value at ``at`` of the polynomial through ``points``, over GF(2^128) with x^128 + x^7 + x^2 + x + 1."""

    def times(a: int, b: int) -> int:
        product = 0
        while b:
            if b & 1:
                product ^= a
            b >>= 1
            a <<= 1
            if a >> 128:
                a ^= (1 << 128) | 0b10000111
        return product

    def inverse(a: int) -> int:
        result = 1
        for _ in range(127):  # a^(2^128 - 2)
            a = times(a, a)
            result = times(result, a)
        return result

    value = 0
    for place, share in points:
        term = int.from_bytes(share, "big")
        for other, _ in points:
            if other != place:
                term = times(term, times(at ^ other, inverse(place ^ other)))
        value ^= term
    return value.to_bytes(SEED, "big")


def test_false_shares_do_no_harm_while_enough_true_ones_are_there() -> None:
    seed = new_seed()
    shares = dict(enumerate(share_out(seed, 3, 6)))
    shares |= {0: bytes(SEED), 2: new_seed()}
    assert put_together(shares, 3, public_key, public_key(seed)) == seed
    shares |= {4: new_seed(), 5: shares[1]}
    with pytest.raises(ValueError, match="do not give"):
        put_together(shares, 3, public_key, public_key(seed))


@pytest.mark.parametrize("false", range(20))
def test_one_false_share_does_no_harm_wherever_it_stands_among_many(false: int) -> None:
    seed = new_seed()
    shares = dict(enumerate(share_out(seed, 14, 20))) | {false: new_seed()}
    assert put_together(shares, 14, commitment, commitment(seed)) == seed


def test_sealed_shares_open_only_for_what_they_were_sealed_for() -> None:
    pair, key = new_seed() + new_seed(), derive(b"k")
    sealed = seal(key, pair, "job 1", "a", "b")
    assert len(sealed) == SEALED
    assert unseal(key, sealed, "job 1", "a", "b") == pair
    assert sealed != seal(key, pair, "job 1", "a", "b")
    for about in (("job 2", "a", "b"), ("job 1", "b", "a"), ("job 1", "a", "c")):
        with pytest.raises(ValueError):
            unseal(key, sealed, *about)
    for wrong in (b"", sealed[:20], sealed[:-1] + bytes([sealed[-1] ^ 1]), bytes(SEALED)):
        with pytest.raises(ValueError):
            unseal(key, wrong, "job 1", "a", "b")
    with pytest.raises(ValueError):
        unseal(derive(b"l"), sealed, "job 1", "a", "b")

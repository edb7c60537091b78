"""Codecs: a model's change in few bytes, of a size that both ends know beforehand.

Both directions work alike. ``before`` is the model that both ends have, ``target`` the one that one end wants the other
to have. ``encode`` writes the change between them into a vector of bytes, ``decode`` gives the model that both then
have, the same to the bit, and ``residual`` is what is still missing. The sender adds it to its next target, so that
nothing is lost, only late (error feedback: Seide et al. 2014; Karimireddy et al. 2019, "Error Feedback Fixes SignSGD").

What is learnt is coded. Counters, and the statistics of BatchNorm (a variance that was rounded may become negative),
travel as they are. The bytes of all arrays lie one after another without names or headers: the models that both ends
build say where each begins. So a vector that is not exactly ``length`` bytes is no change of this model, and no vector
unfolds to more than the model.

To add a codec: one line in ``CODECS``, and its name in ``shared.strategies.CODEC_NAMES``; see docs/extending.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from shared.config import Job

Arrays = Mapping[str, Tensor]
Numbers = np.ndarray  # float32 (channels, numbers in each)
Bytes = np.ndarray  # uint8 (n,)

CHANGE = "change"  # what the one array of a coded reply is called
BLOCK = 256  # of so many numbers the largest are picked, so that a byte says which
STATISTICS = ("running_mean", "running_var")
_TINY = float(np.finfo(np.float32).tiny)


class Codec(NamedTuple):
    """How an array becomes bytes and back. ``kept`` is the number of a block's ``BLOCK`` that travel, where not all do.

    ``size(channels, numbers, kept)`` gives the bytes exactly, ``pack(array, generator, kept)`` makes them, and
    ``unpack(bytes, channels, numbers, kept)`` reads them, raising ValueError if they are none that ``pack`` makes.
    """

    size: Callable[[int, int, int], int]
    pack: Callable[[Numbers, Generator, int], Bytes]
    unpack: Callable[[Bytes, int, int, int], Numbers]


class Coding(NamedTuple):
    """A job's codec and what it keeps."""

    codec: Codec
    kept: int


def coding(job: Job) -> Coding | None:
    """The job's, or None where models travel whole."""
    if job.federation.codec == "none":
        return None
    return Coding(CODECS[job.federation.codec], max(1, round(job.federation.codec_keep * BLOCK)))


# ---------------------------------------------------------------------- whole models


def is_coded(name: str, array: Tensor) -> bool:
    """Whether an array's change is coded; else it travels as it is."""
    return array.is_floating_point() and not name.endswith(STATISTICS) and array.numel() > 0


def length(before: Arrays, how: Coding) -> int:
    """Bytes of a coded change of this model."""
    return sum(_size(name, array, how) for name, array in before.items())


def _size(name: str, array: Tensor, how: Coding) -> int:
    if not is_coded(name, array):
        return array.numel() * array.element_size()
    return how.codec.size(*_channels(array), how.kept)


def _channels(array: Tensor) -> tuple[int, int]:
    """Rows and columns: of weights a row for each output channel, of anything else one row."""
    rows = array.shape[0] if array.ndim > 1 else 1
    return rows, array.numel() // rows


def encode(before: Arrays, target: Arrays, how: Coding, seed: int) -> Bytes:
    """The change from ``before`` towards ``target``; the same bytes for the same ``seed``.

    Raises:
        ValueError: the change is not finite, which no codec can carry.
    """
    generator = np.random.default_rng(seed)
    parts = []
    for name, old in before.items():
        new = target[name]
        if not is_coded(name, old):
            parts.append(new.contiguous().reshape(-1).view(torch.uint8).numpy())
            continue
        change = (new.float() - old.float()).reshape(_channels(old)).numpy()
        if not np.isfinite(change).all():
            raise ValueError(f"the change of {name} is not finite")
        parts.append(how.codec.pack(change, generator, how.kept))
    return np.concatenate(parts) if parts else np.empty(0, np.uint8)


def decode(before: Arrays, payload: Bytes, how: Coding) -> dict[str, Tensor]:
    """The model after a coded change of ``before``. Plain float32 arithmetic, number by number: the same everywhere.

    Raises:
        ValueError: ``payload`` is no coded change of such a model.
    """
    if payload.dtype != np.uint8 or payload.ndim != 1 or len(payload) != length(before, how):
        raise ValueError("the bytes are not as many as a change of this model has")
    after: dict[str, Tensor] = {}
    start = 0
    for name, old in before.items():
        part = payload[start : start + _size(name, old, how)]
        start += len(part)
        if is_coded(name, old):
            with np.errstate(all="ignore"):  # a scale may be anything: what is not finite is the reader's to refuse
                change = how.codec.unpack(part, *_channels(old), how.kept)
            after[name] = (old.float() + torch.from_numpy(change).reshape(old.shape)).to(old.dtype)
        else:
            after[name] = torch.frombuffer(bytearray(part), dtype=old.dtype).reshape(old.shape) if len(part) else old
    return after


def residual(target: Arrays, after: Arrays) -> dict[str, Tensor]:
    """What of ``target`` has not arrived, for the next time."""
    return {name: target[name].float() - after[name].float() for name in target if is_coded(name, target[name])}


def with_residual(arrays: Arrays, late: Arrays) -> dict[str, Tensor]:
    """``arrays`` plus what is late."""
    return {
        name: (array.float() + late[name]).to(array.dtype) if name in late else array for name, array in arrays.items()
    }


# ---------------------------------------------------------------------- numbers as bytes


def _raw(array: np.ndarray) -> Bytes:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _as(part: Bytes, dtype: type, rows: int) -> np.ndarray:
    return np.frombuffer(part.tobytes(), dtype).reshape(rows, -1)


def _bf16_pack(array: Numbers, generator: Generator, kept: int) -> Bytes:
    """The upper half of each float32, rounded up with the chance that the lower half says (unbiased)."""
    bits = np.ascontiguousarray(array).view(np.uint32)
    up = generator.integers(0, 1 << 16, bits.shape, np.uint32)
    return _raw(((bits + up) >> 16).astype(np.uint16))


def _bf16_unpack(part: Bytes, rows: int, columns: int, kept: int) -> Numbers:
    bits: np.ndarray = _as(part, np.uint16, rows).astype(np.uint32) << 16
    return bits.view(np.float32)


def _int8(array: Numbers, generator: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Each row as whole numbers from -127 to 127, rounded up or down by chance (unbiased), and its scale."""
    scale = np.abs(array).max(1, keepdims=True, initial=0.0) / np.float32(127)
    scale[scale < _TINY] = 0  # so small that a division by it would not be finite
    whole = np.divide(array, scale, out=np.zeros_like(array), where=scale > 0)
    whole += generator.random(whole.shape, np.float32)
    np.floor(whole, out=whole)
    return np.clip(whole, -127, 127, out=whole).astype(np.int8), scale


def _int8_pack(array: Numbers, generator: Generator, kept: int) -> Bytes:
    whole, scale = _int8(array, generator)
    return np.concatenate([_raw(scale), _raw(whole)])


def _int8_unpack(part: Bytes, rows: int, columns: int, kept: int) -> Numbers:
    scale, whole = _as(part[: 4 * rows], np.float32, rows), _as(part[4 * rows :], np.int8, rows)
    values: Numbers = whole.astype(np.float32) * scale
    return values


def _sign_pack(array: Numbers, generator: Generator, kept: int) -> Bytes:
    """A bit for each number, and a row's mean size as its scale (Karimireddy et al. 2019, algorithm 1)."""
    scale = np.abs(array).mean(1, dtype=np.float64).astype(np.float32)
    return np.concatenate([_raw(scale), np.packbits(array >= 0)])


def _sign_unpack(part: Bytes, rows: int, columns: int, kept: int) -> Numbers:
    scale = _as(part[: 4 * rows], np.float32, rows)
    up = np.unpackbits(part[4 * rows :], count=rows * columns).reshape(rows, columns)
    values: Numbers = np.where(up == 1, scale, -scale).astype(np.float32)
    return values


_LEVELS = np.array([0.4528, 1.510], np.float32)  # of two bits for a normal distribution of sd 1: Max 1960, table 1
_EDGE = 0.9816  # between them


def _int2_pack(array: Numbers, generator: Generator, kept: int) -> Bytes:
    """A bit for the sign and one for whether a number is large in its row; the scale is that of least squares.

    So the error is never larger than the row, however its numbers are spread.
    """
    large = np.abs(array) > _EDGE * np.sqrt(np.square(array, dtype=np.float64).mean(1, keepdims=True))
    level = _LEVELS[large.astype(np.int8)]
    scale = (np.abs(array) * level).sum(1, dtype=np.float64) / np.square(level).sum(1, dtype=np.float64)
    return np.concatenate([_raw(scale.astype(np.float32)), np.packbits([array >= 0, large])])


def _int2_unpack(part: Bytes, rows: int, columns: int, kept: int) -> Numbers:
    scale = _as(part[: 4 * rows], np.float32, rows)
    up, large = np.unpackbits(part[4 * rows :], count=2 * rows * columns).reshape(2, rows, columns)
    values: Numbers = np.where(up == 1, scale, -scale) * _LEVELS[large]
    return values


# ---------------------------------------------------------------------- the largest numbers of each block


def _cuts(numbers: int, kept: int) -> list[tuple[int, int, int]]:
    """(blocks, their length, how many of each travel): the whole blocks, then the rest as one shorter block."""
    whole, rest = divmod(numbers, BLOCK)
    cuts = [(whole, BLOCK, min(kept, BLOCK)), (1, rest, math.ceil(min(kept, BLOCK) * rest / BLOCK))]
    return [cut for cut in cuts if cut[0] and cut[1]]


def _largest(blocks: Numbers, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Places, rising, and values of the ``count`` largest numbers of each row."""
    rows = torch.from_numpy(blocks)
    places = rows.abs().topk(count, 1, sorted=False).indices.sort(1).values
    return places.numpy().astype(np.uint8), rows.gather(1, places).numpy()


def _topk(values: Codec) -> Codec:
    """The largest numbers of each block, as ``values`` packs them, each block a row; their places a byte each.

    Picked within blocks rather than over the whole array: a place is then a byte, the size is known beforehand, and the
    share of the change's square that arrives is at least the share kept (Stich et al. 2018), as for all at once.
    """

    def size(rows: int, columns: int, kept: int) -> int:
        cuts = _cuts(rows * columns, kept)
        return sum(blocks * count + values.size(blocks, count, kept) for blocks, _, count in cuts)

    def pack(array: Numbers, generator: Generator, kept: int) -> Bytes:
        flat, parts, start = np.ascontiguousarray(array).reshape(-1), [], 0
        for blocks, long, count in _cuts(flat.size, kept):
            places, found = _largest(flat[start : start + blocks * long].reshape(blocks, long), count)
            parts += [places.reshape(-1), values.pack(found, generator, kept)]
            start += blocks * long
        return np.concatenate(parts)

    def unpack(part: Bytes, rows: int, columns: int, kept: int) -> Numbers:
        flat, start, at = np.zeros(rows * columns, np.float32), 0, 0
        for blocks, long, count in _cuts(flat.size, kept):
            places = part[at : at + blocks * count].reshape(blocks, count).astype(np.int64)
            if (places >= long).any() or (np.diff(places) <= 0).any():
                raise ValueError("places that are outside their block, or not rising")
            at += blocks * count
            much = values.size(blocks, count, kept)
            block = flat[start : start + blocks * long].reshape(blocks, long)
            np.put_along_axis(block, places, values.unpack(part[at : at + much], blocks, count, kept), 1)
            at, start = at + much, start + blocks * long
        return flat.reshape(rows, columns)

    return Codec(size, pack, unpack)


_FLOAT32 = Codec(lambda r, c, _: 4 * r * c, lambda a, g, k: _raw(a), lambda p, r, c, k: _as(p, np.float32, r))
_BF16 = Codec(lambda r, c, _: 2 * r * c, _bf16_pack, _bf16_unpack)
_INT8 = Codec(lambda r, c, _: 4 * r + r * c, _int8_pack, _int8_unpack)
_INT2 = Codec(lambda r, c, _: 4 * r + (2 * r * c + 7) // 8, _int2_pack, _int2_unpack)
_SIGN = Codec(lambda r, c, _: 4 * r + (r * c + 7) // 8, _sign_pack, _sign_unpack)

CODECS: dict[str, Codec] = {
    "bf16": _BF16,
    "int8": _INT8,
    "int2": _INT2,
    "sign": _SIGN,
    "topk": _topk(_FLOAT32),
    "topk-int8": _topk(_INT8),
}

"""Flower's arrays, written out as bytes only when somebody asks for these bytes.

Flower keeps an array as what ``np.save`` writes, so making one and reading it copies every number several times.
After ``install`` an array that is made from numbers keeps a copy of the numbers; ``data`` is written when it is first
read, and from then on the array is as Flower made it. What ``numpy`` gives is the caller's own, as with Flower.

All that this project knows of Flower's private parts stands here; ``fits`` looks whether the installed version still
is as this expects. If it is not, nothing is changed and arrays are bytes as ever: slower, and right.
"""

from __future__ import annotations

import inspect
import io
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.common.constant import SType
from torch import Tensor

try:
    from flwr.app.message.recorddict import _check_key, _SyncedDict
    from flwr.app.message.typeddict import TypedDict
except ImportError:  # another version: ``fits`` says no
    _SyncedDict = None  # type: ignore[assignment, misc]

_KINDS = "?bBhHiIlLqQefd"  # plain numbers, in this machine's byte order


class Numbers(Protocol):
    """Where an array's numbers are."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def frozen(self) -> np.ndarray:
        """The numbers to look at, in order in memory; cannot be written to."""

    def fresh(self) -> np.ndarray:
        """The numbers for a caller who may write to them: nobody else sees what he writes."""


class Kept:
    """Numbers in this process's memory. ``values`` must be read-only, contiguous, and nobody else's to write to."""

    __slots__ = ("_values", "dtype", "shape")

    def __init__(self, values: np.ndarray) -> None:
        self._values, self.dtype, self.shape = values, values.dtype, values.shape
        values.flags.writeable = False

    def __reduce__(self) -> tuple[type[Kept], tuple[np.ndarray]]:
        return Kept, (self._values,)

    def frozen(self) -> np.ndarray:
        """See ``Numbers``."""
        return self._values

    def fresh(self) -> np.ndarray:
        """See ``Numbers``."""
        return self._values.copy()


def array_of(numbers: Numbers) -> Array:
    """An array of these numbers, which are not copied."""
    array = object.__new__(Array)
    array.__dict__.update(dtype=_name(numbers.dtype), shape=tuple(numbers.shape), stype=SType.NUMPY, _numbers=numbers)
    return array


@lru_cache(maxsize=64)
def _name(dtype: np.dtype[Any]) -> str:
    """NumPy works the name out anew each time, which for small arrays takes longer than all else."""
    return str(dtype)


def numbers_of(array: Array) -> Numbers | None:
    """The numbers of an array that is not written out; None if it is, and always where arrays are not lazy."""
    found: Numbers | None = array.__dict__.get("_numbers") if installed() and "data" not in array.__dict__ else None
    return found


def record_of(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """A record of tensors on the CPU that nobody else has or writes to: where arrays are lazy they become its own."""
    if not installed():
        return ArrayRecord(dict(tensors))
    return record({name: array_of(Kept(np.array(one.numpy(), order="C", copy=None))) for name, one in tensors.items()})


def record(arrays: Mapping[str, Array]) -> ArrayRecord:
    """A record of just these arrays; ``ArrayRecord(arrays)`` would make each of them anew."""
    made = ArrayRecord()
    for name, array in arrays.items():
        made[name] = array
    return made


@lru_cache(maxsize=4096)
def header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """What ``np.save`` writes before the numbers; ``dtype`` as in ``np.dtype.str``."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def pieces(array: Array) -> list[bytes | memoryview]:
    """The bytes of ``array.data`` in one or two parts, without putting them together if they are not yet."""
    numbers = numbers_of(array)
    if numbers is None:
        return [array.data]
    values = numbers.frozen()
    return [header(values.dtype.str, values.shape), values.reshape(-1).view(np.uint8).data]


def fits() -> bool:
    """Whether Flower's arrays are as ``install`` expects them."""
    probe = Array(np.ones(2, np.float32))
    names = {"dtype", "shape", "stype", "data"}
    return (
        names <= set(probe.__dict__) <= names | {"_is_dirty"}
        and not hasattr(Array, "data")
        and "__getattr__" not in vars(Array)
        and probe.data == header("<f4", (2,)) + np.ones(2, np.float32).tobytes()
        and all(name in vars(ArrayRecord) for name in ("from_array_dict", "count_bytes"))
        and _SyncedDict is not None
        and list(inspect.signature(_SyncedDict).parameters) == ["ref_recorddict", "allowed_type"]
    )


def installed() -> bool:
    """Whether arrays in this process are lazy."""
    return getattr(Array, "_lazy", False)


def install() -> bool:
    """Make this process's arrays lazy, for good; False if this version of Flower is another than expected."""
    if installed():
        return True
    if not fits():
        return False
    eager, read = Array.from_numpy_ndarray, Array.numpy

    def from_numpy_ndarray(_: type[Array], ndarray: np.ndarray) -> Array:
        if type(ndarray) is not np.ndarray or ndarray.dtype.char not in _KINDS or not ndarray.dtype.isnative:
            return eager(ndarray)
        return array_of(Kept(np.array(ndarray, order="C", copy=True)))

    def numpy(self: Array) -> np.ndarray:
        numbers = numbers_of(self)
        return read(self) if numbers is None or self.stype != SType.NUMPY else numbers.fresh()

    def missing(self: Array, name: str) -> Any:  # only called for what is not there
        numbers = self.__dict__.get("_numbers")
        if name != "data" or numbers is None:
            raise AttributeError(name)
        self.__dict__["data"] = b"".join(pieces(self))
        del self.__dict__["_numbers"]
        return self.__dict__["data"]

    Array.from_numpy_ndarray = classmethod(from_numpy_ndarray)  # type: ignore[assignment]
    Array.numpy, Array.__getattr__ = numpy, missing  # type: ignore[method-assign, attr-defined]
    ArrayRecord.from_array_dict = classmethod(_from_array_dict)  # type: ignore[assignment]
    ArrayRecord.count_bytes = _count_bytes  # type: ignore[method-assign]
    _SyncedDict.__init__ = _synced  # type: ignore[method-assign]
    Array._lazy = True  # type: ignore[attr-defined]
    return True


def _synced(self: Any, ref_recorddict: RecordDict, allowed_type: type) -> None:
    """As Flower's, without the reference to itself by which every look at ``array_records`` keeps a whole message in
    memory until Python's collector comes by."""

    def check(value: object) -> None:
        if not isinstance(value, allowed_type):
            raise TypeError(f"Expected `{allowed_type.__name__}`, but received `{type(value).__name__}` for the value.")

    TypedDict.__init__(self, _check_key, check)
    self.recorddict, self.allowed_type = ref_recorddict, allowed_type


def _from_array_dict(_: type[ArrayRecord], array_dict: dict[str, Array], *, keep_input: bool = True) -> ArrayRecord:
    """As Flower's: a record of new arrays with the same content."""
    record = ArrayRecord()
    for name, array in array_dict.items():
        numbers = numbers_of(array)
        if numbers is None:
            record[name] = Array(dtype=array.dtype, shape=tuple(array.shape), stype=array.stype, data=array.data)
        else:
            record[name] = array_of(numbers)
            record[name].__dict__.update(dtype=array.dtype, shape=tuple(array.shape), stype=array.stype)
    if not keep_input:
        array_dict.clear()
    return record


def _count_bytes(self: ArrayRecord) -> int:
    """As Flower's: bytes of the arrays as ``np.save`` writes them, and of their names."""
    total = 0
    for name, array in self.items():
        numbers = numbers_of(array)
        if numbers is None:
            total += len(array.data) + len(name)
        else:
            size = math.prod(numbers.shape) * numbers.dtype.itemsize
            total += len(header(numbers.dtype.str, tuple(numbers.shape))) + size + len(name)
    return total

"""Messages between processes of one machine: arrays lie in shared memory and are read in place, the rest is pickled.

A segment is a file in memory without a name, known by its descriptor, which is handed over by a socket. So nothing is
left behind however the processes end, and the size that containers allow for ``/dev/shm`` does not matter. Only Linux
has such files; elsewhere, and for small arrays, all goes through the pipe.

Whoever reads maps a segment privately: what he writes into his arrays nobody else sees. A segment is written anew only
when nothing that was read from it is left.
"""

from __future__ import annotations

import io
import itertools
import math
import mmap
import os
import pickle
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from client.lazy import Kept

SMALL = 4096  # bytes of an array that goes through the pipe rather than into a segment
_ALIGN = 64  # bytes to which arrays are aligned, a line of the processor's cache
_SPARE = 8  # segments kept for later
_MOST = 64  # segments in use at once; beyond, arrays go through the pipe: a process may open only so many files


class Segment:
    """A piece of shared memory that grows as it is written."""

    def __init__(self, number: int, fd: int | None = None) -> None:
        self.number = number
        self.fd = os.memfd_create("consilium") if fd is None else fd
        self.dirty = False  # a process may still look at it, and did not say when it stops
        self._end = weakref.finalize(self, os.close, self.fd)
        self._end.atexit = False

    def write(self, arrays: list[np.ndarray]) -> None:
        """Write arrays one after the other, each aligned."""
        offset, size = 0, sum(_aligned(array.nbytes) for array in arrays)
        if os.fstat(self.fd).st_size < size:
            os.ftruncate(self.fd, size)
        for array in arrays:
            left = array.reshape(-1).view(np.uint8).data
            place = offset
            while left:  # at most 2 GiB are written at once
                done = os.pwrite(self.fd, left, place)
                left, place = left[done:], place + done
            offset += _aligned(array.nbytes)

    def close(self) -> None:
        """Give it up; its memory is free once nobody maps it."""
        self._end()
        self.fd = -1


class Lease:
    """The use of a segment, until nothing refers to this any more."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment


class Segments:
    """The segments of a pool: those in use, and some spare ones to be written anew."""

    def __init__(self) -> None:
        self._spare: deque[Segment] = deque()
        self._numbers = itertools.count(1)  # taken by several threads
        self._in_use: dict[int, Segment] = {}
        self._closed = not hasattr(os, "memfd_create")

    def take(self) -> Lease | None:
        """A segment to write to; None where there are too many already, or none at all."""
        if self._closed or len(self._in_use) >= _MOST:
            return None
        try:
            segment = self._spare.pop()
        except IndexError:
            try:
                segment = Segment(next(self._numbers))
            except OSError:  # no descriptor is left, or the machine forbids it
                return None
        self._in_use[segment.number] = segment
        lease = Lease(segment)
        weakref.finalize(lease, self._back, segment).atexit = False
        return lease

    def _back(self, segment: Segment) -> None:
        self._in_use.pop(segment.number, None)
        if self._closed or segment.dirty or len(self._spare) >= _SPARE:
            segment.close()
        else:
            self._spare.append(segment)

    def forget(self) -> None:
        """In a forked process: the segments are its parent's."""
        self._closed = True
        for segment in [*self._in_use.values(), *self._spare]:
            segment.close()

    def close(self) -> None:
        """Give up the spare segments now, and those in use when they are no longer needed."""
        self._closed = True
        while self._spare:
            self._spare.pop().close()

    @property
    def counts(self) -> tuple[int, int]:
        """Segments in use, and spare ones."""
        return len(self._in_use), len(self._spare)


class _Map(mmap.mmap):
    """A private mapping, which keeps the lease of what it maps."""

    lease: Lease


class Source:
    """A segment as one message is read from it."""

    def __init__(self, lease: Lease, size: int) -> None:
        self.lease, self.size = lease, size
        self._map: _Map | None = None

    @property
    def mapped(self) -> _Map:
        """The message's arrays, mapped when first asked for."""
        if self._map is None:
            self._map = _Map(self.lease.segment.fd, self.size, access=mmap.ACCESS_COPY)
            self._map.lease = self.lease
        return self._map

    def held(self) -> Callable[[], bool]:
        """Tells later, when this is no longer referred to here, whether somebody else holds the message or an array
        of it that was read in place."""
        own, read = weakref.ref(self), weakref.ref(self._map) if self._map is not None else None
        return lambda: own() is not None or (read is not None and read() is not None)


class Stored:
    """Numbers in a segment; see ``client.lazy.Numbers``. Only the first who asks gets them without a copy."""

    __slots__ = ("_given", "_offset", "_source", "dtype", "shape")

    def __init__(self, source: Source, offset: int, dtype: str, shape: tuple[int, ...]) -> None:
        self._source, self._offset, self._given = source, offset, False
        self.dtype, self.shape = np.dtype(dtype), shape

    def __reduce__(self) -> tuple[type[Kept], tuple[np.ndarray]]:
        return Kept, (self.frozen(),)

    def fresh(self) -> np.ndarray:
        """The numbers, to be written to by the caller alone."""
        if not self._given:
            self._given = True
            flat = np.frombuffer(self._source.mapped, self.dtype, math.prod(self.shape), self._offset)
            return flat.reshape(self.shape)
        values = np.empty(self.shape, self.dtype)
        left, place = values.reshape(-1).view(np.uint8).data, self._offset
        while left:
            done = os.preadv(self._source.lease.segment.fd, [left], place)
            if not done:
                raise EOFError("a segment is shorter than its message says")
            left, place = left[done:], place + done
        return values

    def frozen(self) -> np.ndarray:
        """The numbers, to be looked at."""
        self._given, given = True, self._given
        values = self.fresh()
        self._given = given
        values.flags.writeable = False
        return values


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


class _Packer(pickle.Pickler):
    """Puts larger arrays aside, and says in the pickle where they will lie."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.aside: list[np.ndarray] = []
        self.size = 0

    def reducer_override(self, thing: object) -> Any:
        # Not persistent_id, which is asked about every number of every list as well.
        if type(thing) is not Kept and type(thing) is not Stored:
            return NotImplemented
        values = thing.frozen()
        if values.nbytes < SMALL:
            return NotImplemented
        place = self.size, values.dtype.str, values.shape
        self.aside.append(values)
        self.size += _aligned(values.nbytes)
        return _aside, place


def _aside(offset: int, dtype: str, shape: tuple[int, ...]) -> Stored:
    """What lies aside, where no segment comes with the pickle."""
    raise pickle.UnpicklingError(f"an array {shape} of {dtype} at {offset} in a segment, and no segment")


class _Unpacker(pickle.Unpickler):
    def __init__(self, body: bytes, source: Source | None) -> None:
        super().__init__(io.BytesIO(body))
        self._source = source

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        return partial(Stored, self._source) if found is _aside and self._source is not None else found


def pack(thing: Any, segment: Segment | None) -> tuple[bytes, int]:
    """Pickle ``thing``, its larger arrays into ``segment`` if there is one; gives the pickle and the bytes of these."""
    if segment is None:
        return pickle.dumps(thing, pickle.HIGHEST_PROTOCOL), 0
    file = io.BytesIO()
    packer = _Packer(file)
    packer.dump(thing)
    segment.write(packer.aside)
    return file.getvalue(), packer.size


def unpack(body: bytes, source: Source | None) -> Any:
    """What ``pack`` packed; its arrays are read in place when they are asked for."""
    return _Unpacker(body, source).load()

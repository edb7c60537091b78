"""The arrays of a record as one, for the way between machines.

Flower 1.41 sends every array of a record as two objects or more, and every object is a request of its own on each hop
between the server's program and a site's: a ResNet-50 is 543 requests a hop, each way. Packed it is 24, of which most
are pieces of 5 MiB.

Flower's records are known here by what they can do: ``shared`` imports no Flower. Its Array is made of a dtype, a
shape, the name of how it was serialised, and bytes; those travel as they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

INDEX, DATA = "packed-index", "packed-data"
_KIND = "consilium.packed"


def pack(content: Any, done: dict[int, Any] | None = None) -> Any:
    """A RecordDict in which every record of several arrays is one of two: what they are, and their bytes on end.

    ``done`` holds what was packed before, by the record's id: records that several contents share are packed once. It
    must not outlive them.
    """
    done = {} if done is None else done
    packed = {}
    for name, record in content.items():
        if name in content.array_records:
            if id(record) not in done:
                done[id(record)] = _pack(record)
            record = done[id(record)]
        packed[name] = record
    return type(content)(packed)


def unpack(content: Any) -> tuple[Any, bool]:
    """The RecordDict that ``pack`` was given, and whether anything in it was packed.

    Raises:
        ValueError: what says what the bytes are does not fit them. Whoever sent it may have made it up.
    """
    packed = {name for name, record in content.array_records.items() if set(record) == {INDEX, DATA}}
    if not packed:
        return content, False
    records = {name: _unpack(record) if name in packed else record for name, record in content.items()}
    return type(content)(records), True


def _pack(record: Mapping[str, Any]) -> Any:
    if len(record) < 2 or set(record) == {INDEX, DATA}:
        return record
    arrays = record.values()
    kind = type(next(iter(arrays)))
    index = [[name, array.dtype, list(array.shape), array.stype, len(array.data)] for name, array in record.items()]
    parts = {INDEX: json.dumps(index).encode(), DATA: b"".join(array.data for array in arrays)}
    return type(record)({name: kind("uint8", (len(data),), _KIND, data) for name, data in parts.items()})  # type: ignore[call-arg]


def _unpack(record: Mapping[str, Any]) -> Any:
    data, kind = record[DATA].data, type(record[DATA])
    arrays, begin = {}, 0
    try:
        for name, dtype, shape, stype, size in json.loads(record[INDEX].data):
            if name in arrays or not isinstance(size, int) or not 0 <= size <= len(data) - begin:
                raise ValueError("an array's bytes are not there")
            arrays[name] = kind(dtype, tuple(shape), stype, data[begin : begin + size])
            begin += size
        if begin != len(data):
            raise ValueError("bytes of no array")
        return type(record)(arrays)  # type: ignore[call-arg]
    except (TypeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"no index of arrays: {error}") from None

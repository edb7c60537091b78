"""What every check of the last gate works with: see ``client.egress``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from client import lazy
from client.workspace import Workspace
from shared.config import Job

Record = ArrayRecord | MetricRecord | ConfigRecord

# By name of kind and size, so that neither another byte order nor an object is one of them.
_FLOATS, _WHOLE = (torch.float16, torch.float32, torch.float64), (torch.uint8, torch.int8, torch.int16, torch.int32)
DTYPES = {torch.empty(0, dtype=kind).numpy().dtype: kind for kind in (*_FLOATS, *_WHOLE, torch.int64, torch.bool)}


class Refused(Exception):
    """Something may not leave; ``str`` says what, for the site's own log."""


@dataclass(frozen=True)
class Asked:
    """What a reply is held against: the job, the site with its rules, and the content of the message it answers."""

    job: Job
    workspace: Workspace
    content: RecordDict


Check = Callable[[Any, Asked], Record]


def opened(array: Array) -> tuple[np.ndarray, Array]:
    """The numbers of an array, and an array made of them alone: as it comes it may hold other words and more bytes."""
    numbers = lazy.numbers_of(array)
    if type(numbers) is lazy.Kept:  # not written out yet, and nobody can write to it: shared with the new array
        return numbers.frozen(), lazy.array_of(lazy.Kept(numbers.frozen()))
    dtype, shape = np.dtype(array.dtype), tuple(array.shape)
    head = lazy.header(dtype.str, shape)
    if array.data.startswith(head) and len(array.data) == len(head) + dtype.itemsize * math.prod(shape):
        values = np.frombuffer(array.data, dtype, offset=len(head)).reshape(shape)
        return values, Array(str(values.dtype), values.shape, "numpy.ndarray", array.data)  # the bytes are not copied
    values = np.ascontiguousarray(array.numpy())
    return values, Array(values)

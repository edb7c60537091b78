"""The last gate before a reply leaves the site: an allow-list, and the log of what went through.

``KINDS`` holds, for each kind of message, the records of its reply and for each the function that checks it. Such a
function gives the record anew, built of the values that it checked and of nothing else, or raises ``Refused``. What the
table does not name does not leave: then, and after any failure in here, the reply is a bare status with the code
``egress-refused``, and the reason stands in the site's own log. To add a kind of message: add its line to the table.

The gate knows the site's rules and the job, and trusts nothing that the rest of the program made of them.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from torch import Tensor, nn

from client import egress_log, lazy
from client.counts import survey_counts
from client.egress_entry import note
from client.egress_sums import Asked, Refused, evaluation_sums, numbers, statistics, subgroup_sums
from client.workspace import find_sites, open_model, write_log
from shared import __version__
from shared.errors import CODES
from shared.norms import is_private
from shared.sitefile import SITE_NAME
from shared.tasks import load_task
from shared.weights import exchanged_names

Record = ArrayRecord | MetricRecord | ConfigRecord


# By name of kind and size, so that neither another byte order nor an object is one of them.
_FLOATS, _WHOLE = (torch.float16, torch.float32, torch.float64), (torch.uint8, torch.int8, torch.int16, torch.int32)
_DTYPES = {torch.empty(0, dtype=kind).numpy().dtype: kind for kind in (*_FLOATS, *_WHOLE, torch.int64, torch.bool)}


Check = Callable[[Any, Asked], Record]


def release(
    kind: str,
    content: RecordDict,
    code: str,
    message: Message,
    context: Context,
    asked: Asked | None,
    seconds: float = 0.0,
) -> RecordDict:
    """What may leave of a reply, after a line in the site's log says so. Never raises.

    Args:
        kind: a key of KINDS.
        content: the reply without its status; empty if the site declines.
        code: why the site declines, or "".
        asked: None if the site declines because it came to no job and no data.
        seconds: how long the site worked, for the log.
    """
    name, home = "", None
    with contextlib.suppress(Exception):  # without a site file there is neither a name nor a place for a log
        name, home, _ = find_sites(context.node_config, context.run_config)
    try:
        out = checked(kind, content, code, name, asked)
        note(out, kind, message, context, home, seconds)
        return out
    except Exception as problem:
        reason = str(problem) if isinstance(problem, Refused | egress_log.BrokenLog) else repr(problem)
    code = "egress-refused"
    bare = RecordDict({"status": _status(code, name if re.fullmatch(SITE_NAME, name) else "")})
    with contextlib.suppress(Exception):
        if home:
            write_log(home, f"{kind}: nothing left ({code}): {reason}")
    with contextlib.suppress(Exception):
        note(bare, kind, message, context, home, seconds)
    return bare


def checked(kind: str, content: RecordDict, code: str, name: str, asked: Asked | None) -> RecordDict:
    """The reply built anew of what may leave.

    Raises:
        Refused: it holds something that may not.
    """
    if code and (code not in CODES or content):
        raise Refused(f"the code {code!r} is none of shared.errors.CODES, or comes with more than itself")
    if name and not re.fullmatch(SITE_NAME, name):
        raise Refused("the site's name is not one that a site may have")
    if not code and asked is None:
        raise Refused("a reply to no job")
    out = records(kind, content, asked) if asked is not None and not code else RecordDict()
    out["status"] = _status(code, name)
    return out


def records(kind: str, content: RecordDict, asked: Asked) -> RecordDict:
    """The records of a reply of this kind, without its status, built anew of what may leave.

    Raises:
        Refused: one is not on the list, is missing, or holds something that may not leave.
    """
    if kind not in KINDS:
        raise Refused(f"no reply of the kind {kind!r} is on the list")
    if set(content) != set(KINDS[kind]):
        raise Refused(f"records {sorted(content)} instead of {sorted(KINDS[kind])}")
    return RecordDict({name: check(content[name], asked) for name, check in KINDS[kind].items()})


def _status(code: str, name: str) -> ConfigRecord:
    return ConfigRecord({"site": name, "ok": not code, "code": code, "version": __version__})


# ---------------------------------------------------------------------- the records


def checked_update(
    arrays: Mapping[str, np.ndarray], incoming: Mapping[str, np.ndarray], asked: Asked
) -> dict[str, np.ndarray]:
    """The arrays of a trained model, in its order: names, shapes and dtypes are the model's, all finite, the change
    within the site's bound; under DP the statistics of normalisation layers are as they came.

    Raises:
        Refused: they are not.
    """
    model, job = open_model(asked.job), asked.job
    state: dict[str, Tensor] = model.state_dict()
    statistics = _statistics_of(model) if is_private(job) else set()
    names = exchanged_names(model, job)
    if list(arrays) != names:
        raise Refused("the arrays have other names than this model's")
    limit, squares = asked.workspace.policy.max_update_norm, 0.0
    for name in names:
        values, expected = arrays[name], state[name]
        if _DTYPES.get(values.dtype) != expected.dtype or values.shape != tuple(expected.shape):
            raise Refused(f"{name} is {values.dtype} {values.shape}, not as in this model")
        if not np.isfinite(values).all():
            raise Refused(f"{name} is not finite")
        if name in statistics and not np.array_equal(values, incoming[name]):
            raise Refused(f"{name} are statistics of images and have changed: they would leave without noise")
        if limit:
            squares += float(np.square(values.astype(np.float64) - incoming[name]).sum())
    if limit and not math.sqrt(squares) <= limit:
        raise Refused(f"the model changed by {math.sqrt(squares):g}, privacy.max_update_norm is {limit:g}")
    return dict(arrays)


def _statistics_of(model: nn.Module) -> set[str]:
    """Buffers in which normalisation layers gather what they saw."""
    norms = nn.modules.batchnorm._NormBase
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, norms)]
    return {f"{path}.{name}" for path, module in found for name, _ in module.named_buffers(recurse=False)}


def _update(record: Any, asked: Asked) -> ArrayRecord:
    opened = {name: _opened(array) for name, array in record.items()}
    needed = asked.workspace.policy.max_update_norm or is_private(asked.job)
    incoming = asked.content.array_records["arrays"] if needed else {}
    checked_update(
        {name: values for name, (values, _) in opened.items()},
        {name: array.numpy() for name, array in incoming.items()},
        asked,
    )
    return ArrayRecord({name: array for name, (_, array) in opened.items()})


def _opened(array: Array) -> tuple[np.ndarray, Array]:
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


def _training_figures(record: Any, asked: Asked) -> MetricRecord:
    told, job = asked.workspace.told["train"], asked.job
    allowed: dict[str, int] = {"num-examples": -1, "steps": -1}  # length; -1 is one number
    if is_private(job):
        allowed["epsilon"] = -1
    elif told.exact:
        allowed |= {"images": -1, "loss": -1, "seconds": -1, "losses": len(load_task(job.task).parts(job))}
    figures = numbers(record, allowed)
    if figures.get("num-examples") != told.images:
        raise Refused("num-examples is not the number that this site tells")
    steps = job.train.local_steps
    for name, most in {"num-examples": told.images, "steps": steps, "images": steps * job.train.batch_size}.items():
        value = figures.get(name, 0 if name == "images" else -1)
        if not isinstance(value, int) or not 0 <= value <= most:
            raise Refused(f"{name} is no whole number from 0 to {most}")
    if is_private(job) and figures["steps"] != steps:
        raise Refused(f"{figures['steps']} steps instead of the job's {steps}: when to stop would tell of the images")
    for name in ("epsilon", "seconds"):
        if figures.get(name, 0) < 0:  # type: ignore[operator]
            raise Refused(f"{name} is negative")
    return MetricRecord(figures)


def _survey_counts(record: Any, asked: Asked) -> MetricRecord:
    """Exactly what ``client.counts`` tells of this data under these rules."""
    told = survey_counts(asked.workspace.told, len(asked.workspace.data.skipped))
    if dict(record) != told:
        raise Refused("the counts are not those that this site tells")
    return MetricRecord(told)


def _facts(record: Any, asked: Asked) -> ConfigRecord:
    frozen = record.get("frozen")
    if set(record) != {"job", "frozen"} or record["job"] != asked.job.sha256:
        raise Refused("facts other than the job's and the frozen weights' SHA-256")
    if not isinstance(frozen, str) or not re.fullmatch(r"([0-9a-f]{64})?", frozen):
        raise Refused("facts.frozen is no SHA-256")
    return ConfigRecord({"job": asked.job.sha256, "frozen": frozen})


def _masked(record: Any, asked: Asked) -> ArrayRecord:
    """The model and a few figures as one vector of 32-bit numbers under masks, of which no check can see anything: what
    is in it must pass ``records("train", …)`` before it is masked."""
    if set(record) != {"masked"}:
        raise Refused("another array than the masked one")
    values, array = _opened(record["masked"])
    state = open_model(asked.job).state_dict()
    least = sum(state[name].numel() for name in exchanged_names(open_model(asked.job), asked.job))
    if values.dtype != np.uint32 or values.ndim != 1 or not least <= len(values) <= least + _FIGURES:
        raise Refused(f"masked is {values.dtype} {values.shape}, not as of this model")
    return ArrayRecord({"masked": array})


_FIGURES = 32  # at most so many numbers go with a model under masks: its weight, images, losses


def _bytes(**lengths: int) -> Check:
    """A record of byte strings of exactly these names and lengths."""

    def check(record: Any, asked: Asked) -> ConfigRecord:
        if set(record) != set(lengths):
            raise Refused(f"{sorted(record)} instead of {sorted(lengths)}")
        for name, length in lengths.items():
            value = record[name]
            if not (type(value) is bytes and len(value) == length):
                raise Refused(f"{name} is not {length} bytes")
        return ConfigRecord({name: record[name] for name in lengths})

    return check


def _byte_list(name: str, length: int) -> Check:
    """A record of one list of byte strings, each of this length or empty."""

    def check(record: Any, asked: Asked) -> ConfigRecord:
        if set(record) != {name} or not isinstance(record[name], list):
            raise Refused(f"{sorted(record)} instead of a list {name}")
        if not all(type(value) is bytes and len(value) in (0, length) for value in record[name]):
            raise Refused(f"{name} holds what is not {length} bytes")
        return ConfigRecord({name: list(record[name])})

    return check


KINDS: dict[str, dict[str, Check]] = {
    "query": {"metrics": _survey_counts, "facts": _facts},
    "query.survey": {"metrics": statistics},
    "train": {"arrays": _update, "metrics": _training_figures},
    "evaluate": {"metrics": evaluation_sums},
    "evaluate.subgroups": {"metrics": subgroup_sums},
    # Secure aggregation: public keys and commitments, sealed and open shares of seeds, see shared.masking.
    "train.keys": {"keys": _bytes(mask=32, seal=32, commitment=32)},
    "train.shares": {"shares": _byte_list("sealed", 60)},
    "train.masked": {"arrays": _masked},
    "train.unmask": {"revealed": _byte_list("shares", 16)},
}

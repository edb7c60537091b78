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
from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from torch import Tensor, nn

from client import egress_log, lazy
from client.counts import survey_counts
from client.egress_base import DTYPES, Asked, Check, Refused, opened
from client.egress_beside import byte_list, byte_strings, control, masked
from client.egress_entry import note
from client.egress_sums import evaluation_sums, numbers, statistics, subgroup_sums
from client.workspace import find_sites, open_model, write_log
from shared import __version__
from shared.codecs import CHANGE, coding, decode
from shared.config import Job
from shared.errors import CODES
from shared.norms import is_private
from shared.sitefile import SITE_NAME
from shared.tasks import load_task
from shared.weights import names_in


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


def kind_of(kind: str, job: Job) -> str:
    """The kind of reply to a message of this type: a job may ask for more beside the trained model."""
    own = f"{kind}.{job.federation.correction}"
    return own if own in KINDS else kind


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
    names = names_in(state, model, job)
    if list(arrays) != names:
        raise Refused("the arrays have other names than this model's")
    limit, squares = asked.workspace.policy.max_update_norm, 0.0
    for name in names:
        values, expected = arrays[name], state[name]
        if DTYPES.get(values.dtype) != expected.dtype or values.shape != tuple(expected.shape):
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
    found = {name: opened(array) for name, array in record.items()}
    arrays = {name: values for name, (values, _) in found.items()}
    how = coding(asked.job) if list(arrays) == [CHANGE] else None  # then it is the model it leads to that is checked
    needed = how or asked.workspace.policy.max_update_norm or is_private(asked.job)
    incoming = asked.content.array_records["arrays"].to_torch_state_dict() if needed else {}
    if how:
        try:
            arrays = {name: array.numpy() for name, array in decode(incoming, arrays[CHANGE], how).items()}
        except ValueError as problem:
            raise Refused(f"the coded change: {problem}") from None
    checked_update(arrays, {name: array.numpy() for name, array in incoming.items()}, asked)
    return lazy.record({name: array for name, (_, array) in found.items()})


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
    steps = job.local_steps(told.images)
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


KINDS: dict[str, dict[str, Check]] = {
    "query": {"metrics": _survey_counts, "facts": _facts},
    "query.survey": {"metrics": statistics},
    "train": {"arrays": _update, "metrics": _training_figures},
    "train.scaffold": {"arrays": _update, "metrics": _training_figures, "control": control},
    "evaluate": {"metrics": evaluation_sums},
    "evaluate.personal": {"metrics": evaluation_sums},
    "evaluate.subgroups": {"metrics": subgroup_sums},
    # Secure aggregation: public keys and commitments, sealed and open shares of seeds, see shared.masking.
    "train.keys": {"keys": byte_strings(mask=32, seal=32, commitment=32)},
    "train.shares": {"shares": byte_list("sealed", 60, ("peers", "names"))},
    "train.masked": {"arrays": masked},
    "train.unmask": {"revealed": byte_list("shares", 16, ("unmask", "senders"), more=1)},
}

"""The site's end of the wire: the model from what the server sent of it, and the trained model as a coded change.

Two things are kept in the site's own folder for it, of the last two rounds each: the models that were sent, and what of
the site's own changes has not left yet (the codec's error). A round that is repeated after a crash repeats exactly.
"""

from __future__ import annotations

import math

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from torch import Tensor

from client.memory import Memory
from client.workspace import Workspace, open_model, run_name
from shared.cases import derived_seed
from shared.codecs import CHANGE, Coding, coding, decode, encode, is_coded, residual, with_residual
from shared.config import Job
from shared.errors import SiteRefusal
from shared.weights import digest, exchanged_names

Arrays = dict[str, Tensor]
MODELS, LATE = "models", "late"  # see client.memory
_TRIES = 20  # to shorten a change; each codec needs one or two


def opened(message: Message, context: Context, job: Job, workspace: Workspace) -> Message:
    """The message with the model whole, whatever part of it was sent; the model is kept for the next one.

    Raises:
        SiteRefusal: the site does not have the model that it was sent a change of.
    """
    how, config = coding(job), message.content.config_records.get("config", ConfigRecord())
    if how is None or "codec-version" not in config:
        return message
    version, base = int(config["codec-version"]), int(config.get("codec-base", -1))  # type: ignore[arg-type]
    sent, expected = message.content.array_records["arrays"], config["codec-digest"]
    kept = Memory(workspace.home, run_name(context), job, MODELS)
    arrays = _ordered(kept.exactly(MODELS, version), job)
    if arrays is None or digest(arrays) != expected:
        before = None if base < 0 else _ordered(kept.exactly(MODELS, base), job)
        arrays = sent.to_torch_state_dict() if base < 0 else _changed(before, sent, how)
        if arrays is None or digest(arrays) != expected:
            raise SiteRefusal("model-missing", f"the server's model after round {base} is not kept here")
        kept.save(version, {MODELS: arrays})
    content = RecordDict(dict(message.content))
    content["arrays"] = ArrayRecord(arrays)
    return Message(content, metadata=message.metadata)  # type: ignore[call-overload,no-any-return]


def _ordered(arrays: Arrays | None, job: Job) -> Arrays | None:
    """The arrays of a file in the order in which they are exchanged; None if they are of another model."""
    names = exchanged_names(open_model(job), job)
    return None if arrays is None or set(arrays) != set(names) else {name: arrays[name] for name in names}


def _changed(arrays: Arrays | None, changes: ArrayRecord, how: Coding) -> Arrays | None:
    """The model after each of the changes of rounds, in the order sent; None if there is none to begin with."""
    for change in changes.values():
        arrays = None if arrays is None else decode(arrays, change.numpy(), how)
    return arrays


def packed(content: RecordDict, message: Message, context: Context, job: Job, workspace: Workspace) -> RecordDict:
    """A training reply whose model is the coded change of the one that ``message``, as ``opened``, brought.

    What earlier rounds left out is added, and what this one leaves out is kept.
    """
    how = coding(job)
    if how is None:
        return content
    before = message.content.array_records["arrays"].to_torch_state_dict()
    trained = content.array_records["arrays"].to_torch_state_dict()
    round_ = int(message.content["config"]["round"])  # type: ignore[arg-type]
    late = Memory(workspace.home, run_name(context), job, LATE)
    target = with_residual(trained, late.load(LATE, round_) or {})
    seed = derived_seed(job.seed, workspace.name, "codec", round_)
    bounds = [bound for bound in (workspace.policy.max_update_norm, job.federation.max_update_norm) if bound]
    try:
        change, after = _within(min(bounds, default=math.inf), before, trained, target, how, seed)
    except ValueError as error:
        raise SiteRefusal("not-finite", f"the trained model cannot be coded: {error}") from None
    late.save(round_, {LATE: residual(target, after)})
    return RecordDict(dict(content) | {"arrays": ArrayRecord({CHANGE: Array(change)})})


def _within(
    bound: float, before: Arrays, trained: Arrays, target: Arrays, how: Coding, seed: int
) -> tuple[np.ndarray, Arrays]:
    """The coded change towards ``target`` and the model it leads to, no longer than ``bound``.

    What is late may make a change longer than the round's own, and rounding a little. The bound is on what a round
    learns: if that keeps to it, the change is shortened until it does, and the rest is late. If not, it goes as it is,
    and is refused as it would be without a codec.
    """
    change = encode(before, target, how, seed)
    after = decode(before, change, how)
    if not math.isfinite(bound) or _distance(before, trained) > bound:
        return change, after
    share = 1.0
    for tried in range(_TRIES + 1):
        if (long := _distance(before, after)) <= bound:
            break
        share *= 0.0 if tried == _TRIES else 0.99 * bound / long  # at last nothing that is coded moves: all is late
        shorter = {
            name: array + (target[name] - array) * share if is_coded(name, array) else target[name]
            for name, array in before.items()
        }
        change = encode(before, shorter, how, seed)
        after = decode(before, change, how)
    return change, after


def _distance(before: Arrays, after: Arrays) -> float:
    """L2 norm of the change, as the gate and the server take it."""
    return math.sqrt(sum(float((after[name].double() - before[name].double()).square().sum()) for name in before))

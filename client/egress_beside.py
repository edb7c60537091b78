"""Checks of the last gate on what leaves beside the model, or in its place: control variates, and what masks hide.

See ``client.egress``, which has the table of them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord

from client.egress_base import DTYPES, Asked, Check, Refused, opened
from client.workspace import open_model
from shared.weights import control_scale, exchanged_names, trained_names


def control(record: Any, asked: Asked) -> ArrayRecord:
    """The change of the site's control variate (SCAFFOLD), one gradient of the model: names, shapes and dtypes are
    those of what is trained, all finite; as many steps along it as the job takes stay within the site's bound.

    Raises:
        Refused: it is not so.
    """
    model, job = open_model(asked.job), asked.job
    state, names = model.state_dict(), trained_names(model, job)
    if list(record) != names:
        raise Refused("the control variate has other names than what is trained of this model")
    out, squares = {}, 0.0
    for name in names:
        values, out[name] = opened(record[name])
        if DTYPES.get(values.dtype) != state[name].dtype or values.shape != tuple(state[name].shape):
            raise Refused(f"control of {name} is {values.dtype} {values.shape}, not as in this model")
        if not np.isfinite(values).all():
            raise Refused(f"control of {name} is not finite")
        squares += float(np.square(values.astype(np.float64)).sum())
    limit, moved = (
        asked.workspace.policy.max_update_norm,
        math.sqrt(squares) * control_scale(job, asked.workspace.told["train"].images),
    )
    if limit and not moved <= limit:
        raise Refused(f"the control variate is worth a change of {moved:g}, privacy.max_update_norm is {limit:g}")
    return ArrayRecord(out)


def masked(record: Any, asked: Asked) -> ArrayRecord:
    """The model and a few figures as one vector of 32-bit numbers under masks, of which no check can see anything: what
    is in it must pass ``records("train", …)`` before it is masked."""
    if set(record) != {"masked"}:
        raise Refused("another array than the masked one")
    values, array = opened(record["masked"])
    state = open_model(asked.job).state_dict()
    least = sum(state[name].numel() for name in exchanged_names(open_model(asked.job), asked.job))
    if values.dtype != np.uint32 or values.ndim != 1 or not least <= len(values) <= least + FIGURES:
        raise Refused(f"masked is {values.dtype} {values.shape}, not as of this model")
    return ArrayRecord({"masked": array})


FIGURES = 32  # at most so many numbers go with a model under masks: its weight, images, losses


def byte_strings(**lengths: int) -> Check:
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


def byte_list(name: str, length: int, named: tuple[str, str], more: int = 0) -> Check:
    """A record of one list of byte strings, each of this length or empty: one for each site in the list at ``named`` of
    the message, and ``more``."""

    def check(record: Any, asked: Asked) -> ConfigRecord:
        if set(record) != {name} or not isinstance(record[name], list):
            raise Refused(f"{sorted(record)} instead of a list {name}")
        sites: Any = asked.content[named[0]][named[1]]
        if len(record[name]) > len(sites) + more:
            raise Refused(f"{name} holds more than one for each site")
        if not all(type(value) is bytes and len(value) in (0, length) for value in record[name]):
            raise Refused(f"{name} holds what is not {length} bytes")
        return ConfigRecord({name: list(record[name])})

    return check

"""Which replies may enter the aggregate: a reply that is not in order is dropped with a fixed word for why."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from flwr.app import ConfigRecord, Message
from flwr.common.constant import ErrorCode
from torch import Tensor

from shared.cases import SPLITS
from shared.codecs import CHANGE, Coding, coding, decode, length
from shared.config import Job
from shared.fixedpoint import MOST_LOSS
from shared.sitefile import SITE_NAME
from shared.subgroups import group_sums, groups_of, sums_of_groups
from shared.tasks import Sums
from shared.weights import control_scale, finite

# What a site may tell in a sum: with any number of sites it stays within 64 bits, and a float finite when squared.
_MOST_COUNTED, _MOST_SUMMED = 2**48, 1e100

_FAILURES = {
    ErrorCode.CLIENT_APP_RAISED_EXCEPTION: "site-error",
    ErrorCode.LOAD_CLIENT_APP_EXCEPTION: "app-did-not-load",
    ErrorCode.NODE_UNAVAILABLE: "site-gone",
    ErrorCode.CLIENT_APP_CRASHED: "site-crashed",
    ErrorCode.MESSAGE_UNAVAILABLE: "no-reply",
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: "no-reply",
}


class Dropped(Exception):
    """A reply that is not used; ``str`` is the reason, one of the fixed words of docs/coordinator.md."""


@dataclass
class Place:
    """A site as the server knows it."""

    node: int
    name: str
    images: dict[str, int]
    classes: list[int]
    skipped: int


class Update(NamedTuple):
    """A reply in order: its weight in the mean, its arrays, and the site's numbers.

    ``losses`` are those of parts; ``epsilon`` is what was ever spent on the site's images, NaN without DP; ``seconds``
    is how long it trained, NaN where it does not say.
    """

    weight: float
    arrays: dict[str, Tensor]
    steps: int
    images: int
    loss: float
    losses: list[float]
    epsilon: float
    seconds: float = math.nan
    beside: dict[str, dict[str, Tensor]] = {}  # noqa: RUF012  other records of arrays, where the job asks for them

    def told(self, parts: Sequence[str]) -> dict[str, Any]:
        """What a round's event says of it; ``parts`` are the names of the model's."""
        told = {"weight": self.weight, "steps": self.steps, "images": self.images, "loss": self.loss}
        several = len(parts) == len(self.losses) > 1
        losses = {"losses": dict(zip(parts, self.losses, strict=True))} if several else {}
        more = {"epsilon": self.epsilon, "train_seconds": self.seconds}
        return told | losses | {name: value for name, value in more.items() if not math.isnan(value)}


def status(reply: Message | None) -> Mapping[str, object]:
    """The status record of a reply that has content and comes from a site that did the work.

    Raises:
        Dropped: there is no reply, or it carries an error. The error's text is never used: it may hold patient data.
    """
    if reply is None:
        raise Dropped("no-reply")
    if reply.has_error():
        raise Dropped(_FAILURES.get(reply.error.code, "site-error"))
    record: Mapping[str, object] = reply.content.config_records.get("status", ConfigRecord())
    if record and not record.get("ok"):
        raise Dropped(f"site-declined: {_word(record.get('code'))}")
    return record


def _word(code: object) -> str:
    """A code as a site may send it, cut to what a code can be, so that no text can ride on it."""
    text = str(code)[:40]
    return text if text and all(c.isascii() and (c.isalnum() or c == "-") for c in text) else "unnamed"


class Facts(NamedTuple):
    """What a site says of itself before the first round."""

    name: str
    images: dict[str, int]
    classes: list[int]
    skipped: int


def admit_facts(reply: Message | None, job: Job, frozen: str, counted: int) -> Facts:
    """Check a site's answer to the survey: same job, same frozen weights, sound counts.

    ``frozen`` is the server's own digest of what does not travel, ``counted`` the number of class counts.

    Raises:
        Dropped: with the reason.
    """
    record = status(reply)
    assert reply is not None
    try:
        metrics, facts = reply.content.metric_records["metrics"], reply.content.config_records["facts"]
        counts = [metrics[f"images-{split}"] for split in SPLITS]
        classes, skipped = metrics["classes"], metrics["skipped"]
        theirs, name = (facts["job"], facts["frozen"]), str(record["site"])
    except KeyError:
        raise Dropped("wrong-records") from None
    if not re.fullmatch(SITE_NAME, name):
        raise Dropped("bad-name")
    if theirs[0] != job.sha256:
        raise Dropped("other-job")
    if theirs[1] != frozen:
        raise Dropped("other-frozen-weights")
    if not isinstance(classes, list) or len(classes) != counted:
        raise Dropped("wrong-records")
    numbers = [*counts, skipped, *classes]
    if not all(isinstance(number, int) and 0 <= number <= job.federation.max_examples for number in numbers):
        raise Dropped("bad-weight")
    return Facts(name, dict(zip(SPLITS, counts, strict=True)), list(classes), skipped)  # type: ignore[arg-type]


def admit(
    reply: Message | None,
    reference: Mapping[str, Tensor],
    job: Job,
    surveyed: int,
    beside: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Update:
    """Check a training reply against the global model it answers.

    ``surveyed`` is the number of training images the site named before the first round; it may not claim more later.
    ``beside`` are the records that went out with the model: the reply has one of the same names, shapes and kinds for
    each, a change worth no more than the model's may be.

    Raises:
        Dropped: with the reason.
    """
    status(reply)
    assert reply is not None
    content = reply.content
    beside = beside or {}
    if set(content.array_records) != {"arrays", *beside} or set(content.metric_records) != {"metrics"}:
        raise Dropped("wrong-records")
    metrics = content["metrics"]
    examples = metrics.get("num-examples")
    if not isinstance(examples, (int, float)) or not math.isfinite(examples):
        raise Dropped("bad-weight")
    if not 0 < examples <= min(surveyed, job.federation.max_examples):
        raise Dropped("bad-weight")
    how = coding(job)
    arrays = _changed(content["arrays"], reference, how) if how else _arrays(content["arrays"], reference)
    more = {name: _arrays(content[name], expected) for name, expected in beside.items()}
    if job.federation.max_update_norm:
        change = math.sqrt(sum((arrays[k].double() - reference[k].double()).square().sum().item() for k in arrays))
        worth = [
            math.sqrt(sum(array.double().square().sum().item() for array in record.values()))
            * control_scale(job, surveyed)
            for record in more.values()
        ]
        if max(change, *worth, 0.0) > job.federation.max_update_norm:
            raise Dropped("too-far")
    numbers = _count(metrics, "steps"), _count(metrics, "images"), _number(metrics, "loss"), _numbers(metrics, "losses")
    if job.federation.correction == "fednova" and not 0 < numbers[0] <= job.local_steps(surveyed):
        raise Dropped("bad-weight")  # there the steps weigh, too
    weight = _weight(job, float(examples), numbers[1], numbers[2])
    return Update(weight, arrays, *numbers, _amount(metrics, "epsilon"), _amount(metrics, "seconds"), more)


def _weight(job: Job, examples: float, seen: int, loss: float) -> float:
    """What a reply counts.

    By loss: images times their mean loss in training to the power of fairness. q-FFL (Li et al. 2020) takes the loss
    before training, for which each site would have to run the model once more.
    """
    if job.federation.weighting == "equal":
        return 1.0
    if job.federation.weighting == "examples":
        return examples
    if not (seen and 0 < loss < math.inf):
        raise Dropped("no-loss")
    weight: float = examples * min(loss / seen, MOST_LOSS) ** job.federation.fairness
    if not weight > 0:
        raise Dropped("no-loss")
    return weight


def _arrays(record: Mapping[str, object], reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if list(record) != list(reference):
        raise Dropped("wrong-names")
    arrays: dict[str, Tensor] = {}
    for name, expected in reference.items():
        try:
            values = record[name].numpy()  # type: ignore[attr-defined]
            array = torch.from_numpy(values)
        except Exception:
            raise Dropped("undecodable") from None
        if array.shape != expected.shape:
            raise Dropped("wrong-shape")
        if array.dtype != expected.dtype:
            raise Dropped("wrong-dtype")
        if array.is_floating_point() and not np.isfinite(values).all():  # NumPy's is ten times as fast as torch's
            raise Dropped("not-finite")
        arrays[name] = array
    return _sound(arrays)


def _sound(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """The arrays, if no variance is negative: its root would make the whole model NaN."""
    if any(bool((array < 0).any()) for name, array in arrays.items() if name.endswith("running_var")):
        raise Dropped("bad-variance")
    return arrays


def _changed(record: Mapping[str, object], reference: Mapping[str, Tensor], how: Coding) -> dict[str, Tensor]:
    """The model that a coded change leads to."""
    if list(record) != [CHANGE]:
        raise Dropped("wrong-names")
    try:
        change = record[CHANGE].numpy()  # type: ignore[attr-defined]
    except Exception:
        raise Dropped("undecodable") from None
    if change.shape != (length(reference, how),):
        raise Dropped("wrong-shape")
    if change.dtype != np.uint8:
        raise Dropped("wrong-dtype")
    try:
        arrays = decode(reference, change, how)
    except ValueError:
        raise Dropped("undecodable") from None
    if not finite(arrays):
        raise Dropped("not-finite")
    return _sound(arrays)


def _count(metrics: Mapping[str, object], key: str) -> int:
    value = metrics.get(key, 0)
    return value if isinstance(value, int) and 0 <= value < 2**53 else 0


def _number(metrics: Mapping[str, object], key: str) -> float:
    value = metrics.get(key, math.nan)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else math.nan


def _amount(metrics: Mapping[str, object], key: str) -> float:
    """A number that cannot be below 0; NaN where there is none."""
    value = _number(metrics, key)
    return value if value >= 0 else math.nan


def _numbers(metrics: Mapping[str, object], key: str) -> list[float]:
    value = metrics.get(key, [])
    return [float(item) for item in value[:16]] if isinstance(value, list) else []


def admit_sums(reply: Message | None, template: Sums, task: ModuleType, job: Job, surveyed: int) -> Sums:
    """Check an evaluation reply: the keys, lengths and kinds of ``template``, nothing negative or infinite, counts that
    agree with each other, and no more images than the site named before the first round.

    Raises:
        Dropped: with the reason.
    """
    sums = admit_form(reply, template)
    _require_counts(sums, task, job, surveyed)
    return sums


def _require_counts(sums: Sums, task: ModuleType, job: Job, surveyed: int) -> None:
    if sums["n"] > surveyed or not task.consistent(sums, job):  # type: ignore[operator]
        raise Dropped("wrong-sums")


def admit_groups(reply: Message | None, template: Sums, task: ModuleType, job: Job, surveyed: int) -> dict[str, Sums]:
    """The sums of each of the job's subgroups, each held against the same as those of an evaluation; the groups of one
    dimension are not more than the site's images.

    Raises:
        Dropped: with the reason.
    """
    groups = groups_of(job)
    found = sums_of_groups(admit_form(reply, group_sums(dict.fromkeys(groups, template))), groups)
    counted: dict[str, int] = {}
    for name, sums in found.items():
        _require_counts(sums, task, job, surveyed)
        dimension, _ = groups[name]
        counted[dimension] = counted.get(dimension, 0) + int(sums["n"])  # type: ignore[arg-type]
    if any(images > surveyed for images in counted.values()):
        raise Dropped("wrong-sums")
    return found


def admit_form(reply: Message | None, template: Sums) -> Sums:
    """The sums of a reply that have the keys, lengths and kinds of ``template``, and nothing negative or infinite.

    Raises:
        Dropped: with the reason.
    """
    status(reply)
    assert reply is not None
    if set(reply.content.metric_records) != {"metrics"}:
        raise Dropped("wrong-records")
    sums: Sums = dict(reply.content["metrics"])  # type: ignore[arg-type]
    if set(sums) != set(template):
        raise Dropped("wrong-names")
    for key, expected in template.items():
        if _length(sums[key]) != _length(expected):
            raise Dropped("wrong-shape")
        values = np.asarray(sums[key])
        if not np.all(np.isfinite(values) & (values >= 0)):
            raise Dropped("not-finite")
        counts = np.asarray(expected).dtype.kind == "i"
        if counts and values.dtype.kind != "i":
            raise Dropped("wrong-sums")
        if np.any(values > (_MOST_COUNTED if counts else _MOST_SUMMED)):
            raise Dropped("wrong-sums")
    return sums


def _length(value: int | float | list[int] | list[float]) -> int:
    return len(value) if isinstance(value, list) else -1

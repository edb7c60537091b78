"""What does not go with a client correction or with parts that stay home, and why: such a job is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from shared.errors import UserError

if TYPE_CHECKING:
    from shared.config import Job


class _Pair(NamedTuple):
    """Where ``key`` has one of ``values``, ``other`` must be one of ``allowed``."""

    key: str
    values: tuple[str, ...]
    other: str
    allowed: tuple[str | bool | int, ...]
    why: str


_SCAFFOLD, _DYN, _NOVA = ("scaffold",), ("feddyn",), ("fednova",)
_CORRECTION, _LOCAL = "federation.correction", "federation.local"
_PAIRS = (
    _Pair(_CORRECTION, ("scaffold", "fednova", "feddyn"), "federation.aggregator", ("mean",), "it counts on a mean"),
    _Pair(
        _CORRECTION, ("scaffold", "fednova", "feddyn"), "federation.order", ("parallel",),
        "where the model goes from site to site there is no mean of changes to correct",
    ),
    _Pair(
        _CORRECTION, ("scaffold", "feddyn"), "federation.weighting", ("examples", "equal"),
        "what sites keep adds up only under weights that stay the same",
    ),
    _Pair(
        _CORRECTION, _SCAFFOLD, "privacy.secure_aggregation", (False,),
        "each site's control variate would leave beside the masked model, in plain",
    ),
    _Pair(
        _CORRECTION, _NOVA, "privacy.secure_aggregation", (False,),
        "each site's change is divided by its own steps, and single changes are masked",
    ),
    _Pair(
        _CORRECTION, _DYN, "privacy.secure_aggregation", (False,),
        "the server must know whose changes are in the sum, and under masks a site may drop out unseen",
    ),
    _Pair(
        _CORRECTION, _SCAFFOLD, "privacy.dp", ("none", "local"),
        "the server's noise is on the model alone, not on the control variates",
    ),
    _Pair(
        _CORRECTION, _NOVA, "privacy.dp", ("none", "local"),
        "the server clips each site's whole change, not what it changed per step",
    ),
    _Pair(
        _CORRECTION, _DYN, "privacy.dp", ("none", "local"),
        "it adds the noise of every round up, divided by alpha",
    ),
    _Pair(
        _CORRECTION, ("scaffold", "feddyn"), _LOCAL, ("nothing", "ditto"),
        "a site's gradients of the common part would follow its own part, which moves: they correct nothing",
    ),
    _Pair(
        _CORRECTION, ("scaffold", "feddyn"), "federation.codec", ("none",),
        "what a site keeps is told of round by round, to each site in another message",
    ),
    _Pair(
        _CORRECTION, _DYN, "federation.server_optimizer", ("none",),
        "it takes a step of its own at the server",
    ),
    _Pair(
        _LOCAL, ("norm", "head"), "task", ("classification", "segmentation", "detection", "sequence", "reconstruction"),
        "the kept average of a generator is of the whole generator",
    ),
    _Pair(
        _LOCAL, ("norm", "head", "ditto"), "privacy.dp", ("none", "local", "distributed"),
        "the test figures of what stays home would tell of a site without the server's noise",
    ),
    _Pair(
        _LOCAL, ("ditto",), "privacy.dp", ("none",),
        "the personal model is trained without noise, and its test figures would leave",
    ),
    _Pair(
        _LOCAL, ("ditto",), "federation.finetune_steps", (0,),
        "there is a personal model already",
    ),
    _Pair(
        _LOCAL, ("head",), "model.freeze", ("none",),
        "with a frozen backbone the head is all that is trained: nothing would travel",
    ),
)  # fmt: skip


def check_local(job: Job) -> None:
    """Raise UserError where two settings of the job do not go together; it says why, and what to set."""
    for pair, given, other in _broken(job):
        allowed = " or ".join(_word(value) for value in pair.allowed)
        raise UserError(
            f"{pair.key} = {_word(given)}: does not go with {pair.other} = {_word(other)}: {pair.why}; "
            f"set {pair.other} to {allowed}"
        )
    if job.federation.finetune_steps and job.privacy.dp != "none":
        raise UserError(
            f"federation.finetune_steps = {job.federation.finetune_steps}: does not go with privacy.dp = "
            f'"{job.privacy.dp}": these steps are without noise, and their test figures would leave; set it to 0'
        )


def _broken(job: Job) -> Iterator[tuple[_Pair, object, object]]:
    flat = job.flat()
    for pair in _PAIRS:
        given, other = flat.get(pair.key), flat.get(pair.other, pair.allowed[0])
        if given in pair.values and other not in pair.allowed:
            yield pair, given, other


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)

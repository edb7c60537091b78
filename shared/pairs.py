"""Settings of a federation that do not go together: each pair is refused with the reason and what to set instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from shared.errors import UserError
from shared.strategies import AGGREGATORS

if TYPE_CHECKING:
    from shared.config import Job

Value = str | int | float | bool


class Pair(NamedTuple):
    """Where ``when`` of the value of ``key`` holds, ``other`` must be one of ``allowed``, for the reason ``why``."""

    key: str
    when: Callable[[Value], bool]
    other: str
    allowed: tuple[Value, ...]
    why: str


def _is(*values: Value) -> Callable[[Value], bool]:
    return lambda value: value in values


def _is_not(*values: Value) -> Callable[[Value], bool]:
    return lambda value: value not in values


_AGGREGATOR, _WEIGHTING, _ORDER, _CODEC = (f"federation.{k}" for k in ("aggregator", "weighting", "order", "codec"))
_CORRECTION, _LOCAL, _OPTIMIZER = "federation.correction", "federation.local", "federation.server_optimizer"
_DP, _SECURE, _EPOCHS, _TUNED = (
    "privacy.dp",
    "privacy.secure_aggregation",
    "train.local_epochs",
    "federation.finetune_steps",
)
_SUMMED = tuple(name for name, facts in AGGREGATORS.items() if facts.summed)
_BY_SIZE = ("examples", "equal")
_HIDDEN = "it hides each site's own reply, which this needs"
_CLIPPED = "it is proven for a sum of clipped changes"
_AS_IT_IS = "it takes the aggregate as it is"
_UNNOISED = "the personal model is trained without noise, and its test figures would leave"

PAIRS = (
    # ------------------------------------------------------------------ secure aggregation
    Pair(_SECURE, _is(True), _AGGREGATOR, _SUMMED, _HIDDEN),
    Pair(_SECURE, _is(True), _DP, ("none", "local", "distributed"), _HIDDEN),
    Pair(_SECURE, _is(True), _WEIGHTING, _BY_SIZE, _HIDDEN),
    Pair(_ORDER, _is("buffered"), _SECURE, (False,), "masks cancel only where all answer one model in one round"),
    Pair(_SECURE, _is(True), _ORDER, ("parallel",), "this shows each site's model to the next one"),
    Pair(_SECURE, _is(True), _CODEC, ("none",), "under masks, changes with scales of their own do not add up"),
    Pair(
        _CORRECTION, _is("scaffold"), _SECURE, (False,),
        "each site's control variate would leave beside the masked model, in plain",
    ),
    Pair(
        _CORRECTION, _is("fednova"), _SECURE, (False,),
        "each site's change is divided by its own steps, and single changes are masked",
    ),
    Pair(
        _CORRECTION, _is("feddyn"), _SECURE, (False,),
        "the server must know whose changes are in the sum, and under masks a site may drop out unseen",
    ),
    # ------------------------------------------------------------------ differential privacy
    Pair(_DP, _is("central"), _AGGREGATOR, ("mean",), _CLIPPED),
    Pair(_DP, _is("central"), _ORDER, ("parallel",), _CLIPPED),
    Pair(_DP, _is_not("none"), _WEIGHTING, _BY_SIZE, "it does not let out each site's loss, which this needs"),
    Pair(_DP, _is_not("none"), _EPOCHS, (0.0,), "it counts train.local_steps"),
    Pair(
        _CORRECTION, _is("scaffold"), _DP, ("none", "local"),
        "the server's noise is on the model alone, not on the control variates",
    ),
    Pair(
        _CORRECTION, _is("fednova"), _DP, ("none", "local"),
        "the server clips each site's whole change, not what it changed per step",
    ),
    Pair(_CORRECTION, _is("feddyn"), _DP, ("none", "local"), "it adds the noise of every round up, divided by alpha"),
    Pair(
        _LOCAL, _is("norm", "head", "ditto"), _DP, ("none", "local", "distributed"),
        "the test figures of what stays home would tell of a site without the server's noise",
    ),
    Pair(_LOCAL, _is("ditto"), _DP, ("none",), _UNNOISED),
    Pair(_TUNED, _is_not(0), _DP, ("none",), _UNNOISED),
    Pair(
        _CORRECTION, _is("proximal", "scaffold", "feddyn"), "privacy.gradients", ("auto", "single"),
        "hooks replace layers, and with them the weights that are corrected",
    ),
    Pair(_CORRECTION, _is("adversarial"), _DP, ("none",), "the gradient of what tells sites apart is not noised"),
    # ------------------------------------------------------------------ order, server, codec
    Pair(_ORDER, _is("cyclic"), _AGGREGATOR, ("mean",), "it leaves nothing to merge"),
    Pair(_ORDER, _is("cyclic"), _WEIGHTING, _BY_SIZE, "a cycle weighs nobody"),
    Pair(_ORDER, _is("cyclic"), _CODEC, ("none",), "a cycle sends a site another model than the one it has"),
    Pair(
        _ORDER, _is("cyclic"), _CORRECTION, ("none", "proximal"),
        "where the model goes from site to site there is no mean of changes to correct",
    ),
    Pair(_ORDER, _is("buffered"), _CODEC, ("none",), "a site that is behind has another model than the one changed"),
    Pair(
        _ORDER, _is("buffered"), _CORRECTION, ("none", "proximal"),
        "what corrects counts on replies to one model",
    ),
    Pair(_OPTIMIZER, _is("none"), "federation.server_learning_rate", (0.0,), _AS_IT_IS),
    Pair(_OPTIMIZER, _is("none"), "federation.server_schedule", ("constant",), _AS_IT_IS),
    Pair(_EPOCHS, _is_not(0.0), "train.local_steps", (1,), "both say how long a site trains; set one of them"),
    # ------------------------------------------------------------------ corrections, parts that stay home
    Pair(_CORRECTION, _is("scaffold", "fednova", "feddyn"), _AGGREGATOR, ("mean",), "it counts on a mean"),
    Pair(
        _CORRECTION, _is("scaffold", "feddyn"), _WEIGHTING, _BY_SIZE,
        "what sites keep adds up only under weights that stay the same",
    ),
    Pair(
        _CORRECTION, _is("scaffold", "feddyn"), _LOCAL, ("nothing", "ditto"),
        "a site's gradients of the common part would follow its own part, which moves: they correct nothing",
    ),
    Pair(
        _CORRECTION, _is("scaffold", "feddyn"), _CODEC, ("none",),
        "what a site keeps is told of round by round, to each site in another message",
    ),
    Pair(_CORRECTION, _is("feddyn"), _OPTIMIZER, ("none",), "it takes a step of its own at the server"),
    Pair(
        _CORRECTION, _is("adversarial"), "task", ("classification", "segmentation", "sequence"),
        "it looks at the features that one head reads",
    ),
    Pair(_CORRECTION, _is("adversarial"), "model.freeze", ("none",), "it teaches what is frozen"),
    Pair(_CORRECTION, _is("adversarial"), "train.compile", (False,), "it looks into the network while that runs"),
    Pair(
        _LOCAL, _is("norm", "head"), "task",
        ("classification", "segmentation", "detection", "sequence", "reconstruction"),
        "the kept average of a generator is of the whole generator",
    ),
    Pair("task", _is("generation"), _EPOCHS, (0.0,), "the kept average of a generator counts train.local_steps"),
    Pair(_LOCAL, _is("ditto"), _TUNED, (0,), "there is a personal model already"),
    Pair(
        _LOCAL, _is("head"), "model.freeze", ("none",),
        "with a frozen backbone the head is all that is trained: nothing would travel",
    ),
)  # fmt: skip


def check_pairs(job: Job) -> None:
    """Raise UserError for the first pair of ``PAIRS`` that the job breaks, or for a buffer that is too small."""
    flat = job.flat()
    for pair in PAIRS:
        value, other = flat[pair.key], flat[pair.other]
        if pair.when(value) and other not in pair.allowed:
            allowed = " or ".join(_quoted(choice) for choice in pair.allowed)
            raise UserError(
                f"{pair.other} = {_quoted(other)}: does not go with {pair.key} = {_quoted(value)}: "
                f"{pair.why}; use {allowed}"
            )
    asked, wanted = job.federation, max(job.federation.min_sites, fewest(job))
    if asked.order == "buffered" and asked.buffer < wanted:
        raise UserError(
            f"federation.buffer = {asked.buffer}: a round ends with so many replies, and federation.min_sites or "
            f"federation.aggregator needs {wanted}; use {wanted} or more"
        )


def fewest(job: Job) -> int:
    """How many replies the job's aggregator needs in a round."""
    return AGGREGATORS[job.federation.aggregator].least(job.federation.byzantine, job.federation.trim)


def _quoted(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)

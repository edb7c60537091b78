"""A site's part in secure aggregation: four answers a round, after which the server knows the sum of the models alone.

keys      the site makes new keys for the round and shows the public ones
shares    it is shown who takes part, and gives each of them, sealed, a share of its seeds
masked    it trains as in any round and sends its change of the model under masks
unmask    it is told whose masked change arrived: of these it reveals shares of their own masks' seeds, of the others
          shares of the seeds of the masks they had with their peers; never both of one site

Messages of a round may be answered by different processes: what the site must remember lies in Flower's state of the
run, which stays here. Once it has revealed its shares, it forgets its secrets. A message asked again is answered as
before or refused; none is answered in another order, nor a round twice, since two sums of almost the same sites would
tell their difference. Of which round it last revealed shares is written down: a resumed run has a new state.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict

from client.workspace import Workspace, run_name, write_log
from shared.accounting import noisy_sites
from shared.config import Job
from shared.errors import SiteRefusal
from shared.files import write_text
from shared.fixedpoint import change, clip, encode
from shared.masking import (
    SEED,
    add_masks,
    agree,
    commitment,
    new_seed,
    own_mask,
    pair_masks,
    public_key,
    seal,
    share_out,
    threshold,
    unseal,
)
from shared.sitefile import OWN_FOLDER, SITE_NAME
from shared.tasks import load_task

Train = Callable[[Message, Context, Job, Workspace], RecordDict]
Stage = Callable[[Message, Context, Job, Workspace], RecordDict]
STATE, ROUNDS = "secure-aggregation", "secure-aggregation-rounds"  # records of the run's state
KEYS, SHARES, MASKED, UNMASKED = 1, 2, 3, 4


@dataclass
class _Round:
    """What the site remembers of the round it is in. Lists of bytes are in the order of ``names`` or ``sharing``."""

    job: str
    round: int
    stage: int = KEYS
    mask_seed: bytes = field(default_factory=new_seed)  # of the masks with each peer
    seal_seed: bytes = field(default_factory=new_seed)  # of what is sealed for each peer
    own_seed: bytes = field(default_factory=new_seed)  # of the site's own mask
    names: list[str] = field(default_factory=list)
    mask_keys: list[bytes] = field(default_factory=list)
    seal_keys: list[bytes] = field(default_factory=list)
    kept: bytes = b""  # the pair of shares that the site holds of its own seeds
    sealed: list[bytes] = field(default_factory=list)
    sharing: list[str] = field(default_factory=list)  # who is in the masks
    arrived: list[str] = field(default_factory=list)
    revealed: list[bytes] = field(default_factory=list)

    @property
    def tag(self) -> str:
        return f"{self.job} {self.round}"

    def save(self, context: Context) -> None:
        context.state[STATE] = ConfigRecord(dict(vars(self)))


def _load(context: Context) -> _Round | None:
    record = context.state.config_records.get(STATE)
    return _Round(**record) if record else None  # type: ignore[arg-type]


def _current(message: Message, context: Context, job: Job, *stages: int) -> _Round:
    """The round the site is in, if the message is about it and comes in order."""
    state = _load(context)
    number = int(message.content["config"]["round"])  # type: ignore[arg-type]
    if state is None or (state.job, state.round) != (job.sha256, number):
        raise SiteRefusal("wrong-round", f"asked about round {number}, the site is in another or in none")
    if state.stage not in stages:
        raise SiteRefusal("wrong-stage", f"a message out of order: the site is at stage {state.stage} of 4")
    return state


def _checked(names: list[str], me: str, least: int, within: list[str] | None = None) -> list[str]:
    """A list of sites as the server shows it: sorted, no name twice, this site in it, not too few."""
    if names != sorted(set(names)) or not all(re.fullmatch(SITE_NAME, name) for name in names):
        raise SiteRefusal("wrong-list", "the list of sites is not one of sorted, different names")
    if me not in names or (within is not None and not set(names) <= set(within)):
        raise SiteRefusal("wrong-list", "the list of sites lacks this one, or has one that was not there before")
    if len(names) < least:
        raise SiteRefusal("too-few-sites", f"{len(names)} sites in the list, {least} are needed")
    return names


def _needed(state: _Round, job: Job) -> int:
    return threshold(len(state.names), job.privacy.secure_share, noisy_sites(job))


# ---------------------------------------------------------------------- the four stages


def keys(message: Message, context: Context, job: Job, workspace: Workspace) -> RecordDict:
    """New keys for a round that is later than any before.

    Raises:
        SiteRefusal: the round is not a new one, or the job has no secure aggregation.
    """
    if not job.privacy.secure_aggregation:
        raise SiteRefusal("no-secure-aggregation", "asked for keys, but the job has privacy.secure_aggregation = false")
    number = int(message.content["config"]["round"])  # type: ignore[arg-type]
    rounds = ConfigRecord(dict(context.state.config_records.get(ROUNDS, ConfigRecord())))
    state = _load(context)
    again = state is not None and (state.job, state.round, state.stage) == (job.sha256, number, KEYS)
    if state is None or not again:
        if number <= max(int(rounds.get(job.sha256, 0)), _revealed(context, job, workspace)):  # type: ignore[arg-type]
            raise SiteRefusal("wrong-round", f"round {number} is not later than those the site was in")
        state = _Round(job.sha256, number)
        state.save(context)
        rounds[job.sha256] = number
        context.state[ROUNDS] = rounds
    mine = {"mask": public_key(state.mask_seed), "seal": public_key(state.seal_seed)}
    return RecordDict({"keys": ConfigRecord({**mine, "commitment": commitment(state.own_seed)})})


def _note(context: Context, job: Job, workspace: Workspace) -> Path:
    """Where the last round is written down of which shares were revealed; beside the run's memory, which may go."""
    return workspace.home / OWN_FOLDER / "state" / run_name(context) / f"{job.sha256[:16]}.revealed"


def _revealed(context: Context, job: Job, workspace: Workspace) -> int:
    try:
        return int(_note(context, job, workspace).read_text(encoding="ascii"))
    except FileNotFoundError:
        return 0


def shares(message: Message, context: Context, job: Job, workspace: Workspace) -> RecordDict:
    """A share of the site's seeds for each site of the round, sealed for it; ``b""`` stands in its own place.

    Raises:
        SiteRefusal: the list of sites is not in order, names too few, or has other keys of this site than its own.
    """
    state = _current(message, context, job, KEYS, SHARES)
    peers, me = message.content["peers"], workspace.name
    names: list[str] = list(peers["names"])  # type: ignore[arg-type]
    mask_keys: list[bytes] = list(peers["mask"])  # type: ignore[arg-type]
    seal_keys: list[bytes] = list(peers["seal"])  # type: ignore[arg-type]
    _checked(names, me, max(2, job.federation.min_sites))
    if not len(names) == len(mask_keys) == len(seal_keys):
        raise SiteRefusal("wrong-list", "there are not as many keys as sites")
    place = names.index(me)
    if (mask_keys[place], seal_keys[place]) != (public_key(state.mask_seed), public_key(state.seal_seed)):
        raise SiteRefusal("key-changed", "the keys shown for this site are not its own")
    if state.stage == SHARES:
        if (names, mask_keys, seal_keys) != (state.names, state.mask_keys, state.seal_keys):
            raise SiteRefusal("wrong-list", "asked a second time with another list of sites")
        return RecordDict({"shares": ConfigRecord({"sealed": state.sealed})})
    state.names, state.mask_keys, state.seal_keys, state.stage = names, mask_keys, seal_keys, SHARES
    _seal_all(state, me, _needed(state, job))
    state.save(context)
    return RecordDict({"shares": ConfigRecord({"sealed": state.sealed})})


def _seal_all(state: _Round, me: str, needed: int) -> None:
    """Split the site's seeds into shares, keep one pair of them, seal one for each peer."""
    count, tag = len(state.names), state.tag
    masks, own = share_out(state.mask_seed, needed, count), share_out(state.own_seed, needed, count)
    for name, theirs, pair in zip(state.names, state.seal_keys, map(bytes.__add__, masks, own), strict=True):
        if name == me:
            state.kept = pair
            state.sealed.append(b"")
            continue
        try:
            key = agree(state.seal_seed, theirs, "seal", tag, me, name)
        except ValueError:
            raise SiteRefusal("bad-keys", "a key in the list is not one") from None
        state.sealed.append(seal(key, pair, tag, me, name))


def masked(train: Train) -> Stage:
    """The stage that trains by ``train``, as a plain round would, and sends the change of the model under masks."""

    def answer(message: Message, context: Context, job: Job, workspace: Workspace) -> RecordDict:
        state = _current(message, context, job, SHARES)
        config, me = message.content["config"], workspace.name
        state.sharing = _checked(list(config["sharing"]), me, _needed(state, job), state.names)  # type: ignore[arg-type]
        coded = _encoded(train(message, context, job, workspace), message, job, len(state.sharing))
        known = dict(zip(state.names, state.mask_keys, strict=True))
        others = {name: known[name] for name in state.sharing if name != me}
        try:
            plus, minus = pair_masks(me, state.mask_seed, others, state.tag)
        except ValueError:
            raise SiteRefusal("bad-keys", "a key in the list is not one") from None
        add_masks(coded, [*plus, own_mask(state.own_seed, state.tag)], minus)
        state.stage = MASKED
        state.save(context)
        write_log(workspace.home, f"round {state.round}: the model leaves masked, in a sum with {', '.join(others)}")
        return RecordDict({"arrays": ArrayRecord({"masked": Array(coded)})})

    return answer


def _encoded(trained: RecordDict, message: Message, job: Job, sites: int) -> np.ndarray:
    """The vector to be masked, from what a plain round would have sent."""
    before = message.content.array_records["arrays"].to_torch_state_dict()
    after, metrics = trained.array_records["arrays"].to_torch_state_dict(), trained.metric_records["metrics"]
    weight = 1.0
    if job.federation.weighting == "examples":
        weight = float(metrics["num-examples"]) / float(message.content["config"]["max-weight"])  # type: ignore[arg-type]
    if not 0 < weight <= 1:
        raise SiteRefusal("bad-weight", f"{metrics['num-examples']} images are more than the server says any site has")
    bound, images = job.federation.max_update_norm, int(metrics.get("images", 0))  # type: ignore[arg-type]
    vector = change(before, after)
    try:
        clip(vector, bound)
    except ValueError:
        raise SiteRefusal("not-finite", "the trained model holds numbers that are not finite") from None
    return encode(vector, weight, images, _losses(metrics, images, job), bound, sites)


def _losses(metrics: object, images: int, job: Job) -> list[float]:
    """Mean loss per image: of the whole, then of each part of a model of several; NaN where it is not told."""
    parts = len(load_task(job.task).parts(job))
    sums = [metrics.get("loss", float("nan")), *(metrics.get("losses", []) if parts > 1 else [])]  # type: ignore[attr-defined]
    told = len(sums) == (parts + 1 if parts > 1 else 1) and images > 0
    return [float(value) / images for value in sums] if told else [float("nan")] * (parts + 1 if parts > 1 else 1)


def unmask(message: Message, context: Context, job: Job, workspace: Workspace) -> RecordDict:
    """For each site that was in the masks one share: of its own mask's seed if its change arrived, else of the other.

    Raises:
        SiteRefusal: too few changes arrived, this site's did not, or it has answered for another list before.
    """
    state = _current(message, context, job, MASKED, UNMASKED)
    asked, me = message.content["unmask"], workspace.name
    arrived: list[str] = list(asked["arrived"])  # type: ignore[arg-type]
    if state.stage == UNMASKED and arrived != state.arrived:
        raise SiteRefusal("changed-survivors", "asked a second time about other survivors of the round")
    if state.stage == MASKED:
        if state.round <= _revealed(context, job, workspace):  # a resumed run was faster
            raise SiteRefusal("wrong-round", f"shares of round {state.round} were revealed to another attempt")
        _checked(arrived, me, _needed(state, job), state.sharing)
        sealed: dict[str, bytes] = dict(zip(asked["senders"], asked["sealed"], strict=True))  # type: ignore[arg-type]
        pairs = _opened(state, me, sealed)
        state.revealed = [pair[SEED:] if name in arrived else pair[:SEED] for name, pair in pairs]
        state.arrived, state.stage = arrived, UNMASKED
        state.mask_seed = state.seal_seed = state.own_seed = state.kept = b""
        write_text(_note(context, job, workspace), str(state.round))
        state.save(context)
    return RecordDict({"revealed": ConfigRecord({"shares": state.revealed})})


def _opened(state: _Round, me: str, sealed: dict[str, bytes]) -> list[tuple[str, bytes]]:
    """Pairs of shares by the site they came from; ``b""`` where none came that is in order."""
    keys = dict(zip(state.names, state.seal_keys, strict=True))
    found = []
    for name in state.sharing:
        pair = state.kept if name == me else b""
        if name != me:
            try:
                key = agree(state.seal_seed, keys[name], "seal", state.tag, name, me)
                pair = unseal(key, sealed.get(name, b""), state.tag, name, me)
            except ValueError:
                pair = b""
        found.append((name, pair))
    return found

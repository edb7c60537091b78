"""The way to the sites: what a message weighs, and how the model goes down it as changes of what a site has already.

Under ``federation.codec`` the run's model after each round is what its sites can put together from what was sent: the
old one and the coded change. What a change left out is kept (``late``) and added to the next, so nothing is lost. The
last few changes are at hand: a site that missed rounds gets those that it missed, as long as they are fewer bytes than
the model. A site that is new, missed more, or says that it has lost its model gets the model whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from server.admission import Dropped, Place, status
from server.exchange import array_bytes, replies
from shared.cases import derived_seed
from shared.codecs import coding, decode, encode, residual, with_residual
from shared.config import Job
from shared.weights import digest

Arrays = dict[str, Tensor]
LATE = "codec-late"  # what a checkpoint calls what the changes left out so far


@dataclass
class Addressed:
    """A content that holds the model after round ``version``, as each site needs it: a site has the model of ``has``.

    Sites that have the same get the same object, so that an engine need not write it out for each.
    """

    whole: RecordDict
    version: int
    has: Mapping[str, int]
    changes: Mapping[int, np.ndarray]
    _made: dict[int, RecordDict] = field(default_factory=dict)

    def __call__(self, place: Place) -> RecordDict:
        base = self.has.get(place.name, -1)
        missed = range(base + 1, self.version + 1)
        if not 0 <= base <= self.version or not all(number in self.changes for number in missed):
            return self.whole
        if base not in self._made:
            content = RecordDict(dict(self.whole))
            content["arrays"] = ArrayRecord({str(number): Array(self.changes[number]) for number in missed})
            content["config"] = ConfigRecord(dict(self.whole.config_records["config"]) | {"codec-base": base})
            self._made[base] = content
        return self._made[base]


Content = RecordDict | Callable[[Place], RecordDict]


class Line:
    """Sends contents to the sites of a run and counts bytes; ``version`` is the round whose model the run has."""

    def __init__(self, job: Job, version: int = 0, late: Arrays | None = None) -> None:
        self.job, self.how = job, coding(job)
        self.version, self.late = version, late or {}
        self.changes: dict[int, np.ndarray] = {}
        self.has: dict[str, int] = {}  # the round whose model each site has
        self.moved: dict[str, tuple[int, int]] = {}  # bytes of arrays to and from each site since ``weighed``
        self.took: dict[str, float] = {}  # seconds from question to reply by site, until cleared

    def held(self) -> dict[str, Arrays]:
        """What the checkpoint must keep."""
        return {LATE: self.late} if self.late else {}

    def step(self, before: Arrays, after: Arrays, number: int) -> Arrays:
        """The model after round ``number`` as the sites will have it: ``before`` and the coded change to ``after``."""
        if self.how is None:
            return after
        target = with_residual(after, self.late)
        try:
            change = encode(before, target, self.how, derived_seed(self.job.seed, "codec", number))
        except ValueError:  # not finite: no site will have anything to add to
            self.changes, self.late, self.version = {}, {}, number
            return after
        reached = decode(before, change, self.how)
        self.late, self.version = residual(target, reached), number
        self.changes[number] = change
        whole = sum(array.numel() * array.element_size() for array in reached.values())
        while sum(len(change) for change in self.changes.values()) > whole:
            del self.changes[min(self.changes)]
        return reached

    def addressed(self, content: RecordDict, arrays: Arrays, version: int) -> Content:
        """``content``, which holds the model ``arrays`` after round ``version``, for sites that may have it already."""
        if self.how is None or version != self.version:
            return content
        content["config"] = ConfigRecord(
            dict(content.config_records["config"]) | {"codec-version": version, "codec-digest": digest(arrays)}
        )
        return Addressed(content, version, self.has, self.changes)

    def weighed(self) -> dict[str, tuple[int, int]]:
        """Bytes of arrays to and from each site since this was last asked."""
        moved, self.moved = self.moved, {}
        return moved

    def exchange(
        self, grid: Grid, kind: str, content: Content, places: Iterable[Place], round_: int
    ) -> Iterator[tuple[Place, Message | None]]:
        """Send one content, or each its own, to the places; give each place's reply or None, in their order."""
        places = list(places)
        own = content if callable(content) else lambda _: content
        messages = [Message(own(place), place.node, kind, group_id=str(round_)) for place in places]
        came: list[float] = []
        patience = self._patience(kind, places)
        answers = replies(grid, messages, patience, came)
        for place, message in zip(places, messages, strict=True):
            box = [next(answers)]
            self.weigh(place, message, box[0])
            self.took[place.name] = self.took.get(place.name, 0.0) + came[-1]
            if isinstance(content, Addressed):
                if _lost(box[0]):
                    self.has.pop(place.name, None)
                    message = Message(content.whole, place.node, kind, group_id=str(round_))
                    box = [next(replies(grid, [message], patience))]
                    self.weigh(place, message, box[0])
                if _worked(box[0]):
                    self.has[place.name] = content.version
            yield place, box.pop()  # nothing here holds it while the next one is waited for

    def _patience(self, kind: str, places: list[Place]) -> float:
        """Seconds for the replies: fine-tuning takes as many times a round as it has more steps than one."""
        job, rounds = self.job, 1.0
        if kind == "evaluate.personal":
            steps = min((job.local_steps(place.images.get("train", 0)) for place in places), default=1)
            rounds += job.federation.finetune_steps / steps
        return min(rounds * job.federation.round_timeout, 1e7)

    def weigh(self, place: Place, message: Message, reply: Message | None) -> None:
        """Count the bytes of a question and its answer."""
        down, up = self.moved.get(place.name, (0, 0))
        self.moved[place.name] = down + array_bytes(message), up + array_bytes(reply)


def _worked(reply: Message | None) -> bool:
    try:
        status(reply)
    except Dropped:
        return False
    return True


def _lost(reply: Message | None) -> bool:
    """Whether the site declines because it does not have the model that a change is of."""
    if reply is None or reply.has_error():
        return False
    return reply.content.config_records.get("status", ConfigRecord()).get("code") == "model-missing"

"""Buffered asynchronous rounds (FedBuff, Nguyen et al. 2022): a round ends with so many replies, whoever sent them.

Nobody waits for a slow site. It trains on the model of the round in which it was asked; when its reply comes the run
may be some rounds further, and its change is then made to the model of now, the less of it the further it is behind:
(1 + rounds behind) to the power of -``federation.staleness``. Which replies a round gets depends on who was faster, so
unlike other orders this one does not repeat to the bit.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from server.admission import Place
from server.exchange import first_replies, push
from server.wire import Line
from shared.config import Job

Arrays = dict[str, Tensor]


class Asked(NamedTuple):
    """A site that trains: since when (``time.monotonic``), in which round, on which model."""

    place: Place
    message: Message
    arrays: Arrays
    number: int
    since: float


class Buffered:
    """The sites that are at work, over all rounds of a run."""

    def __init__(self, grid: Grid, line: Line, job: Job) -> None:
        self.grid, self.line, self.job = grid, line, job
        self.at_work: dict[str, Asked] = {}  # by message id
        self.came: deque[tuple[str, Message]] = deque()  # with the id of the question

    def idle(self, places: Sequence[Place]) -> list[Place]:
        """Those that may be asked: a site has one question at a time."""
        busy = {asked.place.name for asked in self.at_work.values()}
        return [place for place in places if place.name not in busy]

    def replies(
        self, places: Sequence[Place], content: RecordDict, arrays: Arrays, number: int
    ) -> Iterator[tuple[Asked, Message | None]]:
        """Ask ``places`` to train on the model ``arrays`` in ``content``; give replies to this and earlier questions.

        They come as they are there, with None for a site that did not answer within ``federation.round_timeout``, until
        nobody is at work. Who has enough stops asking for more: those that are not taken come first in the next round.
        """
        self._ask(places, content, arrays, number)
        while self.at_work:
            while self.came:
                name, reply = self.came.popleft()
                if asked := self.at_work.pop(name, None):
                    yield self._answered(asked, reply)
            for name in [name for name, asked in self.at_work.items() if self._left(asked) <= 0]:
                yield self._answered(self.at_work.pop(name), None)
            if self.at_work:
                longest = min(map(self._left, self.at_work.values()))
                found = first_replies(self.grid, list(self.at_work), max(longest, 0.0))
                self.came.extend(sorted(found.items(), key=lambda item: self.at_work[item[0]].place.name))

    def forget(self) -> None:
        """Nobody waits any more for those that are at work."""
        if hasattr(self.grid, "forget"):
            self.grid.forget(list(self.at_work))
        self.at_work.clear()
        self.came.clear()

    def _ask(self, places: Sequence[Place], content: RecordDict, arrays: Arrays, number: int) -> None:
        messages = [Message(content, place.node, MessageType.TRAIN, group_id=str(number)) for place in places]
        now = time.monotonic()
        for name, place, message in zip(push(self.grid, messages), places, messages, strict=True):
            # What could not be sent is not waited for: it is a reply that did not come.
            since = now if name else -math.inf
            self.at_work[name or f"unsent to {place.name}"] = Asked(place, message, arrays, number, since)

    def _left(self, asked: Asked) -> float:
        """Seconds until its reply comes too late."""
        return asked.since + self.job.federation.round_timeout - time.monotonic()

    def _answered(self, asked: Asked, reply: Message | None) -> tuple[Asked, Message | None]:
        self.line.weigh(asked.place, asked.message, reply)
        if math.isfinite(asked.since):
            self.line.took[asked.place.name] = time.monotonic() - asked.since
        return asked, reply


def rebased(
    reply: Arrays, sent: Mapping[str, Tensor], now: Mapping[str, Tensor], share: float, trained: Collection[str]
) -> Arrays:
    """``now`` with ``share`` of the change that a site made to the model ``sent``.

    What is not trained (counters, running statistics) is as the site has it.
    """
    if share == 1.0 and all(now[name] is sent[name] for name in trained):
        return reply
    moved = dict(reply)
    for name in trained:
        change = reply[name].double() - sent[name].double()
        moved[name] = (now[name].double() + share * change).to(reply[name].dtype)
    return moved

"""Sends messages to sites and hands out their replies in the order of the messages, one by one."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, inflate_object_from_contents, pull_objects

from shared.packing import pack, unpack

POLLS = 0.2, 3.0  # seconds between questions for replies: at least and at most
SHARE = 0.05  # of the time since the last news, between the two
IDLE = 4.0  # times as long as a question took, so that asking never keeps a busy server from its work
AHEAD = 4  # replies in memory while one before them is waited for; the others wait at the server's SuperLink


def _soon(object_ids: list[str], pull_object_fn: Callable[[str], bytes]) -> dict[str, bytes]:
    """Flower's ``pull_objects`` for the parts of a reply, the reply itself last.

    A reply is there before its parts are; Flower looks for a part again after 1, 2, 4, 8 and 10 s, and has no setting.
    And what cannot be put together ends Flower's ServerApp: here it is a part that is missing, so an error of its site.
    """
    parts = pull_objects(object_ids, pull_object_fn, initial_backoff=0.1, backoff_cap=1.0, max_tries_per_object=None)
    try:
        inflate_object_from_contents(object_ids[-1], parts, keep_object_contents=True)
    except MemoryError:
        raise
    except Exception as problem:
        raise ObjectPullError(object_ids[-1], f"it is not in order: {type(problem).__name__}") from None
    return parts


def replies(
    grid: Grid, messages: Sequence[Message], timeout: float, came: list[float] | None = None
) -> Iterator[Message | None]:
    """The reply to each message, or None where none came within ``timeout`` seconds of the call.

    An engine whose ``send_and_receive`` yields the replies one by one in the order asked is read as it yields. Any
    other is asked for what is there again and again, and put in order here: sums of floats depend on it. ``came`` gets,
    before a reply is handed out, the seconds from the call until it was there.
    """
    began, came = time.time(), [] if came is None else came
    yields = grid.send_and_receive(messages, timeout=timeout) if hasattr(grid, "in_order") else None
    if yields is not None:
        ordered = iter(yields)
        for _ in messages:
            box = [next(ordered, None)]
            came.append(_made_after(box[0], began))
            yield box.pop()  # nothing here holds it while the next one is waited for
        return
    deadline = time.monotonic() + timeout
    names = push(grid, messages)
    here: dict[str, Message] = {}
    times: dict[str, float] = {}
    heard = time.monotonic()
    for place, name in enumerate(names):
        while name and name not in here:
            asked = time.monotonic()
            wanted = [other for other in names[place : place + 1 + AHEAD] if other and other not in here]
            news = _collect(grid, wanted, here)
            now = time.monotonic()
            heard = now if news else heard
            times = dict.fromkeys(here, time.time() - began) | times
            if name not in here:
                if now >= deadline:
                    break
                _pause(now - heard, now - asked, deadline - now)
        came.append(times.pop(name, time.time() - began))
        yield here.pop(name, None)


def push(grid: Grid, messages: Sequence[Message]) -> list[str]:
    """Send messages; gives the name of each by which its reply is asked for, "" for one that could not be sent."""
    if not messages:
        return []
    http_grid = sys.modules.get("flwr.superlink.grid.http_grid")  # half a second to import, and few runs need it
    if between_machines := http_grid is not None and isinstance(grid, http_grid.HttpGrid):
        http_grid.pull_objects = _soon  # type: ignore[attr-defined]
    names = list(grid.push_messages(_packed(messages) if between_machines else messages))
    return [*names, *[""] * (len(messages) - len(names))]


def first_replies(grid: Grid, names: list[str], timeout: float) -> dict[str, Message]:
    """The replies that are there to the messages of these names, as soon as there is any; none after ``timeout`` s."""
    began, here = time.monotonic(), dict[str, Message]()
    while True:
        if hasattr(grid, "wait_any"):  # an engine on this machine, which need not be asked again and again
            grid.wait_any(names, max(began + timeout - time.monotonic(), 0.0))
        asked = time.monotonic()
        if _collect(grid, names, here) or asked >= began + timeout:
            return here
        now = time.monotonic()
        _pause(now - began, now - asked, began + timeout - now)


def _pause(silent: float, took: float, left: float) -> None:
    """Wait before the next question: there was no news for ``silent`` s, the last one took ``took`` s."""
    wait = min(max(SHARE * silent, IDLE * took, POLLS[0]), POLLS[1])
    time.sleep(min(wait, max(0.0, left)))


def _collect(grid: Grid, names: list[str], here: dict[str, Message]) -> bool:
    """Put those replies that are there ``here``; whether any was. Others than those asked for are passed over."""
    found = [reply for reply in grid.pull_messages(names) if reply.metadata.reply_to_message_id in names]
    here.update((reply.metadata.reply_to_message_id, _plain(reply)) for reply in found)
    return bool(found)


def _packed(messages: Sequence[Message]) -> list[Message]:
    """Copies of the messages with their arrays packed; what several share is packed once."""
    done: dict[int, Any] = {}
    copies = []
    for message in messages:
        copies.append(copy.copy(message))
        copies[-1].content = pack(message.content, done)
    return copies


def _plain(reply: Message) -> Message:
    """The reply as its site meant it. One whose packing is not in order stays as it is, and is not admitted later."""
    if reply.has_content():
        with suppress(ValueError):
            reply.content, _ = unpack(reply.content)
    return reply


def _made_after(reply: Message | None, asked: float) -> float:
    """Seconds from ``asked`` until the reply was made, by an engine on this machine's clock: it may have held the reply
    back until those before it were there. Until now where it does not say."""
    now = time.time() - asked
    return now if reply is None else min(max(reply.metadata.created_at - asked, 0.0), now)


def array_bytes(message: Message | None) -> int:
    """Bytes of the arrays in a message, with their names; 0 where there is none."""
    if message is None or message.has_error():
        return 0
    return sum(record.count_bytes() for record in message.content.array_records.values())

"""Sends messages to sites and hands out their replies in the order of the messages, one by one."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from flwr.app import Message
from flwr.serverapp import Grid

POLLS = 0.2, 3.0  # seconds between questions for replies: at first, and at most


def replies(
    grid: Grid, messages: Sequence[Message], timeout: float, came: list[float] | None = None
) -> Iterator[Message | None]:
    """The reply to each message, or None where none came within ``timeout`` seconds of the call.

    An engine whose ``send_and_receive`` yields the replies one by one in the order asked is read as it yields. Any
    other is asked for what is there again and again, and put in order here: sums of floats depend on it. ``came`` gets,
    before a reply is handed out, the seconds from the call until it was there.
    """
    asked, came = time.time(), [] if came is None else came
    yields = grid.send_and_receive(messages, timeout=timeout) if hasattr(grid, "in_order") else None
    if yields is not None:
        ordered = iter(yields)
        for _ in messages:
            reply = next(ordered, None)
            came.append(_made_after(reply, asked))
            yield reply
        return
    deadline = time.monotonic() + timeout
    names = list(grid.push_messages(messages)) if messages else []
    missing, here, times = {name for name in names if name}, {}, {}
    wait = POLLS[0]
    for name in [*names, *[""] * (len(messages) - len(names))]:
        while name in missing:
            news = {reply.metadata.reply_to_message_id: reply for reply in grid.pull_messages(missing)}
            here.update(news)
            times.update(dict.fromkeys(news, time.time() - asked))
            missing -= news.keys()
            if name in missing:
                if time.monotonic() >= deadline:
                    break
                wait = POLLS[0] if news else min(wait * 1.5, POLLS[1])
                time.sleep(min(wait, max(0.0, deadline - time.monotonic())))
        came.append(times.get(name, time.time() - asked))
        yield here.pop(name, None)


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

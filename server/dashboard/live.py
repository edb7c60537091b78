"""Tells open pages what changed in the store, by server-sent events: looks once a second while somebody listens."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from sqlalchemy import Engine, func, select
from sqlalchemy.exc import SQLAlchemyError

from server.dashboard.federation import FederationView
from server.database import schema as t

EVERY = 1.0  # seconds
RECENT = 100  # runs that are looked at: those that changed last
LISTENERS = 32
BEAT = 15.0  # seconds between signs of life, so that no proxy hangs up

State = dict[int, tuple[Any, ...]]


class Watcher:
    """Looks at the store for all open pages together."""

    def __init__(self, db: Engine, federation: FederationView | None = None) -> None:
        self.db, self.federation = db, federation
        self.stopping: Callable[[], bool] = lambda: False  # asked by streams: they end with the server
        self._queues: set[asyncio.Queue[str]] = set()
        self._seen: tuple[State, int] | None = None
        self._nodes: Any = None

    @property
    def full(self) -> bool:
        """Whether there are as many listeners as are served."""
        return len(self._queues) >= LISTENERS

    async def run(self) -> None:
        """Look for ever; a store that cannot be read for a while is tried again."""
        while True:
            if self._queues:
                with contextlib.suppress(SQLAlchemyError):
                    await self._look()
            else:
                self._seen = None  # whoever comes next has just read everything
            await asyncio.sleep(EVERY)

    async def _look(self) -> None:
        now = await asyncio.to_thread(self._state)
        if self._seen is not None and now != self._seen:
            before, _ = self._seen
            changed = [id for id, state in now[0].items() if before.get(id) != state]
            self._send("change", {"runs": changed, "total": now[1]})
        self._seen = now
        if self.federation is not None:
            nodes = await asyncio.to_thread(self.federation.look)
            if self._nodes is not None and nodes != self._nodes:
                self._send("federation", {})
            self._nodes = nodes

    def _state(self) -> tuple[State, int]:
        asked = select(t.run.c.id, t.run.c.parent, t.run.c.journal, t.run.c.status, t.run.c.path)
        with self.db.connect() as connection:
            rows = connection.execute(asked.order_by(t.run.c.updated.desc()).limit(RECENT)).all()
            total = connection.scalar(select(func.count()).select_from(t.run))
        state: State = {row.id: tuple(row) for row in rows}
        for row in rows:  # a baseline's news are its run's, too
            if row.parent in state:
                state[row.parent] += (row.journal,)
        return state, int(total or 0)

    def _send(self, event: str, content: dict[str, Any]) -> None:
        for queue in self._queues:
            if not queue.full():  # a page that does not read has enough to do already
                queue.put_nowait(f"event: {event}\ndata: {json.dumps(content)}\n\n")

    async def stream(self) -> AsyncIterator[str]:
        """What one page hears: ``hello`` at first, then ``change`` {runs, total} and ``federation``."""
        queue: asyncio.Queue[str] = asyncio.Queue(maxsize=16)
        self._queues.add(queue)
        try:
            yield "retry: 2000\nevent: hello\ndata: {}\n\n"
            spoken = time.monotonic()
            while not self.stopping():
                try:
                    text = await asyncio.wait_for(queue.get(), 0.5)
                except TimeoutError:
                    if time.monotonic() - spoken < BEAT:
                        continue
                    text = ": still here\n\n"
                spoken = time.monotonic()
                yield text
        finally:
            self._queues.discard(queue)

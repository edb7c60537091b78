"""A Flower ``Grid`` without a network: unmodified ServerApps and ClientApps, the clients in persistent workers.

The workers are processes of this machine, or actors of a Ray cluster; there is no server process, no polling. Replies
are handed out in the order of the messages, each as soon as it and all before it are there; only a few messages more
than there are workers are in flight. So sums do not depend on who was faster, and memory does not grow with the number
of sites.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, TimeoutError, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from shared.config import Job, Scalar
from simulations.pool import WorkerPool
from simulations.waiting import Reply, WorkerDied

if TYPE_CHECKING:  # Ray takes a second to import, and few need it
    from simulations.ray_pool import RayPool

RUN_ID = 1
_serial = itertools.count(1)  # message ids, unique in this process


class LocalGrid(Grid):
    """The nodes of one federation, played by a worker pool that several federations may share.

    ``nodes`` holds each node's config, as ``--node-config`` would on a real one; the node ids are 2, 3, 4 … in their
    order. ``priority`` orders federations that share the pool: lower goes first.
    """

    in_order = True  # ``send_and_receive`` yields the replies one by one, in the order of the messages

    def __init__(
        self,
        pool: WorkerPool | RayPool,
        nodes: Sequence[Mapping[str, Scalar]],
        run_config: Mapping[str, Scalar],
        priority: int = 0,
    ) -> None:
        self._pool, self._priority = pool, priority
        self._run = Run.create_empty(run_id=RUN_ID)
        self.run_config = dict(run_config)
        self._contexts = {
            number: Context(
                run_id=RUN_ID, node_id=number, node_config=dict(node), state=RecordDict(), run_config=dict(run_config)
            )
            for number, node in enumerate(nodes, start=SUPERLINK_NODE_ID + 1)
        }
        self._pending: dict[str, tuple[Message, Reply]] = {}
        # Message() reads who is sending from here; every grid of this process is the same sender.
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN_ID, SUPERLINK_NODE_ID, 1

    def set_run(self, run: Run) -> None:
        """Set the run this grid belongs to."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run this grid belongs to."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """All nodes; here they are always online."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Start work on the messages; gives their ids for ``pull_messages``."""
        return [message.metadata.message_id for message, _ in map(self._keep, self._submit_all(messages))]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that are there by now."""
        done = [name for name in message_ids if name in self._pending and self._pending[name][1].done()]
        return [self._reply(*self._pending.pop(name), timeout=None) for name in done]

    def wait_any(self, message_ids: Sequence[str], timeout: float) -> None:
        """Return as soon as ``pull_messages`` would give something, or after ``timeout`` seconds."""
        wait([self._pending[name][1] for name in message_ids if name in self._pending], timeout, FIRST_COMPLETED)

    def forget(self, message_ids: Sequence[str]) -> None:
        """Nobody asks for these replies: those whose work has not begun are not worked on."""
        for name in message_ids:
            if name in self._pending:
                self._pool.abandon(self._pending.pop(name)[1])

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Yield the replies in the order of the messages.

        A node that raises, dies, or has not answered ``timeout`` seconds after a worker took its message gives an error
        reply.
        """
        source = self._submit_all(messages)
        window: deque[tuple[Message, Reply]] = deque(itertools.islice(source, 2 * self._pool.size))
        try:
            while window:
                message, future = window.popleft()
                box = [self._reply(message, future, timeout)]
                del message, future
                window.extend(itertools.islice(source, 1))
                yield box.pop()  # nothing here holds it while the next one is waited for
        finally:  # the caller stopped early: nobody waits for the rest
            for _, future in window:
                self._pool.abandon(future)

    # ------------------------------------------------------------------

    def _keep(self, item: tuple[Message, Reply]) -> tuple[Message, Reply]:
        self._pending[item[0].metadata.message_id] = item
        return item

    def _submit_all(self, messages: Iterable[Message]) -> Iterator[tuple[Message, Reply]]:
        """Submit one message for each ``next``; a content shared by several messages is packed once."""
        content: RecordDict | None = None
        packed: Any = None
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"local-{next(_serial)}"
            if packed is None or content is not message.content:
                content, packed = message.content, self._pool.pack(message.content)
            context = self._contexts[message.metadata.dst_node_id]
            yield message, self._pool.submit(message, context, packed, self._priority)

    def _reply(self, message: Message, future: Reply, timeout: float | None) -> Message:
        try:
            reply, self._contexts[message.metadata.dst_node_id].state = future.within(timeout)
        except TimeoutError:
            self._pool.abandon(future)
            reply = Message(Error(ErrorCode.REPLY_MESSAGE_UNAVAILABLE, "no reply in time"), reply_to=message)
        except WorkerDied:
            reply = Message(Error(ErrorCode.CLIENT_APP_CRASHED, "the worker process died"), reply_to=message)
        reply.metadata.__dict__["_message_id"] = f"local-{next(_serial)}"
        return reply


def grid_of(
    pool: WorkerPool | RayPool,
    nodes: Sequence[Mapping[str, Scalar]],
    job: Job,
    folder: Path,
    priority: int,
    extra: Mapping[str, Scalar] | None = None,
) -> LocalGrid:
    """The nodes of a run of ``job`` into ``folder``; ``extra`` are more of the ``run.`` settings."""
    return LocalGrid(pool, nodes, job.flat() | {"run.out": str(folder.resolve())} | dict(extra or {}), priority)

"""A site's worker, as a process, at Flower's own SuperNode: its state and its service for workers, in this process.

Only the part of the SuperNode that speaks to a server is not there: what it would do with a message, the tests do.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path

import httpx
import psutil
import pytest
import torch
import uvicorn
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import ErrorCode
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.interceptors import SuperExecAuthHttpInterceptor
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.main import create_app
from flwr.supernode.nodestate import NodeStateFactory

from client.bundles import Bundles
from client.worker import _ACQUIRE, PATIENCE, _client
from shared.bundle import release
from shared.config import Job
from shared.errors import SiteRefusal
from shared.supervise import PASSES_ON
from tests.conftest import write_site
from tests.e2e.live import ENV, PRIVACY, free_port, until

MARK = "DOE^JOHN"
NODE = 7
SECRET = b"a secret of thirty-two bytes ..."


def bundle(more: str = "") -> bytes:
    files = dict(release())
    files["client/app.py"] += more.encode()
    content: bytes = build_fab_from_files(files)[0]
    return content


class SuperNode:
    """What Flower's SuperNode keeps and serves; ``port`` on 127.0.0.1."""

    def __init__(self, job: Job, port: int) -> None:
        self.job, self.port = job, port
        factory = NodeStateFactory(ObjectStoreFactory())
        self.state = factory.state()
        self.state.set_node_id(NODE)
        config = uvicorn.Config(create_app(factory, SECRET), host="127.0.0.1", port=port, log_level="error")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self) -> SuperNode:
        self.thread.start()
        until(lambda: self.server.started, 20, "SuperNode's service")
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(20)

    def give(self, run: int, kind: str, fab: bytes, whole: bool = True, more: ArrayRecord | None = None) -> str:
        """A message has come, or has begun to; gives its name."""
        digest, state = sha256(fab).hexdigest(), self.state
        if state.get_run(run) is None:
            known = Run.create_empty(run)
            known.fab_hash, known.series_id = digest, run
            config = self.job.flat() | {"run.id": f"run-{run}"}
            state.set_run_series_context(run, Context(run, NODE, {}, RecordDict(), config, run))
            state.store_run(known)
            state.store_fab(Fab(digest, fab, {}))
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run, 1, 1  # the server app's
        content = RecordDict({"config": ConfigRecord({"round": 0, "fresh": True})} | ({"more": more} if more else {}))
        message = Message(content, NODE, kind, group_id="0")
        name, tree = message.object_id, get_object_tree(message)
        parts = {part: thing.deflate() for part, thing in get_all_nested_objects(message).items()}
        message.metadata.__dict__["_message_id"] = name
        assert state.create_task(TaskType.CLIENT_APP, run, digest) is not None
        state.object_store.preregister(run, tree)
        state.store_message(remove_content_from_message(message))
        self.parts = parts
        if whole:
            self.finish()
        return name

    def finish(self) -> None:
        """The rest of the last message comes."""
        for part, content in self.parts.items():
            self.state.object_store.put(part, content)

    def answer(self, run: int, seconds: float = 60) -> tuple[Message, bytes]:
        """The reply in that run, and all bytes of it that would leave."""
        found: list[Message] = []
        until(
            lambda: found.extend(self.state.get_messages_legacy(run_ids=[run], is_reply=True)) or found,
            seconds,
            "reply",
        )
        (reply,) = found
        store, name = self.state.object_store, reply.metadata.message_id
        names = [part.object_id for part in iterate_object_tree(store.get_object_tree(name))]
        until(lambda: all(store.get(part) for part in names), 20, "the whole reply")
        contents = {part: store.get(part) or b"" for part in names}
        whole = inflate_object_from_contents(name, dict(contents))
        assert isinstance(whole, Message)
        return whole, b"".join(contents.values())


@pytest.fixture
def home(tmp_path: Path) -> Path:
    site = write_site(tmp_path / "site", "a")
    site.write_text(site.read_text() + PRIVACY)
    return site.parent


@contextmanager
def worker(home: Path, port: int, **env: str) -> Iterator[subprocess.Popen[bytes]]:
    secret = home / "worker.secret"
    secret.write_bytes(SECRET)
    command = [sys.executable, "-m", "client.worker", f"127.0.0.1:{port}", str(home / "site.toml"), str(secret)]
    with (home / "worker.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=ENV | env)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(20)


def approved(home: Path, more: str) -> bytes:
    """A program with ``more`` at its end that the site's data manager has approved."""
    content, bundles = bundle(more), Bundles(home)
    with suppress(SiteRefusal):
        bundles.admit(content)
    bundles.approve(sha256(content).hexdigest())
    return content


def test_whatever_comes_is_answered_by_the_same_process(home: Path, tiny_job: Job) -> None:
    port = free_port()
    with worker(home, port) as process:
        with SuperNode(tiny_job, port) as node:  # it is started first, and waits
            node.give(1, "query", bundle())
            reply, _ = node.answer(1, 120)
            assert reply.content["status"]["ok"] is True
            assert reply.content["status"]["site"] == "a"

            asked = node.give(2, "train.unheard_of", bundle())
            reply, _ = node.answer(2)
            assert reply.metadata.reply_to_message_id == asked
            assert reply.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
            assert reply.error.reason == "internal-error"

            node.give(3, "query", bundle("\nraise RuntimeError('not approved')\n"))
            reply, _ = node.answer(3)
            assert reply.content["status"]["code"] == "bundle-refused"
        with SuperNode(tiny_job, port) as node:  # and is there again after a while
            node.give(4, "query", bundle())
            reply, _ = node.answer(4)
            assert reply.content["status"]["ok"] is True
        assert process.poll() is None
    assert "Traceback" not in (home / "worker.log").read_text()


@pytest.mark.parametrize(
    "end",
    [
        f"\nraise RuntimeError({MARK!r})\n",
        f"\nimport os, sys\nprint({MARK!r}, file=sys.stderr, flush=True)\nos._exit(0)\n",
    ],
    ids=["raises", "ends"],
)
def test_of_an_approved_program_that_fails_only_a_code_leaves(home: Path, tiny_job: Job, end: str) -> None:
    port = free_port()
    with SuperNode(tiny_job, port) as node, worker(home, port) as process:
        node.give(1, "query", approved(home, end))
        reply, content = node.answer(1, 120)
        assert (reply.error.code, reply.error.reason) == (ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "internal-error")
        assert MARK.encode() not in content
        assert process.poll() is None
        node.give(2, "query", bundle())  # the next one is none the worse for it
        assert node.answer(2)[0].content["status"]["ok"] is True
    assert MARK in (home / "worker.log").read_text()  # its own people can read it
    assert "failed" in (home / "site.log").read_text()


def test_what_an_approved_program_prints_is_not_its_reply(home: Path, tiny_job: Job) -> None:
    port = free_port()
    with SuperNode(tiny_job, port) as node, worker(home, port):
        node.give(1, "query", approved(home, f"\nprint({MARK!r} * 20000, flush=True)\n"))
        reply, content = node.answer(1, 120)
        assert reply.content["status"]["ok"] is True
        assert MARK.encode() not in content
    assert MARK in (home / "worker.log").read_text()


def test_a_message_that_never_arrives_whole_makes_way_for_the_next(home: Path, tiny_job: Job) -> None:
    port = free_port()
    with SuperNode(tiny_job, port) as node, worker(home, port) as process:
        name = node.give(1, "query", bundle(), whole=False)
        until(lambda: name in node.state.time_store, 120, "worker that asks for the message")
        node.give(2, "query", bundle())
        reply, _ = node.answer(2, 60 + 4 * PATIENCE)
        assert reply.content["status"]["ok"] is True
        assert not node.state.get_messages_legacy(run_ids=[1], is_reply=True)
        assert process.poll() is None


def taken(node: SuperNode, run: int) -> bool:
    """Whether the worker has the task of that run."""
    return any(task.run_id == run and task.status.status == "running" for task in node.state.get_tasks())


@pytest.mark.slow
def test_large_messages_over_a_slow_line_leave_nothing_in_memory(home: Path, tiny_job: Job) -> None:
    port, sizes = free_port(), []
    # What the program keeps is to be seen, not what the C library keeps for later: so it gives back at once.
    with SuperNode(tiny_job, port) as node, worker(home, port, **PASSES_ON) as process:
        for _ in range(6):
            arrays = {f"{part}": torch.rand(2_000_000) for part in range(8)}  # 64 MB
            name = node.give(1, "query", bundle(), whole=False, more=ArrayRecord(arrays))
            late = list(node.parts.items())[-2:]
            for part, content in list(node.parts.items())[:-2]:
                node.state.object_store.put(part, content)
            until(lambda name=name: name in node.state.time_store, 120, "worker that asks for the message")
            waited = time.monotonic() + PATIENCE + 1  # it has given up once, and asked again
            until(lambda waited=waited: time.monotonic() > waited, 2 * PATIENCE, "time for the message to come in")
            for part, content in late:
                node.state.object_store.put(part, content)
            node.answer(1, 60)
            until(lambda: idle(process.pid), 20, "worker at rest")
            sizes.append(psutil.Process(process.pid).memory_info().rss / 1e6)
    assert max(sizes) - sizes[0] < 128, sizes  # without the collection: several messages more


def idle(pid: int) -> bool:
    """Whether a process does nothing for a while."""
    process = psutil.Process(pid)
    process.cpu_percent()
    return process.cpu_percent(0.5) < 10


def test_a_program_of_this_machine_without_the_secret_gets_no_message(home: Path, tiny_job: Job) -> None:
    port = free_port()
    with SuperNode(tiny_job, port) as node:
        node.give(1, "query", bundle())
        stranger = _client(
            f"127.0.0.1:{port}",
            SuperExecAuthHttpInterceptor(master_secret=SECRET[::-1], protected_methods=frozenset({_ACQUIRE})),
        )
        with pytest.raises(httpx.HTTPStatusError) as refused:
            stranger.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
        stranger.close()
        assert refused.value.response.status_code == 401
        assert not taken(node, 1)
        with worker(home, port):
            node.answer(1, 120)

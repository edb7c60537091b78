"""The site's worker: takes the messages that Flower's SuperNode has received, and runs vetted code on them.

It stands where Flower would start a process for every message, install the code that the server sent and run it. Here
the process stays (no start of Python, no reading of images anew), and what runs is the release installed at the site,
once the server's bundle proved to be the same program. Another program runs only if the site's data manager approved
it, in a process of its own, from the folder where the approval unpacked it.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode, SubStatus
from flwr.common.serde import context_from_proto
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullAppMessagesRequest, PullTaskInputRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, pull_and_inflate_object_from_tree
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.runtime.run_clientapp import push_message, push_task_output

from client.app import app, decline
from client.bundles import Bundles
from client.sitelog import write_log
from shared.bundle import release
from shared.errors import SiteRefusal

POLL = 0.2  # seconds between questions for work, on this machine only
PATIENCE = 5.0  # seconds for which a message's parts are waited for before asking whether another came
_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"


def serve(address: str, site_file: Path, secret: bytes) -> None:
    """Take tasks from the SuperNode at ``address`` one after another, for ever.

    A SuperNode that is not there yet, or is being started again, is waited for.
    """
    release()  # the installed files as they are now, when this process imports them
    gc.freeze()  # what is imported stays, and need not be looked at again after every message
    client = _client(
        address, SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=frozenset({_ACQUIRE}))
    )

    def next_task() -> str:
        """The token of a task that waits; "" if none does."""
        found = client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
        return found.token if found.HasField("task") else ""

    token = ""
    try:
        while True:
            try:
                token = token or next_task()
                if token:
                    token, given = "", token
                    try:
                        work(address, given, site_file, next_task)
                    finally:
                        gc.collect()  # a message waited for in vain for a while stays, in cycles, as exceptions do
                else:
                    time.sleep(POLL)
            except Superseded as later:
                token = later.token
            except httpx.HTTPError:  # the SuperNode is away: it will ask again, or nobody
                time.sleep(5 * POLL)
    finally:
        client.close()


def _client(address: str, interceptor: ProtobufClientInterceptor) -> RuntimeHttpClient:
    return RuntimeHttpClient.from_server_address(
        server_address=address,
        insecure=True,  # both ends are this machine's loopback
        root_certificates=None,
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"), interceptor],
    )


def work(address: str, token: str, site_file: Path, next_task: Callable[[], str]) -> None:
    """Answer the one message that ``token`` stands for.

    Whatever goes wrong, a reply leaves, and no text in it but fixed codes.

    Raises:
        Superseded: its message will never be there whole.
        httpx.HTTPError: the SuperNode went away, or the run ended meanwhile.
    """
    client = _client(address, RuntimeTokenHttpInterceptor(token))
    heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(client))  # slow is not dead while this beats
    status, context = SubStatus.FAILED, None
    heartbeat.start()
    try:
        given = client.PullTaskInput(PullTaskInputRequest())
        context = context_from_proto(given.context)
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = given.task_id, context.run_id, context.node_id
        # What the site is, only the site says: nothing that came over the network names a file here.
        context.node_config = {"site": str(site_file), "home": str(site_file.parent)}
        message = _received(client, context, next_task)
        push_message(client, answer(message, context, given.fab.content, site_file), context)
        status = SubStatus.COMPLETED
    finally:
        push_task_output(client, context, status, "")
        heartbeat.stop()
        client.close()


class Superseded(Exception):
    """Another task came before this one's message was there whole; ``token`` is the other's."""

    def __init__(self, token: str) -> None:
        super().__init__(token)
        self.token = token


def _received(client: RuntimeHttpClient, context: Context, next_task: Callable[[], str]) -> Message:
    """The task's message. The SuperNode hands a task out while the message is still coming in.

    It takes messages in one after another. So when it has another task, the end of this one's message is lost: its
    run was stopped, or its server died, while it came in.

    Raises:
        Superseded: that is so.
    """
    (tree,) = client.PullMessages(PullAppMessagesRequest()).message_object_trees
    node, run = Node(node_id=context.node_id), context.run_id
    fetch, parts = make_pull_object_fn_protobuf(client.PullObject, node, run), {}

    def part(name: str) -> bytes:
        if name not in parts:
            parts[name] = fetch(name)
        content: bytes = parts[name]
        return content

    confirm = make_confirm_message_received_fn_protobuf(client.ConfirmMessageReceived, node, run)
    while True:
        try:
            message = pull_and_inflate_object_from_tree(
                tree, part, confirm, return_type=Message, max_time=PATIENCE, initial_backoff=0.1, backoff_cap=1.0
            )
        except ObjectPullError:
            if token := next_task():
                raise Superseded(token) from None
        else:
            message.metadata.__dict__["_message_id"] = tree.object_id  # what travels does not hold its own name
            return message


def answer(message: Message, context: Context, bundle: bytes, site_file: Path) -> Message:
    """The reply to a message that came with the program ``bundle``."""
    try:
        folder = Bundles(site_file.parent).admit(bundle)
    except SiteRefusal as refusal:
        return decline(message, context, refusal)
    except Exception as problem:  # a disk that is full, a damaged list of what was approved
        return decline(message, context, SiteRefusal("bundle-refused", f"cannot be looked at: {problem!r}"))
    try:
        return app(message, context) if folder is None else _apart(folder, message, context)
    except Exception as problem:  # ``app`` answers its own failures: what comes here is a kind of message it has not
        with contextlib.suppress(Exception):
            write_log(site_file.parent, f"failed: {problem!r}")
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "internal-error"), reply_to=message)


def _apart(folder: Path, message: Message, context: Context) -> Message:
    """The answer of the approved program in ``folder``, by a process of its own."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", _CHILD, str(folder)],
        input=pickle.dumps((message, context, message.metadata.message_id)),
        stdout=subprocess.PIPE,
        env=env,
        cwd=folder,
        check=True,
    )
    reply, state = pickle.loads(done.stdout)
    context.state = state if isinstance(state, RecordDict) else context.state
    return reply  # type: ignore[no-any-return]


# Its own output must not be taken for the reply, so that goes to a copy of the descriptor.
_CHILD = """
import os, pickle, sys
out = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)
sys.path.insert(0, sys.argv[1])
message, context, name = pickle.load(sys.stdin.buffer)
from flwr.supercore.task_identity import TaskIdentity
TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = context.run_id, context.node_id, 1
from client.app import app
pickle.dump((app(message, context), context.state), out)
"""


def main() -> None:
    """``python -m client.worker ADDRESS SITE.toml SECRET_FILE``; SIGTERM ends it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    address, site_file, secret = sys.argv[1:]
    with contextlib.suppress(KeyboardInterrupt):
        serve(address, Path(site_file), Path(secret).read_bytes())


if __name__ == "__main__":
    main()

"""What the coordinator asks of Flower's SuperLink: which sites there are, start a run, how is it, stop it.

Flower's control routes know no password: they are reached on this machine only, never through the gateway.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import httpx
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto, run_from_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import ApiErrorCode
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from server.expiry import expiry
from server.federation import Folder
from server.started import is_started, is_starting
from shared.bundle import release
from shared.config import Scalar
from shared.errors import UserError

RUNS = 200  # that are asked for at once, the newest


class Node(NamedTuple):
    """A site as Flower knows it."""

    id: int
    name: str
    key: bytes  # public key in PEM, as Flower keeps it
    online: bool
    since: str  # ISO 8601; when it last connected, or last was connected; "" if never


class Status(NamedTuple):
    """How a run is."""

    state: str  # pending, starting, running, finished
    outcome: str  # of a finished run: completed, failed, stopped
    details: str

    @property
    def over(self) -> bool:
        """Whether nothing of the run will change any more."""
        return self.state == "finished"


class UnknownRun(UserError):
    """The server knows no run of that number: it lost what it knew, or another one made the run."""


class EndedRun(UserError):
    """The run has ended already: there is nothing to stop."""


class Control:
    """The control routes of the federation in ``folder``; use it as a context manager."""

    def __init__(self, folder: Folder) -> None:
        federation = folder.read()
        self.folder = folder
        self._client = ControlHttpClient.from_server_address(
            server_address=f"127.0.0.1:{federation.internal_port}",
            insecure=False,
            root_certificates=folder.ca_cert.read_bytes(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr-cli")],
        )

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    @contextlib.contextmanager
    def _asked(self) -> Iterator[None]:
        try:
            yield
        except httpx.TransportError:
            line, valid = expiry(self.folder)
            if not valid:
                raise UserError(f"the server's {line}") from None
            if is_starting(self.folder):
                raise UserError(f"the server of {self.folder.path} is starting: try again in a moment") from None
            if is_started(self.folder):
                logs = f"see the logs in {self.folder.state}"
                raise UserError(f"the server of {self.folder.path} is started but does not answer; {logs}") from None
            raise UserError(
                f"the server of {self.folder.path} does not answer; start it: consilium server start {self.folder.path}"
            ) from None
        except httpx.HTTPStatusError as error:
            code, said = _refusal(error.response)
            if code == ApiErrorCode.RUN_ID_NOT_FOUND:
                raise UnknownRun("the server knows no run of that number") from None
            if code == ApiErrorCode.RUN_ALREADY_FINISHED:
                raise EndedRun("the run has ended already") from None
            raise UserError(f"the server refused: {said or error}") from None

    def answers(self) -> bool:
        """Whether SuperLink is there."""
        try:
            self._client.ListNodes(ListNodesRequest())
        except httpx.HTTPError:
            return False
        return True

    def nodes(self) -> list[Node]:
        """All registered sites by name."""
        with self._asked():
            found = self._client.ListNodes(ListNodesRequest()).nodes_info
        there = [
            Node(
                node.node_id,
                node.name,
                node.public_key,
                node.status == "online",
                node.last_activated_at if node.status == "online" else node.last_deactivated_at,
            )
            for node in found
            if node.status != "unregistered"
        ]
        return sorted(there, key=lambda node: node.name)

    def register(self, name: str, public_key: bytes) -> None:
        """Let the site of that key connect from now on."""
        with self._asked():
            self._client.RegisterNode(RegisterNodeRequest(public_key=public_key, name=name))

    def unregister(self, node: int) -> None:
        """Never let a site connect again with the key it has."""
        with self._asked():
            self._client.UnregisterNode(UnregisterNodeRequest(node_id=node))

    def start(self, config: Mapping[str, Scalar]) -> int:
        """Submit a run of the installed release with that run config; gives its number."""
        content, _ = build_fab_from_files(dict(release()))
        fab = Fab(hashlib.sha256(content).hexdigest(), content, {})
        request = StartRunRequest(fab=fab_to_proto(fab), override_config=user_config_to_proto(dict(config)))
        with self._asked():
            return int(self._client.StartRun(request).run_id)

    def status(self, run: int) -> Status:
        """How the run of that number is."""
        with self._asked():
            found = self._client.ListRuns(ListRunsRequest(run_id=run)).run_dict
        if run not in found:
            raise UnknownRun(f"the server knows no run {run}")
        status = run_from_proto(found[run]).status
        return Status(status.status, status.sub_status, status.details)

    def statuses(self) -> dict[int, Status]:
        """How the runs are by their numbers; of very many the newest."""
        with self._asked():
            found = self._client.ListRuns(ListRunsRequest(limit=RUNS)).run_dict
        runs = {number: run_from_proto(one).status for number, one in found.items()}
        return {number: Status(one.status, one.sub_status, one.details) for number, one in runs.items()}

    def stop(self, run: int) -> bool:
        """End a run; False where it has ended already, or could not be ended."""
        try:
            with self._asked():
                return bool(self._client.StopRun(StopRunRequest(run_id=run)).success)
        except EndedRun:
            return False


def _refusal(answer: httpx.Response) -> tuple[int, str]:
    """Flower's number of what was wrong, 0 if it gives none, and its words in one line."""
    try:
        found = json.loads(answer.text)
        return int(found.get("code", 0)), " ".join(str(found["detail"]).split())[:300].rstrip(".")
    except (ValueError, AttributeError, KeyError, TypeError):
        return 0, " ".join(answer.text.split())[:300]


def submitted(run: Path) -> int | None:
    """The server's number of the run in a run folder; None where none is written there."""
    try:
        return int(json.loads((run / "submitted.json").read_text(encoding="utf-8"))["number"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep_keys(control: Control, folder: Folder) -> Iterator[str]:
    """Make SuperLink's registered sites those of DIR/sites; gives a line for each change, and for a key that is none.

    First those that are no longer accepted go, so that nothing that is wrong with another keeps them in. A site whose
    file cannot be read stays as it is: SuperLink would never take its key again.
    """
    wanted: dict[bytes, str] = {}
    unread: set[str] = set()
    for name in folder.site_names():
        try:
            wanted[_key(folder.node_pub(name))] = name
        except UserError as error:
            unread.add(name)
            yield f"keys: {error}"
    there = {node.key: node for node in control.nodes()}
    for key, node in there.items():
        if node.name not in unread and (key not in wanted or wanted[key] != node.name):
            control.unregister(node.id)
            yield f"{node.name}: its key is no longer accepted"
    for key, name in wanted.items():
        if key not in there or there[key].name != name:
            control.register(name, key)
            yield f"{name}: its key is accepted"


def _key(path: Path) -> bytes:
    """The public key as Flower's own command would read it: re-encoded, without a comment."""
    try:
        key = load_ssh_public_key(path.read_bytes())
    except ValueError:
        raise UserError(f"{path}: is no public key in OpenSSH's format; provision the federation again") from None
    if not isinstance(key, EllipticCurvePublicKey):
        raise UserError(f"{path}: must be a key on a NIST curve, as `consilium site keygen` makes them")
    return public_key_to_bytes(key)

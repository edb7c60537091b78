"""`consilium server status`: do the server's processes answer, who is connected, how long do certificates hold?"""

from __future__ import annotations

from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from server.control import Control
from server.expiry import expiry
from server.federation import Folder
from server.running import EXECUTOR, SUPERLINK
from server.started import is_started, is_starting, state
from shared.errors import UserError


def status(path: Path) -> tuple[list[str], bool]:
    """The lines to show, and whether all is well.

    Raises:
        UserError: no federation was set up in ``path``.
    """
    folder = Folder(path.resolve())
    federation = folder.read()
    line, well = expiry(folder)
    lines = [line]
    found = state(folder)
    if not is_started(folder) or "health" not in found:
        return [f"{federation.name}: not started; consilium server start {path}", *lines], False
    ports, starting = found["health"], is_starting(folder)
    lines.insert(0, f"{federation.name}: hospitals reach it at {federation.address}")
    for name in (SUPERLINK, EXECUTOR):
        serving = _serving(ports[name])
        well &= serving
        away = "is starting" if starting else f"does not answer; see its log in {folder.state}"
        lines.append(f"{name}: {'serving' if serving else away}")
    try:
        with Control(folder) as control:
            nodes = control.nodes()
    except UserError as error:
        return [*lines, str(error)], False
    lines.append(f"sites: {sum(node.online for node in nodes)} of {len(nodes)} connected")
    for node in nodes:
        since = f" since {node.since[:16].replace('T', ' ')} UTC" if node.since else ""
        lines.append(f"  {node.name}: {'connected' if node.online else 'not connected'}{since or ', never yet'}")
    return lines, well


def _serving(port: int) -> bool:
    """What the gRPC health service of one of Flower's programs says (grpc.health.v1)."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=3)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

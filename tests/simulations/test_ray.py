"""The engine on a Ray cluster of two nodes on this machine: same result as local, one node lost in a round."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from server.rounds import Run
from server.store import read_events
from shared.config import Job
from shared.errors import UserError
from simulations.engine import LocalGrid
from simulations.pool import WorkerPool
from simulations.simulate import run
from simulations.sites import node_of
from tests.conftest import write_site

NODE = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 100 * 2**20}

# The site's own app, which says on which node it trains and takes its time on the one to be lost.
_APP = """
import time
from pathlib import Path
import ray
from client.app import app as whole

MARKS = Path({marks!r})

def app(message, context):
    if message.metadata.message_type == "train":
        node, name = ray.get_runtime_context().get_node_id(), context.node_config.get("name")
        (MARKS / f"{{node}}-{{name}}-{{message.content['config']['round']}}").touch()
        if (MARKS / "lost").exists() and (MARKS / "lost").read_text() == node:
            time.sleep(600)
    return whole(message, context)
"""


class Nodes(NamedTuple):
    """A cluster's address, its second node, and the folder where actors leave marks of where they train."""

    cluster: Any
    second: Any
    marks: Path


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    """A cluster of one node; actors find ``slow_app``."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    root = tmp_path_factory.mktemp("ray")
    (root / "marks").mkdir()
    (root / "slow_app.py").write_text(_APP.format(marks=str(root / "marks")))
    made = Cluster()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(root))
        patch.syspath_prepend(str(root))
        try:
            # Ray gives a node half a minute to start, and no setting changes that; on a busy machine it takes longer.
            slow = SimpleNamespace(time=time.time, sleep=time.sleep, monotonic=lambda: time.monotonic() / 10)
            patch.setattr("ray._private.node.time", slow)
            made.add_node(**NODE)
            yield made, root / "marks"
        finally:
            ray.shutdown()
            made.shutdown()
            sys.modules.pop("slow_app", None)


@pytest.fixture
def nodes(head: tuple[Any, Path]) -> Nodes:
    """A second node joins, to be lost."""
    second = head[0].add_node(**NODE)
    (head[1] / "lost").write_text(second.node_id)
    return Nodes(head[0], second, head[1])


def lose_when_at_work(nodes: Nodes) -> threading.Thread:
    """Take the second node away, without a word, as soon as a site trains there."""

    def wait() -> None:
        while not trained_at(nodes):
            time.sleep(0.05)
        nodes.cluster.remove_node(nodes.second, allow_graceful=False)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def trained_at(nodes: Nodes) -> list[Path]:
    """Marks of the second node."""
    return list(nodes.marks.glob(f"{nodes.second.node_id}-*"))


@pytest.mark.slow
def test_a_node_lost_in_a_round_changes_nothing_where_the_round_may_be_done_again(
    nodes: Nodes, tiny_job: Job, tmp_path: Path
) -> None:
    from simulations.ray_pool import RayPool

    job = tiny_job.replace(federation__rounds=2)
    files = [write_site(tmp_path / "sites" / name, name) for name in ("a", "b", "c", "d")]

    def play(pool: Any, out: Path) -> bytes:
        Run(LocalGrid(pool, [node_of(out / "sites", file) for file in files], job.flat()), job, out).run()
        return (out / "last.safetensors").read_bytes()

    with WorkerPool("client.app:app", 1) as pool:
        local = play(pool, tmp_path / "local")
    losing = lose_when_at_work(nodes)
    with RayPool("slow_app:app", 2, nodes.cluster.address) as pool:
        far = play(pool, tmp_path / "far")
    losing.join(60)
    assert trained_at(nodes)  # the lost node was at work
    assert far == local
    rounds = [event for event in read_events(tmp_path / "far") if event["event"] == "round"]
    assert [len(event["trained"]) for event in rounds] == [4, 4]
    assert not any(event["dropped"] for event in rounds)


@pytest.mark.slow
def test_a_node_lost_in_a_round_gives_error_replies_where_it_may_not(
    nodes: Nodes, tiny_job: Job, tmp_path: Path
) -> None:
    from simulations.ray_pool import RayPool

    files = [write_site(tmp_path / "sites" / name, name) for name in ("a", "b", "c", "d")]
    losing = lose_when_at_work(nodes)
    with RayPool("slow_app:app", 2, nodes.cluster.address, retries=0) as pool:
        job, out = tiny_job.replace(federation__rounds=2), tmp_path / "far"
        Run(LocalGrid(pool, [node_of(out / "sites", file) for file in files], job.flat()), job, out).run()
    losing.join(60)
    first, then = [event for event in read_events(out) if event["event"] == "round"]
    assert [item["reason"] for item in first["dropped"]] == ["site-crashed"]
    assert len(first["trained"]) == 3
    assert len(then["trained"]) == 4


def test_ray_that_is_not_there_is_said_in_a_line(three_sites: Path, tiny_job: Job, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--address belongs to ray"):
        run(tiny_job, three_sites, tmp_path / "out", address="auto")
    with pytest.raises(UserError, match="Ray places its actors itself"):
        run(tiny_job, three_sites, tmp_path / "out", engine="ray", devices="cpu")

"""The engine on a Ray cluster of two nodes on this machine: same result as local, one node lost in a round."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from server.rounds import Run
from server.store import read_events
from shared.config import Job
from shared.errors import UserError
from simulations.engine import LocalGrid
from simulations.pool import WorkerPool
from simulations.simulate import node_of, run
from tests.conftest import write_site

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


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two nodes with a core each; actors find ``slow_app``."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    marks = tmp_path / "marks"
    marks.mkdir()
    (tmp_path / "apps").mkdir()
    (tmp_path / "apps" / "slow_app.py").write_text(_APP.format(marks=str(marks)))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "apps"))
    monkeypatch.syspath_prepend(str(tmp_path / "apps"))
    node = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 100 * 2**20}
    made = Cluster()
    try:
        patiently(lambda: made.add_node(**node))
        made.second = patiently(lambda: made.add_node(**node))
        yield made
    finally:
        ray.shutdown()
        made.shutdown()
        sys.modules.pop("slow_app", None)


def patiently(start: Callable[[], Any]) -> Any:
    """Ray gives a node half a minute to start, which beside other tests may not be enough."""
    for left in (2, 1, 0):
        try:
            return start()
        except Exception:
            if not left:
                raise
    return None


def lose_when(cluster: Any, marks: Path, there: Callable[[], bool]) -> threading.Thread:
    """Take the second node away, without a word, as soon as ``there``."""

    def wait() -> None:
        while not there():
            time.sleep(0.05)
        cluster.remove_node(cluster.second, allow_graceful=False)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@pytest.mark.slow
def test_a_node_lost_in_a_round_changes_nothing_where_the_round_may_be_done_again(
    cluster: Any, tiny_job: Job, tmp_path: Path
) -> None:
    from simulations.ray_pool import RayPool

    job = tiny_job.replace(federation__rounds=2)
    files = [write_site(tmp_path / "sites" / name, name) for name in ("a", "b", "c", "d")]

    def play(pool: Any, out: Path) -> bytes:
        Run(LocalGrid(pool, [node_of(out / "sites", file) for file in files], job.flat()), job, out).run()
        return (out / "last.safetensors").read_bytes()

    with WorkerPool("client.app:app", 1) as pool:
        local = play(pool, tmp_path / "local")
    marks, second = tmp_path / "marks", cluster.second.node_id
    (marks / "lost").write_text(second)
    losing = lose_when(cluster, marks, lambda: any(marks.glob(f"{second}-*")))
    with RayPool("slow_app:app", 2, cluster.address) as pool:
        far = play(pool, tmp_path / "far")
    losing.join(60)
    assert any(marks.glob(f"{second}-*"))  # the lost node was at work
    assert far == local
    rounds = [event for event in read_events(tmp_path / "far") if event["event"] == "round"]
    assert [len(event["trained"]) for event in rounds] == [4, 4]
    assert not any(event["dropped"] for event in rounds)


@pytest.mark.slow
def test_a_node_lost_in_a_round_gives_error_replies_where_it_may_not(
    cluster: Any, tiny_job: Job, tmp_path: Path
) -> None:
    from simulations.ray_pool import RayPool

    files = [write_site(tmp_path / "sites" / name, name) for name in ("a", "b", "c", "d")]
    marks, second = tmp_path / "marks", cluster.second.node_id
    (marks / "lost").write_text(second)
    losing = lose_when(cluster, marks, lambda: any(marks.glob(f"{second}-*")))
    with RayPool("slow_app:app", 2, cluster.address, retries=0) as pool:
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

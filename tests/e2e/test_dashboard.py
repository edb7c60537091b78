"""The dashboard at a real federation on loopback: who is connected, a run that goes on, and stopping it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from server.dashboard.app import create_app
from server.dashboard.guard import Access
from shared.config import Job
from tests.conftest import write_site
from tests.e2e.live import Live, until

NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NGINX is None, reason="the gateway needs nginx, which is not installed here"),
]
TOKEN = "a-token-of-the-tests-0123456789"


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    for name in "ab":
        write_site(tmp_path / "hospitals" / name, name)
    federation = Live(tmp_path / "dir", {name: tmp_path / "hospitals" / name for name in "ab"})
    federation.provision()
    try:
        federation.start_server()
        federation.start_site("a")
        yield federation
    finally:
        federation.end_all()


def test_a_run_is_followed_and_stopped(live: Live, tiny_job: Job, tmp_path: Path) -> None:
    job = tmp_path / "tiny.toml"
    job.write_text(tiny_job.toml())
    settings = ("federation.rounds=2000", "federation.min_sites=1", "federation.start_timeout=1")
    name = live.submit(job, *settings)
    until(lambda: live.events(name, "round"), 120, "first round")
    store = live.path / "runs" / "consilium.sqlite"
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with TestClient(
        create_app(store, Access(TOKEN), live.path), base_url="http://127.0.0.1", headers=headers
    ) as client:
        server = client.get("/api/federation").json()["server"]
        assert server["running"] is True
        assert server["sites"]["a"]["online"] is True
        assert server["sites"]["a"]["since"]
        assert server["sites"]["b"]["online"] is False
        row = client.get("/api/runs").json()["runs"][0]
        assert row["path"] == name
        url = f"/api/runs/{row['id']}"
        assert client.get(url).json()["stoppable"] is True
        cross = client.post(f"{url}/stop", headers={"Origin": "https://evil.example"})
        assert cross.status_code == 403
        assert client.post(f"{url}/stop").json() == {"stopped": True}
        until(lambda: client.get(url).json()["run"]["status"] == "stopped", 30, "end of the run")
        assert client.get(url).json()["stoppable"] is False
        assert client.get("/api/runs", params={"status": "stopped"}).json()["runs"][0]["path"] == name
    said = live.follow(name, code=1)
    assert "the run stopped" in said
    assert len(live.events(name, "round")) < 2000
    name = live.submit(job, *settings)
    until(lambda: live.events(name, "round"), 120, "first round")
    live.end("server")
    assert f"run {name} breaks off" in live.said("server")
    assert f"consilium run --federation {live.path} --resume {name}" in live.said("server")
    assert live.said("server").rstrip().endswith("stopped")

"""Runs of a federation whose server knows better than their journals what became of them, or does not answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from server.control import Node, Status
from server.dashboard import federation
from server.dashboard.app import create_app
from server.dashboard.guard import Access
from server.provision import provision
from server.store import Store, write_json
from shared.errors import UserError

from .conftest import SIGNED_IN, TOKEN, make_job


class Server:
    """What the server would say; None: it is down."""

    known: dict[int, Status] | None = None

    def __init__(self, _: object) -> None:
        if Server.known is None:
            raise UserError("the server of f does not answer; start it: consilium server start f")

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def nodes(self) -> list[Node]:
        return []

    def statuses(self) -> dict[int, Status]:
        assert Server.known is not None
        return Server.known

    def stop(self, number: int) -> bool:
        self.statuses()[number] = Status("finished", "stopped", "")
        return True


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    """Two runs that their journals call running, numbers 1 and 2 of the server, and one that is no run of it."""
    (tmp_path / "federation.toml").write_text('name = "f"\n[server]\nhost = "127.0.0.1"\n[sites.a]\n')
    provision(tmp_path / "federation.toml", tmp_path / "f", ())
    job, stores = make_job(), []  # these are held: a run whose program is gone is not going on
    for number, name in enumerate(("going", "ended", "elsewhere"), start=1):
        folder = tmp_path / "f" / "runs" / name
        stores.append(store := Store(folder))
        (folder / "job.toml").write_text(job.toml())
        store.add("start", job=job.sha256, name=name, rounds=4, version="1")
        if name != "elsewhere":
            write_json(folder / "submitted.json", {"number": number})
    monkeypatch.setattr(federation, "Control", Server)
    monkeypatch.setattr(federation, "FRESH", -1.0)  # each question is asked anew
    monkeypatch.setattr(Server, "known", {1: Status("running", "", ""), 2: Status("finished", "stopped", "")})
    app = create_app(tmp_path / "f" / "runs" / "consilium.sqlite", Access(TOKEN), tmp_path / "f")
    with TestClient(app, base_url="http://127.0.0.1:8600", headers=SIGNED_IN) as found:
        yield found


def states(client: TestClient, **asked: str) -> dict[str, str]:
    found: dict[str, Any] = client.get("/api/runs", params=asked).json()
    assert found["total"] == len(found["runs"])
    return {row["name"]: row["status"] for row in found["runs"]}


def test_what_the_server_knows_stands_in_the_table_and_on_the_page(client: TestClient) -> None:
    told = {"going": "running", "ended": "stopped", "elsewhere": "running"}
    assert states(client) == told
    assert states(client, status="stopped") == {"ended": "stopped"}
    assert set(states(client, status="running")) == {"going", "elsewhere"}
    assert list(states(client, sort="status").values()) == ["running", "running", "stopped"]
    for row in client.get("/api/runs").json()["runs"]:
        page = client.get(f"/api/runs/{row['id']}").json()
        assert page["run"]["status"] == told[row["name"]]
        assert page["stoppable"] is (row["name"] == "going")
        assert page["server"] == {"running": True, "reason": "", "heard": None}


def test_a_run_is_stopped_from_here_and_shown_so_at_once(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(federation, "FRESH", 1000.0)
    id = next(row["id"] for row in client.get("/api/runs").json()["runs"] if row["name"] == "going")
    assert client.post(f"/api/runs/{id}/stop", headers={"Origin": "http://127.0.0.1:8600"}).json() == {"stopped": True}
    assert states(client)["going"] == "stopped"


def test_while_the_server_is_away_a_run_is_not_called_running(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    states(client)
    monkeypatch.setattr(Server, "known", None)
    found = client.get("/api/runs").json()
    assert found["server"]["running"] is False
    assert "consilium server start" in found["server"]["reason"]
    assert found["server"]["heard"] > 0, "it answered before"
    assert states(client) == {"going": "unknown", "ended": "unknown", "elsewhere": "running"}
    assert set(states(client, status="unknown")) == {"going", "ended"}
    for row in found["runs"]:
        page = client.get(f"/api/runs/{row['id']}").json()
        assert page["server"] == found["server"]
        assert page["stoppable"] is False
    metrics = client.get("/metrics").text
    assert 'consilium_runs{status="unknown"} 2.0' in metrics

"""What somebody without the token, or a page of another site, gets from the dashboard: nothing."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from server.dashboard.app import create_app
from server.dashboard.guard import Access
from server.dashboard.serve import access_for
from server.provision import provision
from shared.errors import UserError

TOKEN = "a-token-of-the-tests-0123456789"
PATHS = ["/", "/federation", "/runs/1", "/runs/1/model", "/api/runs", "/api/runs/1", "/api/events", "/api/openapi.json"]
PATHS += ["/static/app.js", "/static/plotly.js", "/api/runs/1/model/best/file", "/api/about", "/nowhere"]
ORIGIN = "http://127.0.0.1:8600"


@pytest.mark.parametrize("path", PATHS)
def test_without_the_token_nothing_is_told(client: TestClient, path: str) -> None:
    wrong: list[dict[str, str]] = [{}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}]
    wrong += [{"Cookie": f"consilium-8600={TOKEN}"}, {"Cookie": "consilium-8600="}, {"X-Forwarded-User": "root"}]
    for headers in wrong:
        answer = client.get(path, headers=headers)
        assert answer.status_code == 401
        assert len(answer.content) < 400
        assert TOKEN not in answer.text
    assert client.get(path + "?token=wrong").status_code == 401
    assert client.get(path + f"?token=wrong&token={TOKEN}").status_code == 401
    assert client.post("/api/runs/1/stop", headers={"Origin": ORIGIN}).status_code == 401


def test_the_token_becomes_a_cookie_and_leaves_the_address(client: TestClient) -> None:
    answer = client.get(f"/runs/1?metric=auroc&token={TOKEN}", follow_redirects=False)
    assert answer.status_code == 303
    assert answer.headers["location"] == "/runs/1?metric=auroc"
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert TOKEN not in cookie
    assert client.get("/api/runs").status_code == 200


def test_signing_in_leads_nowhere_else(client: TestClient) -> None:
    for path in (
        "//evil.example",
        "/\\evil.example",
        "///evil.example/x",
        "/%5c%5cevil.example",
        "/%2f%2fevil.example",
    ):
        answer = client.get(f"http://127.0.0.1:8600{path}?token={TOKEN}", follow_redirects=False)
        location = answer.headers.get("location", "/")
        assert location.startswith("/")
        assert not location.startswith(("//", "/\\"))


def test_every_answer_has_the_security_headers(client: TestClient) -> None:
    signed = {"Authorization": f"Bearer {TOKEN}"}
    for path, headers in (("/", {}), ("/", signed), ("/api/runs", signed), ("/static/app.js", signed), ("/x", signed)):
        found = client.get(path, headers=headers).headers
        policy = dict(part.strip().partition(" ")[::2] for part in found["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == "'self'"
        assert policy["frame-ancestors"] == "'none'"
        assert found["x-content-type-options"] == "nosniff"
        assert found["referrer-policy"] == "no-referrer"
        assert "access-control-allow-origin" not in found
    assert client.get("/api/runs", headers=signed).headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    "path",
    [
        "/static/../app.py",
        "/static/..%2fapp.py",
        "/static/%2e%2e/%2e%2e/app.py",
        "/static//etc/passwd",
        "/static/%2fetc%2fpasswd",
        "/static/app.js%00.css",
        "/api/runs/..%2f..%2fetc/model",
        "/api/runs/1/model/..%2fjob.toml/file",
        "/api/runs/1/model/job.toml/file",
        "/runs/../../etc/passwd",
    ],
)
def test_no_path_leads_to_a_file_of_the_machine(signed_in: TestClient, path: str) -> None:
    answer = signed_in.get(f"{ORIGIN}{path}")
    assert answer.status_code in (404, 422)
    assert "root:" not in answer.text
    assert "import" not in answer.text


def test_a_link_out_of_the_run_folder_is_not_followed(store: Path, tmp_path: Path) -> None:
    from server.dashboard.models import file_of

    (tmp_path / "run").mkdir()
    (tmp_path / "secret").write_text("s")
    (tmp_path / "run" / "model.safetensors").symlink_to(tmp_path / "secret")
    assert file_of((tmp_path / "run").resolve(), "model.safetensors") is None
    assert file_of((tmp_path / "run").resolve(), "last.safetensors") is None


def test_what_is_too_large_is_refused(signed_in: TestClient) -> None:
    assert signed_in.get("/api/runs?search=" + "x" * 5000).status_code == 414
    headers = {"Origin": ORIGIN}
    assert signed_in.post("/api/runs/1/stop", content=b"x" * 5000, headers=headers).status_code == 413
    assert signed_in.post("/api/runs/1/stop", content=iter([b"x"]), headers=headers).status_code == 413
    assert signed_in.post("/api/runs/1/stop", headers=headers | {"Content-Length": "-1"}).status_code == 413


@pytest.mark.parametrize("id", ["0", "-1", "99999999999999999999", "1.5", "x", "%00", "1'--", "%F0%9F%92%A9"])
def test_what_is_malformed_is_refused(signed_in: TestClient, id: str) -> None:
    for path in (f"/api/runs/{id}", f"/api/runs/{id}/grid", f"/runs/{id}"):
        assert signed_in.get(path).status_code in (404, 422)
    for query in ("sort=;drop", "limit=x", "search=%00", "status=x", "task=%27"):
        assert signed_in.get(f"/api/runs?{query}").status_code == 422


def test_other_methods_are_not_allowed(signed_in: TestClient) -> None:
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
        assert signed_in.request(method, "/api/runs/1").status_code == 405


def test_a_foreign_name_is_not_answered_to(signed_in: TestClient) -> None:
    for host in ("evil.example", "127.0.0.1.evil.example", "10.0.0.5", "", "a b", "[::1", "127.0.0.1@evil.example:80"):
        assert signed_in.get("/api/runs", headers={"Host": host}).status_code == 421
    for host in ("localhost:8600", "[::1]:8600", "127.0.0.1"):
        assert signed_in.get("/api/runs", headers={"Host": host}).status_code == 200


def test_a_post_from_another_site_is_refused(client: TestClient) -> None:
    client.get(f"/?token={TOKEN}")  # a browser that has signed in
    stop = "/api/runs/1/stop"
    foreign: list[dict[str, str]] = [{"Origin": "https://evil.example"}, {"Origin": "null"}, {}]
    foreign += [{"Origin": "http://127.0.0.1:9999"}, {"Origin": "http://localhost:8600"}]
    foreign += [{"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}]
    for headers in foreign:
        assert client.post(stop, headers=headers).status_code == 403
    assert client.post(stop, headers={"Origin": ORIGIN}).status_code == 409  # let in; there is no federation to stop


def test_a_run_elsewhere_is_not_stopped(store: Path, tmp_path: Path) -> None:
    (tmp_path / "federation.toml").write_text('name = "f"\n[server]\nhost = "127.0.0.1"\n[sites.a]\n')
    provision(tmp_path / "federation.toml", tmp_path / "f", ())
    app = create_app(store, Access(TOKEN), tmp_path / "f")
    with TestClient(app, base_url=ORIGIN, headers={"Authorization": f"Bearer {TOKEN}"}) as client:
        answer = client.post("/api/runs/1/stop")
        assert answer.status_code == 409
        assert "no run of the federation" in answer.json()["detail"]
        assert client.get("/api/runs/1").json()["stoppable"] is False
        server = client.get("/api/federation").json()["server"]
    assert server["running"] is False
    assert "start it" in server["reason"]
    assert server["certificate"] > 100
    assert server["sites"] == {"a": {"online": False, "since": ""}}


def test_a_proxy_that_signs_in_is_believed_on_loopback_only(store: Path) -> None:
    access = access_for("127.0.0.1", None, "https://fl.example.org", "X-Forwarded-User")
    with TestClient(create_app(store, access), base_url="https://fl.example.org") as client:
        assert client.get("/api/about").status_code == 401
        answer = client.get("/api/about", headers={"X-Forwarded-User": "dr.who"})
        assert answer.json()["user"] == "dr.who"
        signed = {"X-Forwarded-User": "dr.who", "Host": "127.0.0.1:8600"}  # as a proxy asks that keeps no name
        assert client.post("/api/runs/1/stop", headers=signed | {"Origin": "https://evil.example"}).status_code == 403
        assert client.post("/api/runs/1/stop", headers=signed | {"Origin": "https://fl.example.org"}).status_code == 409
        cookie = client.get(f"/?token={access.token}", follow_redirects=False).headers["set-cookie"]
        assert "Secure" in cookie
    with pytest.raises(UserError, match="only together with --host 127"):
        access_for("0.0.0.0", Path("/dev/null"), "", "X-Forwarded-User")


def test_beyond_this_machine_a_token_of_ones_own_is_asked_for(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "::", "192.0.2.7", socket.gethostname()):
        with pytest.raises(UserError, match="--token-file"):
            access_for(host, None)
    file = tmp_path / "token"
    cases: dict[str, str] = {"short": "16 characters", "two words of some length": "one word", "": "one word"}
    for text, message in cases.items():
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            access_for("0.0.0.0", file)
    file.write_text(TOKEN + "\n")
    access = access_for("0.0.0.0", file)
    assert access.token == TOKEN
    assert access.answers_to("10.1.2.3:8600")
    assert not access.answers_to("evil.example:8600")
    with pytest.raises(UserError, match="cannot be read"):
        access_for("127.0.0.1", tmp_path / "nothing")


def test_tokens_differ_each_time() -> None:
    found: set[Any] = {access_for("127.0.0.1", None).token for _ in range(20)}
    assert len(found) == 20
    assert min(map(len, found)) >= 43


def test_nothing_is_written(signed_in: TestClient, runs_folder: Path) -> None:
    def files() -> dict[str, Any]:
        found = (p for p in runs_folder.rglob("*") if p.is_file() and not p.name.endswith(("-shm", "-wal")))
        return {str(p): (os.stat(p)[stat.ST_SIZE], p.stat().st_mtime_ns) for p in found}

    before = files()
    for path in ("/api/runs", "/api/runs/1", "/api/runs/1/model", "/api/federation", "/api/runs/1/warnings"):
        assert signed_in.get(path).status_code == 200
    assert files() == before

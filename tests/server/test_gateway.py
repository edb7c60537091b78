"""A real nginx with the generated configuration before an upstream that tells what reached it."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from server import gateway, pki
from server.federation import Folder
from server.provision import provision
from shared import __version__

pytestmark = pytest.mark.skipif(
    not (shutil.which("nginx") or Path("/usr/sbin/nginx").exists()), reason="nginx is not installed"
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"after {seconds} s still not: {what}"
        time.sleep(0.02)


def accepts(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


class Upstream(ThreadingHTTPServer):
    """In SuperLink's place: answers with what it got, and remembers it."""

    daemon_threads = True
    request_queue_size = 256
    seen: list[tuple[str, str]]
    hold: threading.Event

    def handle_error(self, request: object, client_address: object) -> None:
        """A caller that went away is no news."""


class Answer(BaseHTTPRequestHandler):
    server: Upstream
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.server.seen.append((self.command, self.path))
        self.server.hold.wait(60)
        told = {
            "path": self.path,
            "headers": {name.lower(): value for name, value in self.headers.items()},
            "bytes": len(body),
            "sha256": hashlib.sha256(body).hexdigest(),
        }
        content = json.dumps(told).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = do_OPTIONS = _answer

    def log_message(self, *words: object) -> None:
        """Nothing on the screen."""


@dataclass
class Gateway:
    folder: Folder
    port: int
    upstream: Upstream = field(repr=False)

    @property
    def context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.folder.ca_cert))

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes, dict[str, str]]:
        call = http.client.HTTPSConnection("localhost", self.port, context=self.context, timeout=60)
        with contextlib.closing(call):
            call.request(method, path, body, headers or {})
            answer = call.getresponse()
            return answer.status, answer.read(), {name.lower(): value for name, value in answer.getheaders()}

    def raw(self, text: bytes, tls: bool = True) -> bytes:
        """All that comes back on bytes as they are, which no library would send."""
        with socket.create_connection(("127.0.0.1", self.port), 60) as plain:
            line = self.context.wrap_socket(plain, server_hostname="localhost") if tls else plain
            line.sendall(text)
            return b"".join(iter(lambda: line.recv(65536), b""))


def folder_of(path: Path, port: int, internal: int) -> Folder:
    path.mkdir()
    file = path / "federation.toml"
    file.write_text(
        f'name = "council"\n[server]\nhost = "localhost"\nlisten = "127.0.0.1"\nport = {port}\n'
        f"internal_port = {internal}\n[sites.north]\n"
    )
    provision(file, path / "fed")
    return Folder(path / "fed")


@contextlib.contextmanager
def nginx(folder: Folder, port: int) -> Iterator[subprocess.Popen[bytes]]:
    words = gateway.command(folder)
    assert subprocess.run([*words, "-t"], capture_output=True, timeout=60).returncode == 0
    process = subprocess.Popen(words, stderr=subprocess.PIPE)
    try:
        wait_for(lambda: accepts(port) or process.poll() is not None, "nginx listens")
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        yield process
    finally:
        process.terminate()
        process.wait(30)
        if process.stderr:
            process.stderr.close()


@contextlib.contextmanager
def upstream_of(folder: Folder, port: int, certificate: Path | None = None) -> Iterator[Upstream]:
    server = Upstream(("127.0.0.1", port), Answer)
    server.seen, server.hold = [], threading.Event()
    server.hold.set()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate or folder.server_cert, folder.server_key)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(30)


@contextlib.contextmanager
def running(path: Path) -> Iterator[Gateway]:
    port, internal = free_port(), free_port()
    folder = folder_of(path, port, internal)
    with upstream_of(folder, internal) as upstream, nginx(folder, port):
        yield Gateway(folder, port, upstream)


@pytest.fixture(scope="module")
def shared_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with running(tmp_path_factory.mktemp("gateway") / "here") as one:
        yield one


@pytest.fixture
def live(shared_gateway: Gateway) -> Gateway:
    shared_gateway.upstream.seen.clear()
    return shared_gateway


def flower_routes() -> set[tuple[str, str]]:
    """Method and path of all that Flower's SuperLink serves."""
    from fastapi import FastAPI
    from flwr.supercore.routers import health
    from flwr.supercore.routers.runtime import create_runtime_router, responses_router
    from flwr.superlink.routers.control import router as control
    from flwr.superlink.routers.fleet.router import router as fleet

    app = FastAPI()
    for router in (health.router, control, fleet, create_runtime_router("SuperLink"), responses_router):
        app.include_router(router)
    described = {(method.upper(), path) for path, methods in app.openapi()["paths"].items() for method in methods}
    return described | {("GET", path) for path in ("/docs", "/redoc", "/openapi.json", "/docs/oauth2-redirect")}


def test_the_routes_are_flowers_own_but_for_two_that_node_authentication_refuses() -> None:
    fleet = {path.removeprefix("/v1/fleet/") for _, path in flower_routes() if path.startswith("/v1/fleet/")}
    assert fleet == {*gateway.ROUTES, "register-node", "unregister-node"}


@pytest.mark.parametrize("route", gateway.ROUTES)
def test_a_sites_routes_pass_with_what_the_site_sent(live: Gateway, route: str) -> None:
    sent = os.urandom(1000)
    status, body, _ = live.ask("POST", f"/v1/fleet/{route}", sent, {"flwr-test": "kept"})
    told = json.loads(body)
    assert (status, told["path"], told["sha256"]) == (200, f"/v1/fleet/{route}", hashlib.sha256(sent).hexdigest())
    assert told["headers"]["flwr-test"] == "kept"
    assert live.ask("GET", f"/v1/fleet/{route}")[0] == 405
    assert len(live.upstream.seen) == 1


def test_nothing_else_that_superlink_serves_is_reached(live: Gateway) -> None:
    open_ = {("POST", f"/v1/fleet/{route}") for route in gateway.ROUTES} | {("GET", "/health"), ("HEAD", "/health")}
    closed = flower_routes() - open_
    assert sum(path.startswith("/v1/control/") for _, path in closed) > 30
    assert open_ <= flower_routes()
    for method, path in sorted(closed):
        assert live.ask(method, path, b"x" if method == "POST" else None)[0] in (404, 405), (method, path)
    assert live.upstream.seen == []


@pytest.mark.parametrize(
    "target",
    [
        "/v1/fleet/../control/list-runs",
        "/v1/fleet/%2e%2e/control/list-runs",
        "/v1/fleet/..%2fcontrol/list-runs",
        "/v1/fleet/pull-messages/../../control/list-runs",
        "/v1/fleet/pull-messages/",
        "/v1/fleet/pull-messages%00/v1/control/list-runs",
        "/v1/fleet/pull-messages%2f..%2f..%2fcontrol%2flist-runs",
        "/v1/fleet/pull-messages;/v1/control/list-runs",
        "/v1/fleet/pull-messages\\..\\..\\control\\list-runs",
        "/V1/FLEET/PULL-MESSAGES",
        "//v1/control/list-runs",
        "/v1//control/list-runs",
        "/./v1/control/list-runs",
        "https://localhost/v1/control/list-runs",
        "/v1/control/x/../../fleet/pull-messages",
        "/v1/fleet//pull-messages?/v1/control/list-runs",
        "/v1/fleet/%70ull-messages?x=1#y",
    ],
)
def test_no_spelling_of_a_path_reaches_another_route(live: Gateway, target: str) -> None:
    live.raw(f"POST {target} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
    assert set(live.upstream.seen) <= {("POST", "/v1/fleet/pull-messages")}, "what was matched goes on, no more"


@pytest.mark.parametrize(
    "text",
    [
        b"POST /v1/fleet/get-run HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"0\r\n\r\nPOST /v1/control/list-runs HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
        b"POST /v1/fleet/get-run HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\nContent-Length: 60\r\n\r\n"
        b"POST /v1/control/list-runs HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
        b"POST /v1/fleet/get-run HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: h2c\r\n"
        b"Content-Length: 0\r\n\r\n"
        b"POST /v1/control/list-runs HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
    ],
)
def test_no_request_is_smuggled_inside_another(live: Gateway, text: bytes) -> None:
    live.raw(text)
    assert set(live.upstream.seen) <= {("POST", "/v1/fleet/get-run")}


def test_a_piece_of_a_model_passes_and_what_is_larger_than_8_mib_does_not(live: Gateway) -> None:
    from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE

    piece = os.urandom(FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE + 4096)
    status, body, _ = live.ask("POST", "/v1/fleet/push-object", piece)
    assert (status, json.loads(body)["sha256"]) == (200, hashlib.sha256(piece).hexdigest())
    most = gateway.BODY_MIB * 2**20
    assert live.ask("POST", "/v1/fleet/push-object", bytes(most))[0] == 200
    live.upstream.seen.clear()
    head = b"POST /v1/fleet/push-object HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
    assert b" 413 " in live.raw(head + b"Content-Length: %d\r\n\r\n" % (most + 1)).split(b"\r\n")[0]
    with contextlib.suppress(OSError):  # it may hang up while the rest is still being sent
        answer = live.raw(head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % (most + 1) + bytes(most + 1) + b"\r\n")
        assert b" 413 " in answer.split(b"\r\n")[0]
    assert live.upstream.seen == []


def test_what_a_caller_says_of_itself_in_headers_is_not_believed(live: Gateway) -> None:
    forged = {"X-Forwarded-For": "6.6.6.6", "Forwarded": "for=6.6.6.6", "X-Forwarded-Proto": "http", "Host": "evil"}
    told = json.loads(live.ask("POST", "/v1/fleet/get-run", b"", forged)[1])["headers"]
    assert told["x-forwarded-for"] == "127.0.0.1"
    assert told["x-forwarded-proto"] == "https"
    assert told["host"] == "localhost"
    assert "forwarded" not in told


def test_who_is_there_is_told_and_nothing_of_the_software(live: Gateway) -> None:
    from importlib import metadata

    status, body, headers = live.ask("GET", "/consilium")
    assert (status, headers["content-type"]) == (200, "application/json")
    assert json.loads(body) == {"federation": "council", "version": __version__, "flwr": metadata.version("flwr")}
    assert live.ask("POST", "/consilium", b"")[0] == 405
    for path in ("/consilium", "/v1/fleet/none", "/"):
        _, _, headers = live.ask("GET", path)
        assert headers["server"] == "nginx"
        assert headers["strict-transport-security"] == "max-age=31536000"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
    assert live.upstream.seen == []
    assert live.ask("GET", "/health")[0] == 200


def test_only_tls_1_3_of_the_right_authority_and_name(live: Gateway, tmp_path: Path) -> None:
    def version(context: ssl.SSLContext, name: str = "localhost") -> str | None:
        with (
            socket.create_connection(("127.0.0.1", live.port), 30) as plain,
            context.wrap_socket(plain, server_hostname=name) as line,
        ):
            return line.version()

    assert version(live.context) == "TLSv1.3"
    old = live.context
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError, match=r"(?i)protocol"):
        version(old)
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        version(live.context, "evil.example.org")
    pki.write_file(tmp_path / "other.crt", pki.make_ca("council", datetime.now(UTC))[0])
    with pytest.raises(ssl.SSLCertVerificationError, match="certificate verify failed"):
        version(ssl.create_default_context(cafile=str(tmp_path / "other.crt")))


def test_plain_http_is_told_to_use_https(live: Gateway) -> None:
    for path in ("/", "/v1/fleet/get-run", "/v1/control/list-runs"):
        answer = live.raw(f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n".encode(), tls=False)
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert b"This port speaks HTTPS only" in answer
    assert live.upstream.seen == []


def test_one_address_has_so_many_requests_at_a_time_and_is_told_to_come_back(live: Gateway) -> None:
    live.upstream.hold.clear()  # none is answered until all are there
    try:
        with ThreadPoolExecutor(gateway.CONNECTIONS) as pool:
            first = [pool.submit(live.ask, "POST", "/v1/fleet/get-run", b"") for _ in range(gateway.CONNECTIONS)]
            wait_for(lambda: len(live.upstream.seen) == gateway.CONNECTIONS, "all are there")
            assert live.ask("POST", "/v1/fleet/get-run", b"")[0] == 503  # on 503 a SuperNode waits and tries again
            live.upstream.hold.set()
            assert {done.result(60)[0] for done in first} == {200}
        assert live.ask("POST", "/v1/fleet/get-run", b"")[0] == 200
    finally:
        live.upstream.hold.set()


def test_more_requests_than_the_rate_wait_and_who_dawdles_is_hung_up_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the limits made small, so that they are reached in seconds."""
    shipped = gateway._CONFIGURATION
    small = shipped.replace("client_header_timeout 15s", "client_header_timeout 1s")
    small = small.replace("client_body_timeout 30s", "client_body_timeout 1s")
    assert small.count("timeout 1s") == 2
    monkeypatch.setattr(gateway, "REQUESTS", 5)
    monkeypatch.setattr(gateway, "_CONFIGURATION", small)
    with running(tmp_path / "small") as live:
        begun = time.monotonic()
        assert {live.ask("POST", "/v1/fleet/get-run", b"")[0] for _ in range(11)} == {200}
        assert time.monotonic() - begun > 1.8
        assert "delaying" not in (live.folder.gateway / "error.log").read_text()  # a line each would fill the disk
        live.upstream.seen.clear()
        begun = time.monotonic()
        assert live.raw(b"POST /v1/fleet/get-run HTTP/1.1\r\nHost") == b""
        assert live.raw(b"POST /v1/fleet/get-run HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nhalf") == b""
        assert time.monotonic() - begun < 12
        assert live.upstream.seen == []


def test_a_superlink_that_is_down_or_not_ours_gets_nothing(tmp_path: Path) -> None:
    port, internal = free_port(), free_port()
    folder = folder_of(tmp_path / "down", port, internal)
    other = folder_of(tmp_path / "other", free_port(), free_port())
    with nginx(folder, port):
        live = Gateway(folder, port, None)  # type: ignore[arg-type]
        status, body, _ = live.ask("POST", "/v1/fleet/get-run", b"secret")
        assert (status, body) == (502, b"The federation's server does not answer; try again later.\n")
        assert live.ask("GET", "/consilium")[0] == 200
        pair = tmp_path / "pair.pem"  # another federation's certificate for localhost
        pair.write_bytes(other.server_cert.read_bytes() + other.server_key.read_bytes())
        folder.server_key.write_bytes(other.server_key.read_bytes())  # only the stand-in reads it again
        with upstream_of(folder, internal, pair) as upstream:
            assert live.ask("POST", "/v1/fleet/get-run", b"secret")[0] == 502
            assert upstream.seen == []


def test_a_new_certificate_is_served_after_a_reload_that_breaks_no_request(tmp_path: Path) -> None:
    with running(tmp_path / "here") as live, ThreadPoolExecutor(1) as pool:

        def serial() -> str:
            with (
                socket.create_connection(("127.0.0.1", live.port), 30) as plain,
                live.context.wrap_socket(plain, server_hostname="localhost") as line,
            ):
                return str(line.getpeercert()["serialNumber"]).lstrip("0")  # type: ignore[index]

        before = serial()
        live.upstream.hold.clear()
        begun = pool.submit(live.ask, "POST", "/v1/fleet/get-run", b"")
        try:
            wait_for(lambda: len(live.upstream.seen) == 1, "a request is on its way")
            file = tmp_path / "here" / "federation.toml"
            file.write_text(file.read_text().replace("[server]", '[server]\nalso = ["127.0.0.9"]'))
            provision(file, live.folder.path)
            done = subprocess.run(gateway.command(live.folder, "-s", "reload"), capture_output=True, timeout=60)
            assert done.returncode == 0, done.stderr
            new = f"{pki.read_certificate(live.folder.server_cert).serial_number:X}"
            assert new != before
            wait_for(lambda: serial() == new, "the new certificate is served")
        finally:
            live.upstream.hold.set()
        assert begun.result(60)[0] == 200


def test_neither_its_log_nor_its_command_line_holds_a_secret(live: Gateway) -> None:
    log = live.folder.gateway / "access.log"
    earlier = len(log.read_bytes())  # requests of other tests
    live.ask("POST", "/v1/fleet/get-run?token=hidden", b"body-of-a-site", {"flwr-signature": "signature-of-a-site"})
    wait_for(lambda: b"get-run" in log.read_bytes()[earlier:], "the request is in the log")
    text = b"".join(path.read_bytes() for path in live.folder.gateway.glob("*.log"))
    for secret in (b"hidden", b"body-of-a-site", b"signature-of-a-site"):
        assert secret not in text
    assert not any("key" in word for word in gateway.command(live.folder))
    before = len(log.read_bytes())
    errors = live.folder.gateway / "error.log"
    warned = errors.read_bytes()
    live.ask("POST", "/v1/fleet/pull-messages", b"")  # asked every few seconds by every site
    assert live.ask("POST", "/v1/fleet/push-object", bytes(5 << 20))[0] == 200  # a part of a model, one of hundreds
    live.ask("POST", "/v1/fleet/pull-object", b"")
    live.ask("POST", "/v1/fleet/get-fab", b"")
    wait_for(lambda: b"get-fab" in log.read_bytes()[before:], "the later request is in the log")
    assert log.read_bytes()[before:].count(b"\n") == 1
    assert errors.read_bytes() == warned


class Tunnel(BaseHTTPRequestHandler):
    """A hospital's proxy: CONNECT, and bytes to and fro."""

    server: Upstream

    def do_CONNECT(self) -> None:
        self.server.seen.append((self.command, self.path))
        host, port = self.path.rsplit(":", 1)
        with socket.create_connection((host, int(port)), 30) as there:
            self.send_response(200)
            self.end_headers()
            back = threading.Thread(target=self._pass, args=(there, self.connection), daemon=True)
            back.start()
            self._pass(self.connection, there)
            back.join(30)

    @staticmethod
    def _pass(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def log_message(self, *words: object) -> None:
        """Nothing on the screen."""


def test_flowers_client_passes_through_a_proxy_that_tunnels(live: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx
    from flwr.proto.run_pb2 import GetRunRequest
    from flwr.supernode.fleet_http_client import FleetHttpClient

    proxy = Upstream(("127.0.0.1", 0), Tunnel)
    proxy.seen = []
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.server_address[1]}")
    for name in ("NO_PROXY", "no_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    try:
        address, ca = f"localhost:{live.port}", live.folder.ca_cert.read_bytes()
        with (
            FleetHttpClient.from_server_address(address, False, ca, interceptors=[]) as client,
            pytest.raises((httpx.HTTPError, ValueError)),  # the stand-in for SuperLink speaks no protobuf
        ):
            client.GetRun(GetRunRequest(run_id=1))
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join(30)
    assert proxy.seen == [("CONNECT", f"localhost:{live.port}")]
    assert live.upstream.seen == [("POST", "/v1/fleet/get-run")]


def test_without_nginx_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, live: Gateway) -> None:
    from shared.errors import UserError

    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(UserError, match="apt install nginx-light"):
        gateway.command(live.folder)


def flower(program: str, *words: object, home: Path) -> subprocess.Popen[str]:
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }
    return subprocess.Popen(
        [str(Path(sys.executable).parent / program), *map(str, words)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def stop(process: subprocess.Popen[str]) -> str:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        return process.communicate(timeout=30)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate(timeout=30)[0]


@pytest.mark.slow
def test_flowers_own_supernode_joins_through_it_and_control_does_not(tmp_path: Path) -> None:
    """SuperLink, SuperNode and command line as Flower ships them."""
    port, internal = free_port(), free_port()
    folder = folder_of(tmp_path / "real", port, internal)
    home = tmp_path / "flower"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "inside"\n[superlink.inside]\naddress = "127.0.0.1:{internal}"\n'
        f'root-certificates = "{folder.ca_cert}"\n'
        f'[superlink.outside]\naddress = "localhost:{port}"\nroot-certificates = "{folder.ca_cert}"\n'
    )
    subprocess.run(["unzip", "-q", str(folder.kit("north")), "-d", str(tmp_path / "kit")], check=True, timeout=60)
    pki.write_file(tmp_path / "stranger.key", pki.make_node_key(), 0o600)
    link = flower(
        *("flower-superlink", "--host", "127.0.0.1", "--port", internal, "--enable-supernode-auth"),
        *("--ssl-certfile", folder.server_cert, "--ssl-keyfile", folder.server_key),
        *("--ssl-ca-certfile", folder.ca_cert, "--isolation", "process"),
        *("--superexec-auth-secret-file", folder.superexec_secret, "--disable-runtime-dependency-installation"),
        home=home,
    )

    def flwr(*words: object) -> tuple[int, str]:
        process = flower("flwr", *words, home=home)
        out = process.communicate(timeout=120)[0]
        return process.returncode, out

    def node(key: Path) -> subprocess.Popen[str]:
        return flower(
            *("flower-supernode", "--superlink", f"localhost:{port}", "--root-certificates", folder.ca_cert),
            *("--auth-supernode-private-key", key, "--isolation", "process", "--port", free_port()),
            home=home,
        )

    def status() -> str:
        code, out = flwr("supernode", "list", "inside", "--format", "json")
        assert code == 0, out
        return ",".join(node["status"] for node in json.loads(out)["nodes"])

    site = None
    try:
        wait_for(lambda: accepts(internal) or link.poll() is not None, "SuperLink listens", 60)
        with nginx(folder, port):
            code, out = flwr("supernode", "register", folder.node_pub("north"), "inside")
            assert code == 0, out
            site = node(tmp_path / "kit" / "node.key")
            wait_for(lambda: status() == "online", "the site is online", 90)

            stranger = node(tmp_path / "stranger.key")
            told = stranger.communicate(timeout=90)[0]
            assert stranger.returncode == 1, told
            assert "Failed to activate SuperNode" in told or "401" in told, told

            code, out = flwr("supernode", "list", "outside", "--format", "json")
            assert code != 0 or not json.loads(out).get("success", False), out
            code, out = flwr("supernode", "register", folder.node_pub("north"), "outside")
            assert code != 0, out
            assert status() == "online"
    finally:
        if site is not None:
            stop(site)
        stop(link)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("testssl"), reason="testssl.sh is not installed")
def test_testssl_finds_nothing_above_low(live: Gateway, tmp_path: Path) -> None:
    """But for one: no list of revoked certificates is published, since Flower's sites would not read one."""
    words = ["testssl", "--quiet", "--color", "0", "--warnings", "batch", "--add-ca", str(live.folder.ca_cert)]
    report = tmp_path / "report.json"
    words += ["--jsonfile", str(report), "--ip", "one", "--nodns", "min", f"https://localhost:{live.port}"]
    subprocess.run(words, capture_output=True, timeout=600)
    findings = json.loads(report.read_text())
    assert len(findings) > 100
    assert {"protocol", "TLS1_3"} & {found["id"] for found in findings}
    above = {found["id"] for found in findings if found["severity"] in ("MEDIUM", "HIGH", "CRITICAL", "FATAL")}
    assert above <= {"cert_revocation"}, [found for found in findings if found["id"] in above]

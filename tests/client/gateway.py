"""A server such as a site may meet: TLS by the standard library, certificates by cryptography, on loopback."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import socket
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID

from shared import __version__

DAY = timedelta(days=1)
FACTS = {"federation": "chest-council", "version": __version__, "flwr": version("flwr")}


@dataclass
class Authority:
    """A certificate authority of a test, and the certificates it signs."""

    folder: Path
    name: str = "Council CA"
    lasts: timedelta = 3650 * DAY
    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self.name)])
        made = self._builder(subject, self.key, -10 * DAY, self.lasts)
        self.certificate = made.add_extension(x509.BasicConstraints(True, 0), True).sign(self.key, hashes.SHA256())
        self.file = self.folder / "ca.crt"
        self.file.write_bytes(self.certificate.public_bytes(Encoding.PEM))

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, start: timedelta, end: timedelta
    ) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self.name)])
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
        builder = builder.serial_number(x509.random_serial_number())
        return builder.not_valid_before(now + start).not_valid_after(now + end)

    def sign(self, *names: str, start: timedelta = -10 * DAY, end: timedelta = 365 * DAY) -> Path:
        """A server's certificate and key in one file."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
        alternative: list[x509.GeneralName] = []
        for name in names:
            try:
                alternative.append(x509.IPAddress(ipaddress.ip_address(name)))
            except ValueError:
                alternative.append(x509.DNSName(name))
        builder = self._builder(subject, key, start, end)
        builder = builder.add_extension(x509.SubjectAlternativeName(alternative), False)
        made = builder.sign(self.key, hashes.SHA256())
        path = self.folder / f"{made.serial_number}.pem"
        secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        path.write_bytes(secret + made.public_bytes(Encoding.PEM))
        return path


class Server(ThreadingHTTPServer):
    """Answers every GET and POST alike, and keeps what it was asked."""

    status, facts, location = 200, FACTS, ""
    ahead = 0.0  # seconds of its clock
    body: bytes | None = None

    def __init__(self, tls: Path | None, **settings: Any) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[str] = []
        vars(self).update(settings)
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tls)
            self.socket = context.wrap_socket(self.socket, server_side=True)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that breaks off is what some of these tests are about."""


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = 2  # seconds; a client that speaks TLS here never ends its line

    def do_GET(self) -> None:
        server = self.server
        server.asked.append(f"{self.command} {self.path}")
        body = json.dumps(server.facts).encode() if server.body is None else server.body
        self.send_response(server.status)
        self.send_header("Content-Length", str(len(body)))
        if server.location:
            self.send_header("Location", server.location)
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.do_GET()

    def do_CONNECT(self) -> None:
        """As a proxy: a tunnel, or the status of the server where that is not 200."""
        self.server.asked.append(f"{self.command} {self.path}")
        self.send_response_only(self.server.status)
        self.end_headers()
        if self.server.status != 200:
            return
        host, _, port = self.path.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=5) as other:
            back = threading.Thread(target=_pump, args=(other, self.connection), daemon=True)
            back.start()
            _pump(self.connection, other)
            back.join(5)

    def date_time_string(self, timestamp: float | None = None) -> str:
        return formatdate(datetime.now(UTC).timestamp() + self.server.ahead, usegmt=True)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while piece := source.recv(65536):
            sink.sendall(piece)
        sink.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def serving(tls: Path | None, **settings: Any) -> Iterator[Server]:
    """A server in a thread of this process; ``tls`` None: plain HTTP."""
    server = Server(tls, **settings)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def write_key(path: Path, curve: ec.EllipticCurve | None = None) -> Path:
    """A site's key as `consilium site keygen` or ssh-keygen makes it, and its public part beside it."""
    key = ec.generate_private_key(curve or ec.SECP384R1())
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    path.chmod(0o600)
    path.with_suffix(".pub").write_bytes(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    return path

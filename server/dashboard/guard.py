"""Who may ask the dashboard what: the token, the names it answers to, cross-site requests, sizes, security headers."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.federation import is_address

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
MAX_BODY = 4096  # bytes; no request of the pages has a body at all
MAX_QUERY = 2048  # bytes
SHORTEST = 16  # characters of a token
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
_REFUSED = (
    '<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>Consilium</title>'
    "<h1>Sign in</h1><p>Open the address that <code>consilium dashboard</code> printed: it holds the token.</p></html>"
)


@dataclass(frozen=True)
class Access:
    """Who is let in.

    ``hosts``: the names by which the dashboard is asked; any other is refused, so that no foreign name can be made to
    point here. ``origin``: how a browser outside sees it, behind a proxy. ``header``: what a proxy that has signed the
    user in sets; "" trusts none. ``addresses``: bare IP addresses are good, too; no foreign name can be one.
    """

    token: str
    hosts: frozenset[str] = LOOPBACK
    origin: str = ""
    header: str = ""
    addresses: bool = False

    def answers_to(self, host: str) -> bool:
        """Whether the Host header names this dashboard."""
        name = _name(host)
        return name in self.hosts or (self.addresses and is_address(name))

    @property
    def session(self) -> str:
        """What the cookie holds: not the token itself, and nobody makes it without the token."""
        return hmac.new(self.token.encode(), b"consilium dashboard session", hashlib.sha256).hexdigest()

    def right(self, given: str, wanted: str) -> bool:
        """Whether the secret is the one; takes as long whatever was given."""
        return hmac.compare_digest(given.encode("utf-8", "surrogatepass"), wanted.encode())


class Guard:
    """The outermost layer of the application: nothing behind it is reached without permission."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app, self.access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # no web sockets

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        refusal = self._refusal(scope)
        await (refusal or self.app)(scope, receive, guarded)

    def _refusal(self, scope: Scope) -> Response | None:
        """The answer to who is not let through, or is on the way to signing in."""
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self.access.answers_to(hosts[0]):
            return _error(421, "the dashboard does not answer to this name; start it with --public-url")
        if scope["method"] not in ("GET", "HEAD", "POST"):
            return _error(405, "method not allowed", {"Allow": "GET, HEAD, POST"})
        if len(scope["query_string"]) > MAX_QUERY:
            return _error(414, "the address is too long")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:12]) > MAX_BODY or "transfer-encoding" in headers:
            return _error(413, "the request is too large")
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        tokens = [value for name, value in query if name == "token"]
        if tokens and scope["method"] == "GET":
            return self._sign_in(scope, tokens, query, hosts[0])
        if not self._known(scope, headers):
            return _unknown(headers)
        if scope["method"] == "POST" and not self._same_site(headers, hosts[0], scope["scheme"]):
            return _error(403, "this request comes from another site")
        return None

    def _sign_in(self, scope: Scope, tokens: list[str], query: Iterable[tuple[str, str]], host: str) -> Response:
        """Take the token out of the address, and into a cookie that no script can read."""
        if len(tokens) != 1 or not self.access.right(tokens[0], self.access.token):
            return _unknown(Headers(scope=scope))
        rest = urlencode([(name, value) for name, value in query if name != "token"])
        # Only a path of this server: "//elsewhere" would be an address of another.
        path = "/" + scope["path"].lstrip("/\\") if "\\" not in scope["path"] else "/"
        answer = RedirectResponse(path + ("?" + rest if rest else ""), 303)
        secure = self.access.origin.startswith("https://")
        name = _cookie(host)
        answer.set_cookie(name, self.access.session, httponly=True, samesite="strict", secure=secure, path="/")
        return answer

    def _known(self, scope: Scope, headers: Headers) -> bool:
        if self.access.header and (user := headers.get(self.access.header, "").strip()):
            scope.setdefault("state", {})["user"] = user[:200]
            return True
        kind, _, token = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and self.access.right(token.strip(), self.access.token):
            return True
        cookies: SimpleCookie = SimpleCookie()
        try:
            cookies.load(headers.get("cookie", ""))
        except CookieError:
            return False
        given = cookies.get(_cookie(headers.get("host", "")))
        return given is not None and self.access.right(given.value, self.access.session)

    def _same_site(self, headers: Headers, host: str, scheme: str) -> bool:
        """Browsers name the origin of every POST; who holds the token in a program names none."""
        origin = headers.get("origin")
        if origin is not None:
            return origin in {f"{scheme}://{host}", self.access.origin} - {""}
        return headers.get("sec-fetch-site", "same-origin") == "same-origin" and "authorization" in headers


def _name(host: str) -> str:
    """The host name in a Host header; "" where it is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _cookie(host: str) -> str:
    """Browsers do not keep the cookies of two ports apart, so the port is in the name."""
    port = host.rpartition(":")[2]
    return f"consilium-{port}" if port.isdecimal() else "consilium"


def _unknown(headers: Headers) -> Response:
    more = {"WWW-Authenticate": "Bearer"}
    if "text/html" in headers.get("accept", ""):
        return HTMLResponse(_REFUSED, 401, more)
    return _error(401, "sign in with the token", more)


def _error(status: int, text: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"detail": text}, status, headers)

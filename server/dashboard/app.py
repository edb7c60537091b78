"""The dashboard as an application: pages, their files, the API, behind ``guard``."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
from collections.abc import AsyncIterator
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from sqlalchemy import URL
from sqlalchemy.exc import SQLAlchemyError

from server.dashboard import metrics
from server.dashboard.api import Id, router
from server.dashboard.federation import FederationView
from server.dashboard.guard import Access, Guard
from server.dashboard.live import Watcher
from server.dashboard.views import Sites
from server.database.engine import open_database, words
from server.releases import listed
from shared import __version__
from shared.errors import UserError

STATIC = files("server.dashboard") / "static"
KINDS = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml", "html": "text/html"}
PLOTLY = "plotly.js"


def create_app(
    store_url: str | Path | URL, access: Access, federation: Path | None = None, registry: Path | None = None
) -> FastAPI:
    """The dashboard of a store; ``federation`` is a provisioned folder whose server runs on this machine, ``registry``
    the folder of releases that models are compared with.

    Raises:
        UserError: the store cannot be opened, no federation was set up in the folder, or there is no registry.
    """
    if registry is not None:
        listed(registry)
    db = open_database(store_url, create=False)
    view = FederationView(federation) if federation is not None else None
    watcher = Watcher(db, view)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(watcher.run())
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        db.dispose()

    app = FastAPI(
        title="Consilium dashboard",
        version=__version__,
        lifespan=lifespan,
        openapi_url="/api/openapi.json",
        docs_url=None,  # they would load scripts from elsewhere
        redoc_url=None,
    )
    app.state.db, app.state.federation, app.state.watcher = db, view, watcher
    app.state.sites, app.state.registry = Sites(db), registry
    app.include_router(router)
    _pages(app)
    _metrics(app)
    app.add_exception_handler(SQLAlchemyError, _unreadable)
    app.add_exception_handler(UserError, _not_so)
    app.add_exception_handler(404, _not_found)
    app.add_middleware(Guard, access=access)
    return app


def _pages(app: FastAPI) -> None:
    """Every page is the same shell; its script reads the address and asks the API."""

    def page() -> Response:
        return Response((STATIC / "index.html").read_bytes(), media_type=KINDS["html"])

    def page_of_run(id: Id) -> Response:
        return page()

    for path in ("/", "/federation"):
        app.add_api_route(path, page, include_in_schema=False)
    for path in ("/runs/{id}", "/runs/{id}/model"):
        app.add_api_route(path, page_of_run, include_in_schema=False)

    @app.get("/static/{name}", include_in_schema=False)
    def static(name: str, request: Request) -> Response:
        kind = KINDS.get(name.rpartition(".")[2])
        if name == PLOTLY:
            return _plotly("gzip" in request.headers.get("accept-encoding", ""))
        # The name is looked for among those that there are: nothing is put together to a path.
        found = {item.name: item for item in STATIC.iterdir() if item.is_file()}.get(name)
        if found is None or kind is None:
            raise HTTPException(404, "no such file")
        return Response(found.read_bytes(), media_type=kind, headers={"Cache-Control": "no-cache"})


def _metrics(app: FastAPI) -> None:
    @app.get("/metrics", include_in_schema=False)
    def prometheus() -> Response:
        """For Prometheus, which sends the token as it is told to."""
        try:
            content = metrics.page(app.state.db, app.state.federation)
        except metrics.Missing as error:
            return PlainTextResponse(f"{error}\n", 501)
        return Response(content, media_type=metrics.TYPE)


def _plotly(small: bool) -> Response:
    """Plotly's script from the installed package."""
    headers = {"Cache-Control": "private, max-age=86400", "Vary": "Accept-Encoding"}
    script, packed = _script()
    if small:
        return Response(packed, media_type=KINDS["js"], headers=headers | {"Content-Encoding": "gzip"})
    return Response(script, media_type=KINDS["js"], headers=headers)


@lru_cache(maxsize=1)
def _script() -> tuple[bytes, bytes]:
    script = (files("plotly") / "package_data" / "plotly.min.js").read_bytes()
    return script, gzip.compress(script, 6)


async def _not_found(request: Request, error: Exception) -> Response:
    """The shell for a person, whose script says that there is no such page; JSON for a program."""
    if "text/html" in request.headers.get("accept", "") and not request.url.path.startswith(("/api/", "/static/")):
        return Response((STATIC / "index.html").read_bytes(), 404, media_type=KINDS["html"])
    return JSONResponse({"detail": getattr(error, "detail", "Not Found")}, 404)


async def _unreadable(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": f"the store cannot be read now: {words(error)}"}, 503)


async def _not_so(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, 422)

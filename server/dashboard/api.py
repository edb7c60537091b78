"""The pages' questions, as JSON under /api/. What they answer is what ``server.database.read`` says, not rounded."""

from __future__ import annotations

import json
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal

from fastapi import APIRouter, HTTPException, Path, Query, Request
from fastapi.responses import FileResponse, Response, StreamingResponse
from sqlalchemy import Engine

from server.dashboard import models, views
from server.dashboard.federation import FederationView
from server.dashboard.live import Watcher
from server.database import read
from server.database.going import run_folder, state, states
from server.database.query import sortable
from server.record import reason_words
from server.releases import against_release
from shared import __version__
from shared.errors import UserError

PAGE = 200  # rows of the table of runs, at most
WINDOW = 200  # rounds of the grid, at most
Row = dict[str, Any]
Id = Annotated[int, Path(ge=1, le=2**63 - 1)]
Round = Annotated[int | None, Query(ge=1, le=10**6)]
Metric = Annotated[str, Query(max_length=96, pattern=r"^[^\x00-\x1f]*$")]
Sort = Annotated[str, Query(pattern=f"^-?({'|'.join(sortable())})$")]
NOT_FOUND: dict[int | str, dict[str, Any]] = {404: {"description": "There is no such run, or it has no such file."}}
router = APIRouter(prefix="/api", responses={401: {"description": "Sign in with the token."}})


def _db(request: Request) -> Engine:
    db: Engine = request.app.state.db
    return db


def _federation(request: Request) -> FederationView | None:
    found: FederationView | None = request.app.state.federation
    return found


def _json(content: Any) -> Response:
    """Straight to JSON: FastAPI's encoder takes longer over a grid than the database."""
    return Response(json.dumps(content, separators=(",", ":"), ensure_ascii=False), media_type="application/json")


def _run(request: Request, id: int) -> Row:
    try:
        return read.run(_db(request), id)
    except UserError as error:
        raise HTTPException(404, str(error)) from None


@router.get("/about")
def about(request: Request) -> Response:
    """Version, the federation's name ("" without one), and who is signed in, where a proxy tells."""
    view = _federation(request)
    user = getattr(request.state, "user", "")
    return _json({"version": __version__, "federation": view.name if view else "", "user": user})


@router.get("/runs")
def runs(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=PAGE)] = 50,
    offset: Annotated[int, Query(ge=0, le=10**6)] = 0,
    sort: Sort = "-started",
    search: Annotated[str, Query(max_length=100, pattern=r"^[^\x00-\x1f]*$")] = "",
    status: Literal["", "running", "finished", "failed", "stopped", "unknown"] = "",
    task: Annotated[str, Query(max_length=32, pattern=r"^[a-z-]*$")] = "",
) -> Response:
    """A page of the table of runs, how many match, how each one's metric is called, and of a federation whether its
    ``server`` answers. A run is also stopped, where that or the run's own lock says so, or unknown while it is away."""
    wanted = {name: value for name, value in (("search", search), ("status", status), ("task", task)) if value}
    db, view = _db(request), _federation(request)
    known = states(db, view.state if view else None)
    rows, total = read.runs(db, limit, offset, sort, wanted, known)
    for row in rows:
        row["words"] = views.metric_words(row["task"], [row["metric"]])[0]
    return _json({"runs": rows, "total": total, "server": view.server() if view else None})


@router.get("/runs/{id}", responses=NOT_FOUND)
def run(request: Request, id: Id) -> Response:
    """A run's row, its job, its baselines, its metrics with their words, ``whose`` figures validation and test
    are of, whether it could be stopped from here, and of a federation whether its ``server`` answers."""
    row = _run(request, id)
    db, view = _db(request), _federation(request)
    names = views.metrics_of(read.evaluations(db, id), row["metric"])
    found: Row = {"run": {key: value for key, value in row.items() if key not in ("settings", "children")}}
    found |= {"settings": row["settings"], "children": row["children"]}
    found["metrics"] = views.metric_words(row["task"], names or [row["metric"]])
    found["whose"] = views.whose(db, row)
    known = state(db, row, view.state if view else None)
    found["run"]["status"] = known or row["status"]
    return _json(found | {"stoppable": known == "running", "server": view.server() if view else None})


@router.get("/runs/{id}/course", responses=NOT_FOUND)
def course(request: Request, id: Id, metric: Metric = "") -> Response:
    """One metric of the global model by round, with its 95 % interval: val and test, and the training loss."""
    row, db = _run(request, id), _db(request)
    metric = metric or row["metric"]
    found: Row = {"val": [], "test": []}
    for event in read.evaluations(db, id):
        if event["split"] in found and metric in event["metrics"]:
            found[event["split"]].append({"round": event["round"], **event["metrics"][metric]})
    losses = [[one["round"], one["loss"]] for one in read.rounds(db, id)]
    words = views.metric_words(row["task"], [metric])[0]
    return _json(found | {"metric": words, "loss": losses, "best_round": row["best_round"], "rounds": row["rounds"]})


@router.get("/runs/{id}/test", responses=NOT_FOUND)
def test(request: Request, id: Id) -> Response:
    """The last test: round, images, metrics, and the same at each site and on the server's own images."""
    _run(request, id)
    whole = read.evaluations(_db(request), id, "test")
    if not whole:
        return _json(None)
    last = whole[-1]
    rows = {name: rows[-1] for name, rows in read.site_metrics(_db(request), id, "test").items()}
    sites = {name: row for name, row in rows.items() if row["round"] == last["round"]}
    found = {key: last[key] for key in ("round", "images", "metrics", "server", "dropped")} | {"sites": sites}
    point = read.last_facts(_db(request), id, "evaluation", "test").get("operating_point")
    return _json(found | {"operating_point": point})


@router.get("/runs/{id}/subgroups", responses=NOT_FOUND)
def subgroups(request: Request, id: Id) -> Response:
    """Test figures by group of patients, as far as sites tell of them: groups by name, and who tells of none; null
    where the job asked for none."""
    _run(request, id)
    found = read.last_facts(_db(request), id, "subgroups")
    for row in found.get("groups", {}).values():
        row.pop("sums", None)  # thousands of counts that no page shows
    return _json(found or None)


@router.get("/runs/{id}/cross-site", responses=NOT_FOUND)
def cross_site(request: Request, id: Id, metric: Metric = "") -> Response:
    """One metric of each site's own model and of the federated one on every site's test images: {model: {site:
    figure}}; null where no site's own model was trained."""
    row = _run(request, id)
    metric = metric or row["metric"]
    found = views.cross_site(_db(request), row, metric)
    words = views.metric_words(row["task"], [metric])[0]
    return _json(found and {"metric": words, "models": found})


@router.get("/runs/{id}/sites", responses=NOT_FOUND)
def sites(request: Request, id: Id, metric: Metric = "") -> Response:
    """One metric of the global model by round at each site, and how far the sites lie apart (test, else validation)."""
    row, db = _run(request, id), _db(request)
    metric = metric or row["metric"]
    better, split = views.direction(row["task"], metric), "test"
    val = read.site_metrics(db, id, "val", [metric])
    fair = views.fairness(read.site_metrics(db, id, "test", [metric]), metric, better)
    if fair is None:
        split, fair = "val", views.fairness(val, metric, better)
    lines = {
        name: [[point["round"], *(point["metrics"].get(metric, {}).get(key) for key in ("value", "low", "high"))]
               for point in points]
        for name, points in val.items()
    }  # fmt: skip
    words = views.metric_words(row["task"], [metric])[0]
    return _json({"metric": words, "sites": lines, "fairness": fair and fair | {"split": split}})


@router.get("/runs/{id}/grid", responses=NOT_FOUND)
def grid(request: Request, id: Id, first: Round = None, last: Round = None) -> Response:
    """Which site trained in which round; the last 60 rounds unless others are asked for, at most 200."""
    done = _run(request, id)["done"]
    last = last or max(done, 1)
    first = max(first or last - 59, last - WINDOW + 1, 1)
    found = views.compact_grid(read.site_grid(_db(request), id, first, last))
    return _json(found | {"first": first, "last": last, "done": done})


@router.get("/runs/{id}/rounds", responses=NOT_FOUND)
def rounds(request: Request, id: Id) -> Response:
    """Time and bytes: of each round, and of each site in all."""
    _run(request, id)
    found = read.timings(_db(request), id)
    return _json(found)


@router.get("/runs/{id}/privacy", responses=NOT_FOUND)
def privacy(request: Request, id: Id) -> Response:
    """What differential privacy the run gave, by site and round."""
    _run(request, id)
    return _json(read.privacy(_db(request), id))


@router.get("/runs/{id}/warnings", responses=NOT_FOUND)
def warnings(request: Request, id: Id) -> Response:
    """What somebody should know, the gravest first."""
    _run(request, id)
    return _json(views.with_words(read.warnings(_db(request), id)))


@router.get("/runs/{id}/model", responses=NOT_FOUND)
def model(request: Request, id: Id) -> Response:
    """The best and the last model with their SHA-256, and the model card as HTML, as far as the files are here."""
    row = _run(request, id)
    folder = run_folder(_db(request), row["path"])
    found: Row = {"here": folder is not None, "models": {}, "card": None}
    for which, name in models.MODELS.items():
        if path := models.file_of(folder, name):
            found["models"][which] = {"name": name, **models.model_facts(path)}
    if path := models.file_of(folder, models.CARD):
        found["card"] = models.card_html(path)
    found["report"] = models.file_of(folder, models.REPORT) is not None
    found["kept"] = read.last_facts(_db(request), id, "kept") or None
    return _json(found)


@router.get("/runs/{id}/previous", responses=NOT_FOUND)
def previous(request: Request, id: Id) -> Response:
    """The model held against the release before it, on the test sums of the sites that tested both; null without a
    registry, or where there is no other release."""
    row, folder = _run(request, id), request.app.state.registry
    found = against_release(_db(request), id, folder) if folder is not None else None
    if found and found.get("metrics"):
        found["words"] = views.metric_words(row["task"], found["metrics"])
    return _json(found)


@router.get("/runs/{id}/model/{which}/file", responses=NOT_FOUND, response_class=FileResponse)
def download(request: Request, id: Id, which: Literal["best", "last"]) -> FileResponse:
    """The model itself, as safetensors."""
    row = _run(request, id)
    path = models.file_of(run_folder(_db(request), row["path"]), models.MODELS[which])
    if path is None:
        raise HTTPException(404, "the run has no such model on this machine")
    return _attached(path, f"{FilePath(row['path']).name}-{which}.safetensors", "application/octet-stream")


@router.get("/runs/{id}/report/file", responses=NOT_FOUND, response_class=FileResponse)
def report(request: Request, id: Id) -> FileResponse:
    """The run's report, to be saved: its own script does not run under the dashboard's rules."""
    row = _run(request, id)
    path = models.file_of(run_folder(_db(request), row["path"]), models.REPORT)
    if path is None:
        raise HTTPException(404, "the run has no report on this machine")
    return _attached(path, f"{FilePath(row['path']).name}-report.html", "application/octet-stream")


def _attached(path: FilePath, name: str, kind: str) -> FileResponse:
    return FileResponse(path, media_type=kind, filename=name)


@router.post("/runs/{id}/stop", responses=NOT_FOUND | {409: {"description": "It cannot be stopped from here."}})
def stop(request: Request, id: Id) -> Response:
    """End a run of the federation that the dashboard was started with. Nothing else can be changed from here."""
    row, view = _run(request, id), _federation(request)
    folder = run_folder(_db(request), row["path"])
    if view is None or folder is None:
        raise HTTPException(409, "the dashboard was started without --federation: it stops no run")
    try:
        return _json({"stopped": view.stop(folder)})
    except UserError as error:
        raise HTTPException(409, str(error)) from None


@router.get("/federation")
def federation(request: Request) -> Response:
    """The sites over all runs, and of a provisioned federation who is connected and how long its certificate holds."""
    known: views.Sites = request.app.state.sites
    view, rows = _federation(request), []
    server = {key: value for key, value in view.look().items() if key != "runs"} if view else None
    for row in known.rows():
        job = row["settings"]
        shown = {key: value for key, value in row.items() if key != "settings"}
        shown |= {"allowed": job.get("privacy.epsilon") or None, "classes": views.class_counts(row["classes"], job)}
        rows.append(shown | {f"{key}_words": _words(row[key]) for key in ("reason", "last_reason")})
    return _json({"sites": rows, "server": server})


def _words(reason: str | None) -> str:
    return reason_words(reason) if reason else ""


@router.get("/events", include_in_schema=False)
async def events(request: Request) -> Response:
    """Server-sent events: ``hello``, ``change`` {runs, total}, ``federation``."""
    watcher: Watcher = request.app.state.watcher
    if watcher.full:
        raise HTTPException(429, "too many pages are open")
    return StreamingResponse(watcher.stream(), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})

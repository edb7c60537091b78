"""Play a whole federation on this machine, and the baselines it must be held against."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch
from flwr.app import Context, RecordDict

from server.app import app as server_app
from server.database.engine import open_database
from server.heldout import load_heldout
from server.results import cross_site as cross_site_of
from server.results import run_scores
from server.rounds import Run, RunFailed, train_reference
from server.store import Event, fresh_folder, listening, write_json
from shared import __version__
from shared.config import Job, Scalar, job_from_flat, load_job
from shared.errors import UserError
from shared.settings_federation import nothing_shared
from shared.tasks import load_task
from shared.weights import REFERENCE
from simulations.baselines import POOLED, baselines_of
from simulations.devices import cores, places
from simulations.engine import RUN_ID, LocalGrid, grid_of
from simulations.pool import WorkerPool
from simulations.ready import ready_job
from simulations.result import Result
from simulations.sites import find_sites, node_of, require_folder

if TYPE_CHECKING:  # Ray takes a second to import, and few need it
    from simulations.ray_pool import RayPool

Observer = Callable[[str, Event], None]  # hears (name of the run, event)
FEDERATED = "federated"
_GRACE = 30.0  # seconds a federation has to notice that its workers are gone


class Options(TypedDict, total=False):
    """What a person may say of how a simulation is run, by the names of ``run``'s arguments."""

    workers: int | None
    baselines: bool
    cross_site: bool
    heldout: str | Path | None
    store: str
    devices: str
    per_device: int | None
    engine: str
    address: str


def run(
    job: Job | str | Path,
    data: str | Path,
    out: str | Path | None = None,
    *,
    workers: int | None = None,
    baselines: bool = False,
    cross_site: bool = False,
    heldout: str | Path | None = None,
    observe: Observer | None = None,
    store: str = "",
    devices: str = "",
    per_device: int | None = None,
    engine: str = "local",
    address: str = "",
    federated: bool = True,
    pages: bool = True,
    cache: Path | None = None,
) -> Result:
    """Simulate ``job`` on the sites found in ``data``; everything is written to ``out`` (default ``runs/NAME``).

    Args:
        job: a job, or the path of its TOML file.
        data: a folder of sites; see ``simulations.sites.find_sites`` for what is understood.
        workers: worker processes, one thread each; default one per core, of the cluster with ``engine="ray"``, or
            one per place on ``devices``. The result does not depend on it.
        baselines: also train each site alone and all sites pooled, with the same total number of gradient steps.
        cross_site: train each site alone, with the same number of steps, and test each of these models at every site.
        heldout: a site.toml of images the server holds itself.
        observe: called with every event of every run.
        store: the database that shows the run, a path or ``postgresql://…``; default consilium.sqlite beside ``out``.
        devices: where the workers compute if the job's ``train.device`` is ``auto``: ``cpu`` or ``cuda:0,cuda:1``.
        per_device: how many workers share a device.
        engine: ``local``, or ``ray`` for actors of the Ray cluster at ``address`` (``auto``: this machine's; "": Ray
            is started here). The cluster's machines must see ``data`` and ``out`` under the same paths.
        federated: False trains the baselines alone; ``result.json`` then holds these only, and there are no pages.
        pages: write the report and the model card.
        cache: where decoded images are kept, for runs that share them; default with the site. A site that has a
            site.toml of its own keeps them where that says.

    Raises:
        UserError: bad input, in one line.
        RunFailed: the quorum was lost; what there was is in ``out``.
    """
    job = job if isinstance(job, Job) else load_job(ready_job(job))
    load_task(job.task).check(job)
    if store:
        open_database(store).dispose()  # a store that was asked for by name must be there before anything is trained
    require_folder(Path(data))  # before anything is written or moved aside
    folder = run_folder(job, out)
    _fresh_folder(folder, observe)
    files = find_sites(Path(data), job, folder, cache)
    torch.set_num_threads(1)  # the parent aggregates while the workers train
    if heldout:
        load_heldout(Path(heldout), job)  # a fault of these images shows now, not after the training
    own: dict[str, Scalar] = {"run.heldout": str(Path(heldout).resolve())} if heldout else {}
    with _pool(job, workers, devices, per_device, engine, address) as pool:
        wanted = _Wanted(federated, baselines, cross_site, store, observe)
        failures, others = _play(pool, job, folder, files, own | {"run.store": store}, wanted)
    result = {"version": __version__, "job": job.flat(), "job_sha256": job.sha256, "seed": job.seed}
    result |= ({FEDERATED: run_scores(folder)} if federated else {}) | _collect(others)
    if cross_site and federated:
        result["cross_site"] = cross_site_of(result, job.best_metric)
    write_json(folder / "result.json", result)
    if federated and pages:
        _write_pages(folder, store)
    if failures:
        raise RunFailed("; ".join(failures))
    return Result(folder)


class _Wanted(NamedTuple):
    """Which models are trained, and who hears of it; see ``run``."""

    federated: bool
    baselines: bool
    cross_site: bool
    store: str
    observe: Observer | None


def _play(
    pool: WorkerPool | RayPool,
    job: Job,
    folder: Path,
    files: Sequence[Path],
    extra: dict[str, Scalar],
    wanted: _Wanted,
) -> tuple[list[str], dict[str, Run]]:
    """Train what is wanted, side by side; gives what failed, and the runs of the baselines."""
    nodes = [node_of(folder / "sites", file) for file in files]
    plain = nothing_shared()
    judged = job_from_flat(job.flat() | {key: plain[key] for key in (f"federation.{name}" for name in _OF_SITES)})
    jury = Run(grid_of(pool, nodes, judged, folder, 1), judged, folder / "baselines", store=None)
    alone = wanted.baselines or wanted.cross_site
    if alone and hasattr(jury.task, "reference"):
        # Trained once, here, so that the federated model and the baselines are measured by one network.
        with _heard(REFERENCE, wanted.observe):
            jury.reference = train_reference(grid_of(pool, nodes, job, folder, 0), job, folder, wanted.store)
        extra = extra | {"run.reference": str((folder / REFERENCE / "model.safetensors").resolve())}
    runs: dict[str, Callable[[], object]] = {}
    if wanted.federated:
        runs[FEDERATED] = _federated(grid_of(pool, nodes, job, folder, 0, extra))
    others: dict[str, Run] = {}
    if alone:
        # Too few sites: the federated run will say so, where there is one.
        with contextlib.suppress(*([RunFailed] if wanted.federated else [])):
            jury.survey(fresh=False)
            others = baselines_of(pool, files, jury, wanted.store, pooled=wanted.baselines)
    runs |= {name: other.run for name, other in others.items()}
    return _run_all(runs, wanted.observe, pool), others


def _pool(
    job: Job, workers: int | None, devices: str, per_device: int | None, engine: str, address: str
) -> WorkerPool | RayPool:
    if engine == "ray":
        if devices:
            raise UserError("--devices: Ray places its actors itself; --per-device says how many share a GPU")
        from simulations.ray_pool import RayPool

        # Doing a round again would spend a privacy budget twice, and masks must not be used twice.
        again = job.privacy.dp == "none" and not job.privacy.secure_aggregation
        return RayPool("client.app:app", workers, address, per_gpu=per_device, retries=int(again))
    if engine != "local" or address:
        raise UserError(f"--engine {engine}: write local or ray; --address belongs to ray")
    chosen = places(devices, per_device, workers)
    if job.privacy.dp != "none":
        import opacus  # noqa: F401 - the accountant takes two seconds to import: once here, not in every worker
    return WorkerPool("client.app:app", len(chosen) or workers or cores(), devices=chosen)


def _write_pages(folder: Path, store: str) -> None:
    from server.card import write_card
    from server.report import write_report  # not at the top: it brings Plotly, which no worker needs

    write_report(folder, store)
    write_card(folder, store)


def _collect(others: dict[str, Run]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    local = {}
    for name, other in others.items():
        if name == POOLED:
            found[POOLED] = run_scores(other.folder)
        else:
            local[name.removeprefix("only ")] = run_scores(other.folder)
    return found | ({"local": local} if others else {})


def run_folder(job: Job, out: str | Path | None) -> Path:
    """Where a simulation of the job is written to: ``out``, or a folder of the job's name."""
    return Path(out) if out else Path("runs") / (re.sub(r"[^\w.-]+", "-", job.name).strip(".-") or "job")


def _fresh_folder(folder: Path, observe: Observer | None) -> None:
    """Make the run folder an empty one; a run that is already there is moved aside and said to be, else refused."""
    aside = fresh_folder(folder, "rounds.jsonl", "a run")
    if aside and observe:
        observe(FEDERATED, {"event": "warning", "text": f"begins anew; the earlier run is kept in {aside}"})
    try:
        (folder / "rounds.jsonl").touch()
    except OSError as error:
        raise UserError(f"--out {folder}: cannot write there: {error.strerror}") from None


def _federated(grid: LocalGrid) -> Callable[[], object]:
    """The run of the unmodified ServerApp on ``grid``."""
    config = grid.run_config
    context = Context(run_id=RUN_ID, node_id=0, node_config={}, state=RecordDict(), run_config=dict(config))
    return lambda: server_app(grid, context)


# What the sites do beside plain training. Those who judge the baselines, which are whole models, do nothing of it.
_OF_SITES = ("strategy", "correction", "local", "finetune_steps")


def _run_all(runs: dict[str, Callable[[], object]], observe: Observer | None, pool: WorkerPool | RayPool) -> list[str]:
    """Run federations side by side on the pool they share; gives what failed. The first one goes first.

    If this is interrupted it closes the pool, which ends them: a thread that still computes when the program leaves
    would take it down with an abort.
    """
    failures: list[str] = []

    def one(name: str, run_: Callable[[], object]) -> None:
        try:
            with _heard(name, observe):
                run_()
        except RunFailed as failure:
            failures.append(str(failure) if name == FEDERATED else f"baseline ({name}): {failure}")
        except Exception as error:
            crashed.append(error)

    crashed: list[Exception] = []
    threads = [threading.Thread(target=one, args=item, name=item[0], daemon=True) for item in runs.items()]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():  # a plain join would not let Ctrl-C through on every platform
                thread.join(0.5)
    except BaseException:
        pool.close()
        for thread in threads:
            thread.join(_GRACE)
        raise
    if crashed:
        raise crashed[0]
    return failures


@contextlib.contextmanager
def _heard(name: str, observe: Observer | None) -> Iterator[None]:
    if observe is None:
        yield
        return
    with listening(lambda event: observe(name, event)):
        yield

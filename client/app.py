"""The Flower ClientApp: answers query, train and evaluate. Thin: the work is in ``shared`` and ``client.workspace``.

Whatever goes wrong, only a short code leaves the site; the text, which may name files or patients, goes to its log.
"""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from client.workspace import Moments, Workspace, find_sites, open_model, open_workspace, split_counts, write_log
from shared import __version__
from shared.cases import SPLITS
from shared.config import Job, job_from_flat
from shared.errors import SiteRefusal, UserError
from shared.imaging.errors import explained
from shared.tasks import Sums, load_task
from shared.training import pick_device
from shared.training import train as train_locally
from shared.weights import REFERENCE, exchanged, frozen_digest, put

app = ClientApp()
Answer = Callable[[Message, Context, Job, Workspace], RecordDict]


def _answer(message: Message, context: Context, answer: Answer) -> Message:
    """Run ``answer``; turn any failure into a coded status, its text into the site's log."""
    started = time.monotonic()
    name, code = "", ""
    content = RecordDict()
    try:
        job = _job(message, context)
        workspace = open_workspace(context.node_config, context.run_config, job)
        name = workspace.name
        content = answer(message, context, job, workspace)
        write_log(
            workspace.home,
            f"{message.metadata.message_type} round {_round(message)}: done in {time.monotonic() - started:.2f} s",
        )
    except SiteRefusal as refusal:
        code = refusal.code
        _log_failure(context, f"declined ({code}): {refusal}")
    except UserError as error:
        code = "bad-configuration"
        _log_failure(context, f"declined ({code}): {error}")
    except Exception:
        code = "internal-error"
        _log_failure(context, f"failed ({code})\n{traceback.format_exc()}")
    content["status"] = ConfigRecord(
        {"site": name or _name(context), "ok": not code, "code": code, "version": __version__}
    )
    return Message(content, reply_to=message)


def _job(message: Message, context: Context) -> Job:
    """The run's job, or the one whose model is the reference that the run's is measured by."""
    job = job_from_flat(context.run_config)
    if not message.content["config"].get("reference", False):
        return job
    reference: Job = load_task(job.task).reference(job)
    return reference


def _round(message: Message) -> int:
    return int(message.content["config"].get("round", 0))  # type: ignore[arg-type]


def _name(context: Context) -> str:
    try:
        return find_sites(context.node_config, context.run_config)[0]
    except Exception:
        return ""


def _log_failure(context: Context, text: str) -> None:
    with contextlib.suppress(Exception):  # a site that cannot even write its log must still answer
        write_log(find_sites(context.node_config, context.run_config)[1], text)


@app.query()
def query(message: Message, context: Context) -> Message:
    """Who is there and with what: counts per split and class, versions, a digest of what does not travel."""
    return _answer(message, context, _query)


def _query(message: Message, context: Context, job: Job, workspace: Workspace) -> RecordDict:
    if message.content["config"].get("fresh", True):
        Moments(workspace.home, context.run_id, job).forget(after=_round(message))
    for skip in workspace.data.skipped:
        write_log(workspace.home, f"left out, cannot be read: {explained(skip.path, skip.code, skip.detail)}")
    counts = split_counts(workspace.data, SPLITS)
    metrics: dict[str, int | list[int]] = {f"images-{split}": number for split, number in counts.items()}
    metrics["skipped"] = len(workspace.data.skipped)
    metrics["classes"] = load_task(job.task).count_classes(workspace.data.subset("train"), job)
    job_sha = ConfigRecord({"job": job.sha256, "frozen": frozen_digest(open_model(job), job)})
    return RecordDict({"metrics": MetricRecord(metrics), "facts": job_sha})  # type: ignore[arg-type]


@app.train()
def train(message: Message, context: Context) -> Message:
    """Some gradient steps from the global weights on the site's training images."""
    return _answer(message, context, _train)


def _train(message: Message, context: Context, job: Job, workspace: Workspace) -> RecordDict:
    config = message.content["config"]
    round_ = _round(message)
    model = open_model(job)
    put(model, message.content.array_records["arrays"].to_torch_state_dict(), job)
    data = workspace.data.subset("train")
    moments = Moments(workspace.home, context.run_id, job)
    trained = train_locally(
        model,
        load_task(job.task),
        data,
        job,
        site=workspace.name,
        first_step=(round_ - 1) * job.train.local_steps,
        steps=job.train.local_steps,
        class_weights=list(config["class-weights"]),  # type: ignore[arg-type]
        moments=moments.load(round_) if job.train.keep_optimizer else None,
    )
    if job.train.keep_optimizer:
        moments.save(round_, trained.moments)
    metrics: Sums = {"num-examples": len(data), "steps": trained.steps, "images": trained.images, "loss": trained.loss}
    if len(trained.losses) > 1:
        metrics["losses"] = list(trained.losses)  # of each part of the model
    return RecordDict({"arrays": ArrayRecord(exchanged(model, job)), "metrics": MetricRecord(metrics)})


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """The sums of the global model on one split of the site's images."""
    return _answer(message, context, _evaluate)


def _evaluate(message: Message, context: Context, job: Job, workspace: Workspace) -> RecordDict:
    model = open_model(job)
    device = pick_device(job)
    put(model, message.content.array_records["arrays"].to_torch_state_dict(), job)
    if REFERENCE in message.content.array_records:
        reference = message.content.array_records[REFERENCE].to_torch_state_dict()
        model.get_submodule(REFERENCE).load_state_dict(reference)
    data = workspace.data.subset(str(message.content["config"]["split"]))
    sums = load_task(job.task).collect(model.to(device), data, job, device)
    return RecordDict({"metrics": MetricRecord(sums)})

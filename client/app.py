"""The Flower ClientApp: answers query, train and evaluate. Thin: the work is in ``shared`` and ``client.workspace``.

Whatever goes wrong, only a short code leaves the site; the text, which may name files or patients, goes to its log.
"""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

from flwr.app import ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from client import lazy, secure
from client.corrections import SiteCorrection
from client.counts import require_cells, rows_of, survey_counts, training_figures
from client.egress import kind_of, records, release
from client.egress_base import Asked, Refused
from client.egress_log import ASKED
from client.local_round import train_round
from client.memory import Memory
from client.personal import own_model, put_home, take_home, train_beside
from client.private_round import train_on_budget
from client.subgroups import told_groups
from client.survey import statistics
from client.wire import opened, packed
from client.workspace import (
    Workspace,
    find_sites,
    look_again,
    measured,
    open_model,
    open_workspace,
    run_name,
    write_log,
)
from shared.config import Job, Scalar, job_from_flat
from shared.corrections import Correction
from shared.errors import SiteRefusal, UserError
from shared.imaging.dataset import Dataset
from shared.imaging.errors import explained
from shared.norms import is_private
from shared.packing import pack, unpack
from shared.subgroups import group_sums
from shared.tasks import load_task
from shared.training import Trained, pick_device
from shared.weights import exchanged, frozen_digest, keeps_own, put

Answer = Callable[[Message, Context, Job, Workspace], RecordDict]


def as_asked(message: Message, context: Context, answer: Callable[[Message, Context], Message]) -> Message:
    """Who asks with packed arrays gets packed ones: what passes the gate below is plain either way."""
    try:
        message.content, packed = unpack(message.content)
    except ValueError as error:
        return decline(message, context, SiteRefusal("bad-configuration", f"the message is not in order: {error}"))
    reply = answer(message, context)
    if packed and reply.has_content():
        reply.content = pack(reply.content)
    return reply


app = ClientApp(mods=[as_asked])


def _answer(message: Message, context: Context, answer: Answer, kind: str = "") -> Message:
    """Run ``answer``; turn any failure into a coded status, its text into the site's log.

    What leaves is what ``client.egress`` lets out of a reply of this ``kind``, by default the message's type.
    """
    started = time.monotonic()
    content, asked, code = RecordDict(), None, ""
    kind = kind or message.metadata.message_type
    _log(context, f"came: {_request(kind, message, context)}")
    try:
        job = _job(message, context)
        if message.metadata.message_type == MessageType.QUERY:
            look_again(context.node_config, context.run_config)
        kind = kind_of(kind, job)
        workspace = open_workspace(context.node_config, context.run_config, job)
        whole = opened(message, context, job, workspace)
        asked = Asked(job, workspace, whole.content)
        content = answer(whole, context, job, workspace)
        _log(context, f"done in {time.monotonic() - started:.2f} s")
    except SiteRefusal as refusal:
        code = refusal.code
        _log(context, f"declined ({code}): {refusal}")
    except UserError as error:
        code = "bad-configuration"
        _log(context, f"declined ({code}): {error}")
    except Refused as refusal:
        code = "egress-refused"
        _log(context, f"nothing leaves ({code}): {refusal}")
    except Exception:
        code = "internal-error"
        _log(context, f"failed ({code})\n{traceback.format_exc()}")
    content = RecordDict() if code else content
    return Message(release(kind, content, code, message, context, asked, time.monotonic() - started), reply_to=message)


def decline(message: Message, context: Context, refusal: SiteRefusal) -> Message:
    """The reply of a site that does not come to running anything."""
    _log(context, f"came: {_request(message.metadata.message_type, message, context)}")
    _log(context, f"declined ({refusal.code}): {refusal}")
    content = release(message.metadata.message_type, RecordDict(), refusal.code, message, context, None)
    return Message(content, reply_to=message)


def _job(message: Message, context: Context) -> Job:
    """The run's job, or the one whose model is the reference that the run's is measured by."""
    job = _checked_job(tuple((key, type(value), value) for key, value in context.run_config.items()))
    if not message.content["config"].get("reference", False):
        return job
    reference: Job = load_task(job.task).reference(job)
    return reference


@lru_cache(maxsize=4)
def _checked_job(settings: tuple[tuple[str, type, Scalar], ...]) -> Job:
    """The settings of the run are the same in every message: checked at the first. With types, since True == 1."""
    return job_from_flat({key: value for key, _, value in settings})


def _round(message: Message) -> int:
    return int(message.content["config"].get("round", 0))  # type: ignore[arg-type]


def _request(kind: str, message: Message, context: Context) -> str:
    """What the server asks for, in words, for the site's own log."""
    config = message.content.config_records.get("config", ConfigRecord())
    name = "".join(letter for letter in str(context.run_config.get("name", "")) if letter.isprintable())
    round_ = config.get("round", 0)
    return f"run {context.run_id}, job {name[:64]}, round {round_!r}: {ASKED.get(kind, kind)}"


def _log(context: Context, text: str) -> None:
    with contextlib.suppress(Exception):  # a site that cannot even write its log must still answer
        write_log(find_sites(context.node_config, context.run_config)[1], text)


@app.query()
def query(message: Message, context: Context) -> Message:
    """Who is there and with what: counts per split and class, versions, a digest of what does not travel."""
    if message.content.config_records.get("config", ConfigRecord()).get("survey", False):
        return _answer(message, context, _survey, "query.survey")
    return _answer(message, context, _query)


def _query(message: Message, context: Context, job: Job, workspace: Workspace) -> RecordDict:
    if message.content["config"].get("fresh", True):
        Memory(workspace.home, run_name(context), job).forget(after=_round(message))
    for skip in workspace.data.skipped:
        write_log(workspace.home, f"left out, cannot be read: {explained(skip.path, skip.code, skip.detail)}")
    metrics = survey_counts(workspace.told, len(workspace.data.skipped))
    job_sha = ConfigRecord({"job": job.sha256, "frozen": frozen_digest(open_model(job), job)})
    return RecordDict({"metrics": MetricRecord(metrics), "facts": job_sha})


def _survey(message: Message, context: Context, job: Job, workspace: Workspace) -> RecordDict:
    return RecordDict({"metrics": MetricRecord(statistics(workspace, job))})


@app.train()
def train(message: Message, context: Context) -> Message:
    """Some gradient steps from the global weights on the site's training images."""
    return _answer(message, context, _train_plain)


def _train_plain(message: Message, context: Context, job: Job, workspace: Workspace) -> RecordDict:
    if job.privacy.secure_aggregation:
        raise SiteRefusal("secure-aggregation-required", "asked for its model in plain, which the job does not do")
    return packed(_train(message, context, job, workspace), message, context, job, workspace)


# Secure aggregation: the same training, but the model leaves masked.
app.train("keys")(lambda message, context: _answer(message, context, secure.keys))
app.train("shares")(lambda message, context: _answer(message, context, secure.shares))
app.train("masked")(lambda message, context: _answer(message, context, secure.masked(_train_in_plain_form)))
app.train("unmask")(lambda message, context: _answer(message, context, secure.unmask))


def _train_in_plain_form(message: Message, context: Context, job: Job, workspace: Workspace) -> RecordDict:
    """The model after a round as the gate would let it out in plain: of what is masked the gate sees nothing later."""
    reply = _train(message, context, job, workspace)
    return records(kind_of("train", job), reply, Asked(job, workspace, message.content))


def _train(message: Message, context: Context, job: Job, workspace: Workspace) -> RecordDict:
    """The model after a round and its figures."""
    config, round_ = message.content["config"], _round(message)
    model, common = open_model(job), message.content.array_records["arrays"].to_torch_state_dict()
    memory = Memory(workspace.home, run_name(context), job)
    put(model, common, job)
    put_home(model, job, memory, round_)
    correction = SiteCorrection(model, job, message, memory, workspace.name)
    weights: list[float] = list(config["class-weights"])  # type: ignore[arg-type]
    held = memory.load("moments", round_) if job.train.keep_optimizer else None
    began = time.monotonic()
    trained, epsilon = _steps(model, job, workspace, message, context, weights, held, correction.term)
    facts = (trained.steps, trained.images, trained.losses, epsilon, time.monotonic() - began)
    metrics = training_figures(workspace.told["train"], job, *facts)
    kept, beside = correction.after()
    if job.train.keep_optimizer:
        kept["moments"] = trained.moments
    reply = RecordDict({"arrays": lazy.record_of(exchanged(model, job)), "metrics": MetricRecord(metrics)})
    for name, arrays in beside.items():
        reply[name] = lazy.record_of(arrays)
    kept |= take_home(model, job)
    kept |= train_beside(model, job, workspace, memory, common, round_, weights)
    if kept:
        best = int(config.get("best", 0))  # type: ignore[arg-type]
        needed = {"control": correction.heard, "home": best, "personal": best}
        memory.save(round_, kept, [number for kind, number in needed.items() if kind in kept])
    return reply


def _steps(
    model: nn.Module,
    job: Job,
    workspace: Workspace,
    message: Message,
    context: Context,
    weights: list[float],
    moments: dict[str, Tensor] | None,
    correction: Correction | None,
) -> tuple[Trained, float | None]:
    """A round's gradient steps, and under DP the epsilon that was ever spent."""
    round_ = _round(message)
    if is_private(job):
        return train_on_budget(
            model,
            job,
            workspace,
            f"{job.name[:12]}-{job.sha256[:6]}-{run_name(context)}",
            round_,
            weights,
            examples=float(message.content["config"].get("examples", 0.0)),  # type: ignore[arg-type]
            moments=moments,
            correction=correction,
        )
    return train_round(model, job, workspace, round_, weights, moments, correction), None


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """The sums of the global model on one split of the site's images."""
    return _answer(message, context, _evaluate)


def _evaluate(message: Message, context: Context, job: Job, workspace: Workspace) -> RecordDict:
    model, data = _tested(message, context, job, workspace)
    return _sums(model, data, job)


def _tested(message: Message, context: Context, job: Job, workspace: Workspace) -> tuple[nn.Module, Dataset]:
    """The global model, completed by what of it stays at the site, and the images of the split, where figures over them
    may leave."""
    split = str(message.content["config"]["split"])
    require_cells(workspace.told, split)
    model = open_model(job)
    put(model, message.content.array_records["arrays"].to_torch_state_dict(), job)
    put_home(model, job, Memory(workspace.home, run_name(context), job), _round(message) + 1)
    return measured(model, message, job), workspace.data.subset(split)


def _sums(model: nn.Module, data: Dataset, job: Job) -> RecordDict:
    if is_private(job):
        data = replace(data, origin=data)  # no figure is to look at the training images beside the noise
    sums = load_task(job.task).collect(model, data, job, pick_device(job))
    return RecordDict({"metrics": MetricRecord(sums)})


@app.evaluate("personal")
def evaluate_personal(message: Message, context: Context) -> Message:
    """The sums of the site's own model on one split of its images, after it was made and saved here."""
    return _answer(message, context, _personal)


def _personal(message: Message, context: Context, job: Job, workspace: Workspace) -> RecordDict:
    if not keeps_own(job):
        raise SiteRefusal("wrong-stage", "asked for a model of its own, which the job does not make")
    model, split = open_model(job), str(message.content["config"]["split"])
    own_model(model, job, workspace, message, context)
    require_cells(workspace.told, split)
    return _sums(measured(model, message, job), workspace.data.subset(split), job)


@app.evaluate("subgroups")
def evaluate_subgroups(message: Message, context: Context) -> Message:
    """The sums of the global model on the test images of each of the job's groups that the site's rules name."""
    return _answer(message, context, _evaluate_subgroups, "evaluate.subgroups")


def _evaluate_subgroups(message: Message, context: Context, job: Job, workspace: Workspace) -> RecordDict:
    if message.content["config"]["split"] != "test":
        raise SiteRefusal("split-forbidden", "groups of patients are told of the test images alone")
    model, data = _tested(message, context, job, workspace)
    task, device = load_task(job.task), pick_device(job)
    groups = told_groups(workspace, job, "test")
    sums = {name: task.collect(model, rows_of(data, rows), job, device) for name, rows in groups.items()}
    return RecordDict({"metrics": MetricRecord(group_sums(sums))})

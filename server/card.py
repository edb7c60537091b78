"""model_card.md of a run, by the conventions of Mitchell et al. (2019) and of Hugging Face's model cards.

Every sentence is made of facts that lie in the run's folder. Where a section asks for what no run tells (a licence, the
use that is meant), the card says that it is not told: a person fills that in, and answers for it.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

from server.card_fair import operating, subgroups
from server.markdown import listed, plain, table
from server.record import Record, count, has, lost_replies, read_record, reason_words, spans, value_of
from server.wording import metric_name, number, privacy_words, with_interval
from shared import __version__
from shared.files import write_text
from shared.strategies import in_words
from shared.tasks import TASKS

CARD = "model_card.md"
AUDIT = "audit-*.json"  # written by `consilium audit`, one a site, if the site's policy allows it
MODELS = {"best": "model.safetensors", "last": "last.safetensors"}
# The names of Hugging Face's tasks that fit; the others have none.
_PIPELINES = {
    "classification": "image-classification",
    "segmentation": "image-segmentation",
    "detection": "object-detection",
    "generation": "unconditional-image-generation",
}
_TO_FILL = "_The run does not say. Whoever releases the model writes it here._"


def write_card(folder: Path, store: str = "") -> Path:
    """Write ``folder``/model_card.md from the run's store and its folder; gives its path."""
    write_text(folder / CARD, model_card(folder, store))
    return folder / CARD


def model_card(folder: Path, store: str = "") -> str:
    """The card of a run as Markdown; the same folder gives the same card."""
    record = read_record(folder, store)
    sections = {
        "Model details": _details(record),
        "Intended use": _use(record),
        "Training data": _data(record),
        "Training procedure": _training(record),
        "Evaluation": _evaluation(record),
        "Privacy": _privacy(record),
        "Limits": _limits(record),
        "Hashes and versions": _hashes(record),
    }
    body = "\n\n".join(f"## {title}\n\n{text.strip()}" for title, text in sections.items())
    return f"{_front(record)}\n# {plain(record.job.name)}\n\n{_lead(record)}\n\n{body}\n"


# --- pieces -----------------------------------------------------------------------------------------------------------


def _quoted(value: object) -> str:
    """A scalar in YAML: JSON is YAML."""
    return json.dumps(str(value), ensure_ascii=False)


def _front(record: Record) -> str:
    """The YAML that Hugging Face reads; it holds no figure that is not in the card."""
    job = record.job
    lines = ["---", "library_name: consilium", f"model_name: {_quoted(job.name)}"]
    if job.task in _PIPELINES:
        lines.append(f"pipeline_tag: {_PIPELINES[job.task]}")
    tags = ["federated-learning", "medical-imaging", job.task, job.model.name]
    tags += ["differential-privacy"] if job.privacy.dp != "none" else []
    lines += ["tags:", *(f"- {_quoted(tag)}" for tag in tags)]
    own = record.scores["federated"]
    found = [name for name in record.metrics() if has(own, name)]
    if found:
        lines += ["metrics:", *(f"- {_quoted(name)}" for name in found)]
    return "\n".join([*lines, "---"]) + "\n"


def _trained_sites(record: Record) -> list[str]:
    return sorted({str(row["site"]) for event in record.rounds.values() for row in event["trained"]})


def _lead(record: Record) -> str:
    job, trained = record.job, _trained_sites(record)
    what = f"A `{job.model.name}` for {job.task}: {TASKS[job.task].about}."
    if not trained:
        return f"{what} No site has trained it."
    return (
        f"{what} Trained by {count(len(trained), 'site')} with federated learning: the {record.case}s stayed where "
        "they were, weights and sums travelled."
    )


# --- sections ---------------------------------------------------------------------------------------------------------


def _details(record: Record) -> str:
    job, own = record.job, record.scores["federated"]
    started = next((event for event in record.events if event["event"] == "start"), None)
    size = f"{job.data.size} × {job.data.size} pixels, {count(job.data.channels, 'channel')}"
    weights = plain(Path(job.model.weights).name) if job.model.weights else "none: trained from random weights"
    rows = [
        ("Network", f"`{job.model.name}`"),
        ("Task", f"{job.task}: {TASKS[job.task].about}"),
        ("Classes, in the order of the outputs", ", ".join(plain(name) for name in job.classes)),
        ("Input", size if job.task != "sequence" else f"{size}; of signals: {count(job.data.channels, 'lead')}"),
        ("Weights it started from", weights + (", backbone frozen" if job.model.freeze != "none" else "")),
        ("Round kept", str(own.get("best_round", "not told: there was no test"))),
        ("Trained", _day(started["time"]) if started else "not told"),
        ("Made with", f"Consilium {plain(started['version'])}" if started and "version" in started else "not told"),
        ("Developed by", "not told by the run"),
        ("Licence", "not told by the run"),
    ]
    if job.modalities or job.tabular:
        rows.insert(4, ("A case has", ", ".join(plain(name) for name in (*job.modalities, *job.tabular))))
    return table(["", ""], rows)


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(seconds))


def _use(record: Record) -> str:
    job = record.job
    names = ", ".join(plain(name) for name in job.classes)
    told = f"**What it does.** {TASKS[job.task].about.capitalize()}; the classes it knows: {names}. "
    told += "An image of anything else is answered with one of these all the same." if job.task in (
        "classification", "sequence", "segmentation"
    ) and not job.data.multilabel else ""  # fmt: skip
    limits = (
        "**What it was not shown to be fit for.** No run of Consilium is a clinical study. Nothing in this run shows "
        "that the model helps a patient or a reader, and no authority's clearance is recorded in it."
    )
    return f"{told.strip()}\n\n**What it is meant for.** {_TO_FILL}\n\n{limits}"


def _data(record: Record) -> str:
    there = record.survey["sites"]
    if not there:
        return "No site has named its data."
    job, trained = record.job, set(_trained_sites(record))
    named = [*job.classes, *job.labels][: min(len(site["classes"]) for site in there)]
    counted = TASKS[job.task].counted

    def row(site: dict[str, Any]) -> list[str]:
        cases = [f"{site['images'][split]:,}" for split in ("train", "val", "test")]
        classes = [f"{n:,}" if any(site["classes"]) else "not told" for n in site["classes"][: len(named)]]
        return [
            plain(site["name"]),
            *cases,
            *classes,
            f"{site['skipped']:,}",
            "yes" if site["name"] in trained else "no",
        ]

    head = ["Site", "Training", "Validation", "Test", *(f"{plain(name)} ({counted})" for name in named)]
    text = table([*head, "Unreadable", "Trained"], map(row, there))
    text += (
        f"\n\nNumbers of {record.case}s as each site told them: a site may keep its count back and declare another, "
        "and classes with few cases may be told as 0. Class counts are of the training split."
    )
    lost = [item for item in lost_replies(record.events) if item.step == "survey"]
    if lost:
        text += (
            "\n\nNot in the run: " + "; ".join(f"{plain(one.site)} ({reason_words(one.reason)})" for one in lost) + "."
        )
    return text + f"\n\nWho the patients are, and how {record.case}s and labels were made: {_TO_FILL}"


def _training(record: Record) -> str:
    job, own = record.job, record.scores["federated"]
    train = job.train
    each = count(train.local_steps, "gradient step")
    precision = "bfloat16 where a site's device computes in it" if train.precision == "bfloat16" else train.precision
    if train.local_epochs:
        each = f"{train.local_epochs:g} times over its own images"
    lines = [
        f"{in_words(job.federation)} over {count(len(record.rounds), 'round')} of {job.federation.rounds:,} asked for, "
        f"{each} at each site a round, weighted by {job.federation.weighting}.",
        f"{own['gradient_steps']:,} gradient steps of {train.batch_size} {record.case}s in all; {train.optimizer}, "
        f"learning rate {train.learning_rate:g} ({train.schedule}), weight decay {train.weight_decay:g}, "
        f"{precision}, seed {job.seed}.",
        f"Images: normalised by `{job.data.normalise}`, harmonised by `{job.data.harmonise}`.",
    ]
    changed = {
        key: value for key, value in job.flat().items() if key.startswith("augment.") and value not in (0.0, "none")
    }
    lines.append(
        "Random changes: " + ", ".join(f"{key.partition('.')[2]} {value}" for key, value in changed.items()) + "."
        if changed
        else "No random changes of the training images."
    )
    best = own.get("best")
    rule = f" ({best['rule']})" if best else ""
    lines.append(f"The round kept is the one best in validation by {metric_name(record.metric)}{rule}.")
    lost = [item for item in lost_replies(record.events) if item.step == "round"]
    lines += [
        f"{plain(one.site)} did not count in round {spans(one.rounds)}: {reason_words(one.reason)}."
        for one in lost[:20]
    ]
    if len(lost) > 20:
        lines.append(f"… and {len(lost) - 20} more such notes, in rounds.jsonl.")
    if any(event["event"] == "failed" for event in record.events):
        lines.append("**The run failed** before its end.")
    elif not any(event["event"] == "finish" for event in record.events):
        lines.append("**The run has not come to its end.**" if record.events else "**The run's journal is not there.**")
    return listed(lines)


def _evaluation(record: Record) -> str:
    own = record.scores["federated"]
    if record.test is None or "images" not in own:
        return "There is no test figure: the run ended before its final evaluation."
    metrics, places = record.metrics(), dict(own.get("sites", {}))
    if "server" in own:
        places["the server's own images"] = own["server"]

    def line(name: str, scores: dict[str, Any]) -> list[str]:
        return [name, f"{scores['images']:,}", *(value_of(scores, metric) for metric in metrics)]

    whose = record.whose("test")
    head = ["", f"Test {record.case}s", *(_head(record, metric) for metric in metrics)]
    rows = [
        line(plain(whose[0].upper() + whose[1:]), own),
        *(line(plain(name), scores) for name, scores in places.items()),
    ]
    text = table(head, rows) + "\n\nBrackets hold 95 % intervals; a dash: no figure, as where a class has no case."
    parts = record.metrics(parts=True)
    if parts:
        text += f"\n\nBy class, over {whose}:\n\n" + table(
            ["Metric", "Value"], [[plain(metric_name(metric, True)), value_of(own, metric)] for metric in parts]
        )
    others = [(name, scores) for name, scores in record.models.items() if scores is not own and "images" in scores]
    if others:
        text += f"\n\nOther models on the same test {record.case}s:\n\n"
        text += table(
            ["Model", _head(record, record.metric)], [[plain(n), value_of(s, record.metric)] for n, s in others]
        )
    text += _calibration(own["calibration"]) if own.get("calibration") else ""
    return text + operating(own) + subgroups(record)


def _head(record: Record, metric: str) -> str:
    return plain(metric_name(metric, True)) + (" (less is better)" if record.direction(metric) < 0 else "")


def _calibration(found: dict[str, dict[str, Any]]) -> str:
    """How far the probabilities are those of being right, by class."""

    def line(name: str, row: dict[str, Any]) -> list[str]:
        (error, brier) = (with_interval(*row[key][:3]) for key in ("calibration_error", "brier"))
        return [plain(name), error, brier, f"{row['n']:,}"]

    rows = [line(name, row) for name, row in found.items()]
    return "\n\nProbabilities (0 is best in both):\n\n" + table(
        ["Class", "Expected calibration error", "Brier score", "n"], rows
    )


def _privacy(record: Record) -> str:
    spent = record.scores["federated"].get("privacy", {})
    lines = [f"The {record.case}s never left the sites; weights of the model and sums did."]
    secure = any("secure" in event for event in record.rounds.values())
    lines.append(
        "Secure aggregation: the server saw the sum of the sites' models only."
        if secure
        else "No secure aggregation: the server saw each site's model."
    )
    if spent:
        lines.append(privacy_words(spent))
        sites = spent.get("sites", {})
        lines += [f"{plain(name)}: epsilon {value:.3g} at delta {spent['delta']:g}." for name, value in sites.items()]
    else:
        lines.append("No differential privacy: nothing bounds what the weights tell of a single training case.")
    return listed(lines) + "\n\n" + _audit(record)


def _audit(record: Record) -> str:
    """What the sites' own audits found, where they let it be told."""
    files = sorted(record.folder.glob(AUDIT))
    if not files:
        return "Attacks on the model (`consilium audit`): no site has given figures for this card."
    return "\n\n".join(_audited(record, file) for file in files)


def _audited(record: Record, file: Path) -> str:
    name = plain(file.name)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        rows = [
            [plain(row["attack"]), plain(row["model"]), _estimate(row["auc"]), _estimate(row["tpr_at_1_percent_fpr"])]
            for row in found["membership"]
        ]
        own = found["job_sha256"] == record.job.sha256
        site, round_ = plain(found["site"]), found["round"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"Attacks on the model: {name} in the run's folder cannot be read, its figures are left out."
    if not own:
        return f"Attacks on the model: {name} in the run's folder is of another job, its figures are left out."
    text = f"Attacks on the model of round {round_} by {site}, which lets this be told (guessing: AUC .500, TPR .010):"
    if not rows:
        return f"{text} none that tell who was trained on."
    return f"{text}\n\n" + table(["Attack", "Model", "AUC", "TPR at 1 % FPR"], rows)


def _estimate(found: dict[str, float]) -> str:
    value = number(found["value"])
    return f"{value} [{number(found['low'])}, {number(found['high'])}]" if "low" in found else value


def _limits(record: Record) -> str:
    own, there = record.scores["federated"], record.survey["sites"]
    lines = [str(plain(event["text"])) for event in record.events if event["event"] == "warning"]
    if record.test is not None and "images" in own:
        missing = [plain(site["name"]) for site in there if site["name"] not in own.get("sites", {})]
        tested, trained = own.get("sites", {}), _trained_sites(record)
        both = len(set(tested) & set(trained))
        lines.append(
            f"Tested on {count(own['images'], record.case)} of {count(len(tested), 'site')}, {both} of which trained "
            "it: how it does at other hospitals is not known."
        )
        lines += [f"No test figure of {', '.join(missing)}."] if missing else []
    else:
        lines.append("Untested.")
    few = [plain(site["name"]) for site in there if 0 < site["images"]["train"] < 50]
    lines += [f"Fewer than 50 training {record.case}s at {', '.join(few)}."] if few else []
    if skipped := sum(site["skipped"] for site in there):
        lines.append(
            f"{count(skipped, record.case)} could not be read and {'was' if skipped == 1 else 'were'} left out."
        )
    if not own.get("subgroups", {}).get("groups"):
        lines.append("Whether it does equally well for all groups of patients was not measured in this run.")
    return listed(lines)


def _hashes(record: Record) -> str:
    rows = [["Job (SHA-256 of its settings)", f"`{record.job.sha256}`"]]
    for kind, name in MODELS.items():
        path = record.folder / name
        if path.is_file():
            rows.append([f"{name} ({kind} round, SHA-256)", f"`{hashlib.sha256(path.read_bytes()).hexdigest()}`"])
    started = next((event for event in record.events if event["event"] == "start"), {})
    rows.append(["Consilium, run", plain(started.get("version", "not told"))])
    rows.append(["Consilium, this card", __version__])
    return table(["", ""], rows)

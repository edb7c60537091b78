"""report.html: a run on one page that needs nothing but a browser, and no network."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from pathlib import Path
from string import Template

from plotly.io.json import to_json_plotly
from plotly.offline import get_plotlyjs

from server.figures import all_figures
from server.record import (
    Lost,
    Record,
    count,
    has,
    lost_replies,
    read_record,
    reason_words,
    spans,
    value_of,
)  # fmt: skip
from server.report_fair import fairness, matrix, operating, times
from server.report_parts import Markup, bullets, esc, folded, paragraph
from server.report_style import PAGE, SCRIPT, STYLE, THEMES
from server.report_tables import data, further, job, results, sites, versions
from server.store import Event
from server.wording import metric_name, privacy_words
from shared.files import write_text
from shared.tasks import load_task

HEADINGS = {
    "metric by round": "Validation, round by round",
    "metric by site": "Validation at each site",
    "test figures": "Test: models and sites",
    "classes": "Test: class by class",
    "confusion matrix": "What was taken for what",
    "ROC": "Sensitivity against false alarms",
    "calibration": "Do probabilities mean what they say?",
    "confusion matrix, whole image": "Whole images: what was taken for what",
    "ROC, whole image": "Whole images: sensitivity against false alarms",
    "calibration, whole image": "Whole images: do probabilities mean what they say?",
    "precision and recall": "Precision against recall",
    "FROC": "Boxes found against false ones",
    "nearest training": "Are training images copied?",
    "anomaly scores": "Anomaly scores",
    "anomaly ROC": "Anomalies: sensitivity against false alarms",
    "training loss": "Training loss",
    "participation": "Who took part in which round",
}
# These fit beside each other, two by two, on a wide screen.
_NARROW = ("confusion", "ROC", "calibration", "precision", "FROC", "anomaly", "nearest")
HALF = {name for name in HEADINGS if name.startswith(_NARROW)}
FOLD = 12  # more small warnings than this are summed up and folded away
STEPS = {
    "survey": "is not in the run",
    "round": "did not count in training",
    "val": "is missing from the validation",
    "test": "did not answer the test",
    "subgroups": "did not tell of groups of patients",
    "personal": "did not tell how its own model does",
}


def write_report(folder: Path, store: str = "") -> Path:
    """Write ``folder/report.html`` from the run's store and its folder; returns its path."""
    record = read_record(folder, store)
    figures = all_figures(folder, store)
    drawn = {f"figure-{place}": figure.to_plotly_json() for place, figure in enumerate(figures.values())}
    for figure in drawn.values():
        figure["layout"].pop("template")  # the page chooses it by its colour scheme
    content = to_json_plotly({"figures": drawn, "themes": THEMES})
    page = Template(PAGE).substitute(
        title=esc(record.job.name),
        head=_head(record),
        warnings=_warnings(record),
        results=results(record) + further(record) + operating(record),
        sites=sites(record) + fairness(record) + matrix(record),
        figures="".join(_figure(k, name, figure.layout.meta) for k, (name, figure) in enumerate(figures.items())),
        pictures=_pictures(record),
        data=data(record),
        job=job(record),
        versions=versions(record) + times(record),
        # In a script element only "<" could end it; within JSON it may be spelt out.
        json=content.replace("<", "\\u003c"),
        plotly=get_plotlyjs(),
        style=STYLE,
        script=SCRIPT,
    )
    write_text(folder / "report.html", page)
    return folder / "report.html"


def _figure(place: int, name: str, meta: dict[str, str]) -> Markup:
    heading = esc(HEADINGS.get(name, name))
    return Markup(
        f'<figure class="{"half" if name in HALF else "whole"}"><h3>{heading}</h3>\n'
        f'<div class="plot" id="figure-{place}" role="img" aria-label="{heading}. {esc(meta["alt"])}"></div>\n'
        f"<figcaption>{esc(meta['caption'])}</figcaption></figure>\n"
    )


def _pictures(record: Record) -> Markup:
    """What the model drew after the first round, midway and at its best, beside each other; in the page itself."""
    names = list(dict.fromkeys(name for shown in record.pictures for name in shown.files))
    page = ""
    for name in names:
        page += f'<h3>{esc(name.replace("_", " ").capitalize())}</h3>\n<div class="pictures">\n'
        for shown in record.pictures:
            if name in shown.files:
                source = base64.b64encode(shown.files[name].read_bytes()).decode()
                alt = esc(f"{name.replace('_', ' ')}: drawn by the {shown.when} model, of round {shown.round}")
                page += f'<figure><img alt="{alt}" src="data:image/png;base64,{source}">\n'
                page += f"<figcaption>{esc(shown.when)}: round {shown.round}</figcaption></figure>\n"
        page += "</div>\n"
    return Markup(f"<section><h2>Pictures</h2>\n{page}</section>\n" if page else "")


# ---------------------------------------------------------------------- the head and the warnings


def _head(record: Record) -> Markup:
    """Who trained what on what, and how well it does, in a few sentences."""
    trained = {row["site"] for event in record.rounds.values() for row in event["trained"]}
    images = sum(site["images"]["train"] for site in record.survey["sites"] if site["name"] in trained)
    who, how = f"{count(len(trained), 'site')} trained {record.job.model.name}", count(len(record.rounds), "round")
    text = f"{who} on {count(images, record.case)} for {how}." if trained else "No site has trained."
    if any("secure" in event for event in record.rounds.values()):
        text += " The server saw the sum of the sites’ models only (secure aggregation)."
    own, metric = record.scores["federated"], record.metric
    text += f" {privacy_words(own.get('privacy', {}))}".rstrip()
    server, there = own.get("server", {}), ""
    if has(server, metric):
        there = f" On the server’s own {count(server['images'], record.case)} the federated model reaches "
        there += f"{metric_name(metric)} {value_of(server, metric)}."
    if not has(own, metric):
        return paragraph(f"{text} There is no test figure{' of any site' if there else ''}.{there}", "lead")
    tested, able = len(own.get("sites", {})), len(record.sites)
    where = (
        f"{count(own['images'], f'test {record.case}')} of {'all' if tested == able else f'{tested} of {able}'} sites"
    )
    text += f" The federated model (round {own['best_round']}) reaches {metric_name(metric)} {value_of(own, metric)}"
    text += f" on {where}"
    local = {name: scores for name, scores in record.scores.get("local", {}).items() if has(scores, metric)}
    if local:
        best = max(local, key=lambda name: record.sign * local[name][metric])
        text += f"; the best model of a single site (only {best}) {value_of(local[best], metric)}"
    if has(record.scores.get("pooled", {}), metric):
        text += f"; a model of all data in one place {value_of(record.scores['pooled'], metric)}"
    if worst := record.worst:
        text += f". At {worst}, its worst site, the federated model reaches {value_of(own['sites'][worst], metric)}"
    less = [metric_name(name) for name in record.metrics() if record.direction(name) < 0]
    note = "Brackets hold 95 % intervals." + (f" Less is better: {', '.join(less)}." if less else "")
    return Markup(paragraph(f"{text}.{there}", "lead") + paragraph(note + _traffic(record), "note"))


def _traffic(record: Record) -> str:
    """What the rounds moved between server and sites, where the events say; of a repeated round, its last time."""
    moved = [pair for event in record.rounds.values() for pair in event.get("bytes", {}).values()]
    if not moved:
        return ""
    down, up = (sum(column) / 1e6 for column in zip(*moved, strict=True))
    codec = record.job.federation.codec
    how = "" if codec == "none" else f", as changes coded by {codec}"
    return f" To the sites went {down:,.1f} MB, and {up:,.1f} MB came back{how}."


def _warnings(record: Record) -> Markup:
    """What a reader must know before believing any number, gravest first; of very many, the small ones are folded."""
    runs = {"": record.events} | ({"Reference network: ": record.reference} if record.reference else {})
    for name, events in record.baselines.items():
        runs[f"Baseline “{'all data in one place' if name == 'pooled' else f'only {name}'}”: "] = events
    grave: list[Markup] = []
    for run, events in runs.items():
        failed = [str(event["reason"]) for event in events if event["event"] == "failed"]
        grave += [Markup(f"{esc(run)}<strong>The run failed:</strong> {esc(reason)}") for reason in failed]
        if not failed and not any(event["event"] == "finish" for event in events):
            grave.append(Markup(f"{esc(run)}<strong>The run has not come to its end.</strong>"))
        grave += [esc(f"{run}{event['text']}") for event in events if event["event"] == "warning"]
    if record.test is None:
        grave.append(Markup("<strong>There is no test result:</strong> the run ended before the final evaluation."))
    grave += _untested(record)
    told = _notices(record)
    small = [_dropped(run, lost) for run, events in runs.items() for lost in lost_replies(events)]
    small += _unreadable(record) + told
    if not grave + small:
        good = "None: every site answered every time, every image could be read, every site was tested."
        return paragraph(good, "good")
    if len(small) > FOLD:
        more = f", {count(len(told), 'notice')} of what cases lack" if told else ""
        summary = esc(f"{_sum_up(record, runs.values())}{more}: see the list below.")
        shown = bullets([*grave, summary]) + folded(f"All {len(small)} notices", bullets(small))
    else:
        shown = bullets(grave + small)
    return Markup(shown + paragraph("Each site’s own site.log says more; it does not leave the site.", "note"))


def _sum_up(record: Record, runs: Iterable[list[Event]]) -> str:
    """Very many small warnings in one line."""
    lost = [item for events in runs for event in events for item in event.get("dropped", [])]
    sites = {str(item["site"]) for item in lost}
    text = f"{count(len(lost), 'reply', 'replies')} of {count(len(sites), 'site')} could not be used"
    skipped = sum(site["skipped"] for site in record.survey["sites"])
    return text + (f", {count(skipped, 'image')} could not be read" if skipped else "")


def _unreadable(record: Record) -> list[Markup]:
    lines = []
    for site in record.survey["sites"]:
        if site["skipped"]:
            what = f"left out {count(site['skipped'], 'image')} that cannot be read"
            lines.append(Markup(f"<strong>{esc(site['name'])}</strong> {what}."))
        if not site["images"]["train"]:
            lines.append(Markup(f"<strong>{esc(site['name'])}</strong> has no training images and does not train."))
        elif not any(site["classes"]):
            why = (
                "tells no counts of classes: it has none, or keeps them back and declares its number of training images"
            )
            lines.append(Markup(f"<strong>{esc(site['name'])}</strong> {why}."))
    return lines


def _notices(record: Record) -> list[Markup]:
    """What the test cases of a site lack or what was left out of them, where the task has a word on it."""
    task = load_task(record.job.task)
    if record.test is None or not hasattr(task, "notices"):
        return []
    return [
        Markup(f"<strong>{esc(site)}</strong>, test {esc(record.case)}s: {esc(text)}.")
        for site, sums in record.test["sums"].items()
        for text in task.notices(sums, record.job)
    ]


def _untested(record: Record) -> list[Markup]:
    if record.test is None:
        return []
    lines = []
    for site in record.survey["sites"]:
        if site["name"] not in record.test["sites"]:
            cases = site["images"]["test"]
            why = (
                f"its {count(cases, f'test {record.case}')} could not be evaluated"
                if cases
                else f"it has no test {record.case}s"
            )
            lines.append(Markup(f"<strong>{esc(site['name'])} is missing from the test figures:</strong> {why}."))
    return lines


def _dropped(run: str, lost: Lost) -> Markup:
    """Replies of one site that were not used, in one step and for one reason."""
    when = ""
    if lost.step in ("round", "val"):
        rounds = "round" if len(set(lost.rounds)) == 1 else "rounds"
        when = f" in {rounds} {spans(lost.rounds)} ({count(len(lost.rounds), 'time')})"
    words = f"{STEPS.get(lost.step, lost.step)}{when}: {reason_words(lost.reason)}"
    return Markup(f"{esc(run)}<strong>{esc(lost.site)}</strong> {esc(words)}. <code>{esc(lost.reason)}</code>")

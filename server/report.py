"""report.html: a run on one page that needs nothing but a browser, and no network."""

from __future__ import annotations

import html
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template
from typing import Any

import plotly
from plotly.io.json import to_json_plotly
from plotly.offline import get_plotlyjs

from server.figures import all_figures
from server.record import (
    FEDERATED,
    ONLY,
    POOLED,
    SERVER,
    Lost,
    Record,
    count,
    has,
    lost_replies,
    metric_name,
    number,
    read_record,
    reason_words,
    spans,
    with_interval,
)  # fmt: skip
from server.report_style import PAGE, SCRIPT, STYLE, THEMES
from server.store import Event, write_text
from shared import __version__
from shared.config import knobs

HEADINGS = {
    "metric by round": "Validation, round by round",
    "metric by site": "Validation at each site",
    "test figures": "Test images: models and sites",
    "confusion matrix": "What was taken for what",
    "ROC": "Sensitivity against false alarms",
    "training loss": "Training loss",
    "participation": "Who took part in which round",
}
HALF = {"confusion matrix", "ROC"}  # these two fit beside each other on a wide screen
FOLD = 12  # more small warnings than this are summed up and folded away
STEPS = {
    "survey": "is not in the run",
    "round": "did not count in training",
    "val": "is missing from the validation",
    "test": "did not answer the test",
}
FEW = 8  # more single-site models than this are folded away, all but the best and the worst


class Markup(str):
    """Text that is HTML already. Whatever else goes into the page is escaped on its way."""


def esc(value: object) -> Markup:
    """The one gate through which text from files reaches the page."""
    return value if isinstance(value, Markup) else Markup(html.escape(str(value)))


def write_report(folder: Path) -> Path:
    """Write ``folder/report.html`` from what the run folder holds; returns its path."""
    record = read_record(folder)
    figures = all_figures(folder)
    drawn = {f"figure-{place}": figure.to_plotly_json() for place, figure in enumerate(figures.values())}
    for figure in drawn.values():
        figure["layout"].pop("template")  # the page chooses it by its colour scheme
    data = to_json_plotly({"figures": drawn, "themes": THEMES})
    page = Template(PAGE).substitute(
        title=esc(record.job.name),
        head=_head(record),
        warnings=_warnings(record),
        results=_results(record) + _by_class(record),
        sites=_sites(record),
        figures="".join(_figure(k, name, figure.layout.meta) for k, (name, figure) in enumerate(figures.items())),
        data=_data(record),
        job=_job(record),
        versions=_versions(record),
        # In a script element only "<" could end it; within JSON it may be spelt out.
        json=data.replace("<", "\\u003c"),
        plotly=get_plotlyjs(),
        style=STYLE,
        script=SCRIPT,
    )
    write_text(folder / "report.html", page)
    return folder / "report.html"


# ---------------------------------------------------------------------- small pieces


def _table(caption: str, head: Sequence[object], rows: Iterable[Sequence[object]]) -> Markup:
    """A table whose first column names its rows; on a narrow screen it scrolls sideways on its own."""
    top = "".join(f'<th scope="col">{esc(cell)}</th>' for cell in head)
    lines = ((esc(first), "".join(f"<td>{esc(cell)}</td>" for cell in rest)) for first, *rest in rows)
    body = "\n".join(f'<tr><th scope="row">{first}</th>{rest}</tr>' for first, rest in lines)
    return Markup(
        f'<div class="scroll" tabindex="0" role="region" aria-label="{esc(caption)}"><table>'
        f"<caption>{esc(caption)}</caption>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>\n"
    )


def _paragraph(text: object, kind: str) -> Markup:
    return Markup(f'<p class="{kind}">{esc(text)}</p>\n')


def _folded(title: str, content: Markup, kind: str = "") -> Markup:
    return Markup(f'<details class="{kind}"><summary>{esc(title)}</summary>\n{content}</details>\n')


def _list(items: Iterable[Markup]) -> Markup:
    lines = "\n".join(f"<li>{item}</li>" for item in items)
    return Markup(f'<ul class="warnings">\n{lines}\n</ul>\n')


def _cell(scores: dict[str, Any], metric: str) -> Markup:
    """A value with its interval, the interval in a quieter tone."""
    if not has(scores, metric):
        return Markup("–")
    low, high = scores["intervals"][metric]
    return Markup(f'{number(scores[metric])} <span class="quiet">[{number(low)}, {number(high)}]</span>')


def _value(scores: dict[str, Any], metric: str) -> str:
    return with_interval(scores[metric], *scores["intervals"][metric])


def _figure(place: int, name: str, meta: dict[str, str]) -> Markup:
    heading = esc(HEADINGS.get(name, name))
    return Markup(
        f'<figure class="{"half" if name in HALF else "whole"}"><h3>{heading}</h3>\n'
        f'<div class="plot" id="figure-{place}" role="img" aria-label="{heading}. {esc(meta["alt"])}"></div>\n'
        f"<figcaption>{esc(meta['caption'])}</figcaption></figure>\n"
    )


# ---------------------------------------------------------------------- the head and the warnings


def _head(record: Record) -> Markup:
    """Who trained what on what, and how well it does, in a few sentences."""
    trained = {row["site"] for event in record.rounds.values() for row in event["trained"]}
    images = sum(site["images"]["train"] for site in record.survey["sites"] if site["name"] in trained)
    who, how = f"{count(len(trained), 'site')} trained {record.job.model.name}", count(len(record.rounds), "round")
    text = f"{who} on {count(images, 'image')} for {how}." if trained else "No site has trained."
    own, metric = record.scores["federated"], record.metric
    server, there = own.get("server", {}), ""
    if has(server, metric):
        there = f" On the server’s own {count(server['n'][metric], 'image')} the federated model reaches "
        there += f"{metric_name(metric)} {_value(server, metric)}."
    if not has(own, metric):
        return _paragraph(f"{text} There is no test figure{' of any site' if there else ''}.{there}", "lead")
    tested, able = len(own.get("sites", {})), len(record.sites)
    where = f"{count(own['n'][metric], 'test image')} of {'all' if tested == able else f'{tested} of {able}'} sites"
    text += f" The federated model (round {own['best_round']}) reaches {metric_name(metric)} {_value(own, metric)}"
    text += f" on {where}"
    local = {name: scores for name, scores in record.scores.get("local", {}).items() if has(scores, metric)}
    if local:
        best = max(local, key=lambda name: record.sign * local[name][metric])
        text += f"; the best model of a single site (only {best}) {_value(local[best], metric)}"
    if has(record.scores.get("pooled", {}), metric):
        text += f"; a model of all data in one place {_value(record.scores['pooled'], metric)}"
    if worst := record.worst:
        text += f". At {worst}, its worst site, the federated model reaches {_value(own['sites'][worst], metric)}"
    return Markup(_paragraph(f"{text}.{there}", "lead") + _paragraph("Brackets hold 95 % intervals.", "note"))


def _warnings(record: Record) -> Markup:
    """What a reader must know before believing any number, gravest first; of very many, the small ones are folded."""
    runs = {"": record.events}
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
    small = [_dropped(run, lost) for run, events in runs.items() for lost in lost_replies(events)] + _unreadable(record)
    if not grave + small:
        good = "None: every site answered every time, every image could be read, every site was tested."
        return _paragraph(good, "good")
    if len(small) > FOLD:
        summary = esc(f"{_sum_up(record, runs.values())}: see the list below.")
        shown = _list([*grave, summary]) + _folded(f"All {len(small)} notices", _list(small))
    else:
        shown = _list(grave + small)
    return Markup(shown + _paragraph("Each site’s own site.log says more; it does not leave the site.", "note"))


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
    return lines


def _untested(record: Record) -> list[Markup]:
    if record.test is None:
        return []
    lines = []
    for site in record.survey["sites"]:
        if site["name"] not in record.test["sites"]:
            images = site["images"]["test"]
            why = f"its {count(images, 'test image')} could not be evaluated" if images else "it has no test images"
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


# ---------------------------------------------------------------------- the tables


def _results(record: Record) -> Markup:
    models, metrics = record.models, record.metrics()
    if not metrics:
        return _paragraph("There is no test figure.", "note")

    def row(name: str) -> list[object]:
        scores = models[name]
        steps, best = f"{scores['gradient_steps']:,}", scores.get("best_round", "–")
        tested = f"{scores['n'][record.metric]:,}" if "n" in scores else "–"
        return [name, *(_cell(scores, metric) for metric in metrics), tested, steps, f"{best} of {scores['rounds']}"]

    alone = [name for name in record.best_first(models) if name.startswith(ONLY)]
    shown = [name for name in models if name not in alone] + (alone if len(alone) <= FEW else [alone[0], alone[-1]])
    head = ["Model", *(metric_name(metric, True) for metric in metrics), "Test images", "Gradient steps", "Kept round"]
    table: str = _table("Every model on the same test images, those of all sites", head, map(row, shown))
    if len(alone) > FEW:
        table += _paragraph(f"Of {len(alone)} single-site models the best and the worst are shown.", "note")
        table += _folded("All single-site models", _table("Every single-site model", head, map(row, alone)))
    return Markup(table)


def _by_class(record: Record) -> Markup:
    metrics = record.metrics(parts=True)
    models = {name: s for name, s in record.models.items() if not name.startswith(ONLY) and "n" in s}
    if not metrics or not models:
        return Markup("")
    rows = [[metric_name(metric), *(_cell(scores, metric) for scores in models.values())] for metric in metrics]
    return _table("By class, on the test images of all sites", ["Metric", *models], rows)


def _sites(record: Record) -> Markup:
    """The test figures at each site: the federated model, and what the site would have without the others."""
    scores, metric, worst = record.scores, record.metric, record.worst
    own = scores["federated"]
    places: dict[str, Any] = own.get("sites", {}) | ({SERVER: own["server"]} if "server" in own else {})
    if not places:
        return _paragraph("There is no test figure of any site.", "note")
    name = metric_name(metric)
    columns = [(f"{FEDERATED}: {name}", metric, places)]
    if "local" in scores:
        alone = {site: model.get("sites", {}).get(site, {}) for site, model in scores["local"].items()}
        columns.append((f"Trained only here: {name}", metric, alone))
    if "pooled" in scores:
        columns.append((f"{POOLED}: {name}", metric, scores["pooled"].get("sites", {})))
    columns += [(f"{FEDERATED}: {metric_name(other)}", other, places) for other in record.metrics()[1:]]
    badge = Markup(f'{esc(worst)} <span class="badge">worst</span>')
    rows = [
        [badge if place == worst else place, f"{places[place]['n'][metric]:,}"]
        + [_cell(found.get(place, {}), kind) for _, kind, found in columns]
        for place in places
    ]
    return _table("Each site’s own test images", ["Site", "Test images", *(head for head, _, _ in columns)], rows)


def _data(record: Record) -> Markup:
    """What each site brought along; counts of classes are of its training images."""
    sites, classes = record.survey["sites"], record.job.classes
    if not sites:
        return _paragraph("No site has named its data.", "note")

    def row(site: dict[str, Any]) -> list[object]:
        images = [site["images"][split] for split in ("train", "val", "test")]
        counts = [*images, *site["classes"][: len(classes)], site["skipped"]]
        return [site["name"], *(f"{n:,}" for n in counts)]

    total = {"name": "all", "skipped": sum(site["skipped"] for site in sites)}
    total["images"] = {split: sum(site["images"][split] for site in sites) for split in sites[0]["images"]}
    total["classes"] = [sum(column) for column in zip(*(site["classes"] for site in sites), strict=True)]
    head = ["Site", "Training", "Validation", "Test", *(f"{name}, training" for name in classes), "Unreadable"]
    return _table("Images at each site", head, map(row, [*sites, total] if len(sites) > 1 else sites))


def _job(record: Record) -> Markup:
    about = knobs()

    def row(key: str, value: object) -> list[object]:
        shown = Markup(f"<strong>{esc(value)}</strong>") if value != about[key].default else value
        return [Markup(f"<code>{esc(key)}</code>"), shown, about[key].metadata["help"]]

    rows = [row(key, value) for key, value in record.job.flat().items()]
    digest = Markup(f'<p class="note">SHA-256 of the job: <code>{esc(record.job.sha256)}</code></p>\n')
    table = _table("The job as it was run", ["Setting", "Value", "Meaning"], rows)
    return Markup(digest + _folded("All settings (bold: not the default)", table, "prose"))


def _versions(record: Record) -> Markup:
    start: Event = next((event for event in record.events if event["event"] == "start"), {})
    when = time.strftime("%Y-%m-%d %H:%M", time.gmtime(record.events[0]["time"])) + " UTC" if record.events else "–"
    seconds = record.events[-1]["time"] - record.events[0]["time"] if record.events else 0
    lasted = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
    lasted = lasted if seconds < 7200 else f"{seconds / 3600:.1f} h"
    rows = [
        ["Run started", when],
        ["Run took", lasted],
        ["Consilium, run", start.get("version", record.scores.get("version", "–"))],
        ["Consilium, this page", __version__],
        ["Plotly", plotly.__version__],
    ]
    return _table("Versions and times", ["Item", "Value"], rows)

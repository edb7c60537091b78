"""report.html: a run on one page that needs nothing but a browser, and no network."""

from __future__ import annotations

import html
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from string import Template
from typing import Any

import plotly
from plotly.io.json import to_json_plotly
from plotly.offline import get_plotlyjs

from server.figures import THEMES, Record, all_figures, metric_name, number, read_record, reason_words, with_interval
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


def _cell(scores: dict[str, Any], metric: str) -> Markup:
    """A value with its interval, the interval in a quieter tone."""
    if number(scores.get(metric)) == "–":
        return Markup("–")
    low, high = scores["intervals"][metric]
    return Markup(f'{number(scores[metric])} <span class="quiet">[{number(low)}, {number(high)}]</span>')


def _value(scores: dict[str, Any], metric: str) -> str:
    return with_interval(scores[metric], *scores["intervals"][metric])


def _has(scores: dict[str, Any], metric: str) -> bool:
    return number(scores.get(metric)) != "–"


def _spans(rounds: Iterable[int]) -> str:
    """``1, 4–7`` for 1, 4, 5, 6, 7."""
    spans: list[list[int]] = []
    for one in sorted(set(rounds)):
        if spans and one == spans[-1][1] + 1:
            spans[-1][1] = one
        else:
            spans.append([one, one])
    return ", ".join(f"{a}" if a == b else f"{a}–{b}" for a, b in spans)


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


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
    who, how = f"{_count(len(trained), 'site')} trained {record.job.model.name}", _count(len(record.rounds), "round")
    text = f"{who} on {_count(images, 'image')} for {how}." if trained else "No site has trained."
    own, metric = record.scores["federated"], record.metric
    if not _has(own, metric):
        return _paragraph(f"{text} There is no test figure.", "lead")
    tested, able = len(own.get("sites", {})), len(record.sites)
    where = f"{_count(own['n'][metric], 'test image')} of {'all' if tested == able else f'{tested} of {able}'} sites"
    text += f" The federated model (round {own['best_round']}) reaches {metric_name(metric)} {_value(own, metric)}"
    text += f" on {where}"
    local = {name: scores for name, scores in record.scores.get("local", {}).items() if _has(scores, metric)}
    if local:
        best = max(local, key=lambda name: record.sign * local[name][metric])
        text += f"; the best model of a single site (only {best}) {_value(local[best], metric)}"
    if _has(record.scores.get("pooled", {}), metric):
        text += f"; a model of all data in one place {_value(record.scores['pooled'], metric)}"
    worst = _worst(record)
    if worst:
        text += f". At {worst}, its worst site, the federated model reaches {_value(own['sites'][worst], metric)}"
    return Markup(_paragraph(f"{text}.", "lead") + _paragraph("Brackets hold 95 % intervals.", "note"))


def _worst(record: Record) -> str:
    """The site where the federated model does worst on the test images; nothing where there are not several."""
    sites = {name: s for name, s in record.scores["federated"].get("sites", {}).items() if _has(s, record.metric)}
    return min(sites, key=lambda name: record.sign * sites[name][record.metric]) if len(sites) > 1 else ""


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
    small = [line for run, events in runs.items() for line in _dropped(run, events)] + _unreadable(record)
    if not grave + small:
        return _paragraph(
            "None: every site answered every time, every image could be read, every site was tested.", "good"
        )
    if len(small) > FOLD:
        lost = [item for events in runs.values() for event in events for item in event.get("dropped", [])]
        sites = {str(item["site"]) for item in lost}
        total = f"{_count(len(lost), 'reply')} of {_count(len(sites), 'site')} could not be used".replace(
            "replys", "replies"
        )
        skipped = sum(site["skipped"] for site in record.survey["sites"])
        total += f", {_count(skipped, 'image')} could not be read" if skipped else ""
        shown = _list([*grave, esc(f"{total}: see the list below.")]) + _folded(
            f"All {len(small)} notices", _list(small)
        )
    else:
        shown = _list(grave + small)
    return Markup(shown + _paragraph("Each site’s own site.log says more; it does not leave the site.", "note"))


def _list(items: Iterable[Markup]) -> Markup:
    lines = "\n".join(f"<li>{item}</li>" for item in items)
    return Markup(f'<ul class="warnings">\n{lines}\n</ul>\n')


def _unreadable(record: Record) -> list[Markup]:
    lines = []
    for site in record.survey["sites"]:
        if site["skipped"]:
            what = f"left out {_count(site['skipped'], 'image')} that cannot be read"
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
            why = f"its {_count(images, 'test image')} could not be evaluated" if images else "it has no test images"
            lines.append(Markup(f"<strong>{esc(site['name'])} is missing from the test figures:</strong> {why}."))
    return lines


def _dropped(run: str, events: list[Event]) -> list[Markup]:
    """Every reply that was not used, one line per site, step and reason."""
    steps = {
        "survey": "is not in the run",
        "round": "did not count in training",
        "val": "is missing from the validation",
        "test": "did not answer the test",
    }
    groups: dict[tuple[str, str, str], list[int]] = {}
    for event in events:
        step = str(event.get("split", event["event"]))
        for item in event.get("dropped", []):
            groups.setdefault((str(item["site"]), step, str(item["reason"])), []).append(event.get("round", 0))
    lines = []
    for (site, step, reason), rounds in groups.items():
        when = f" in {'round' if len(set(rounds)) == 1 else 'rounds'} {_spans(rounds)} ({_count(len(rounds), 'time')})"
        when = when if step in ("round", "val") else ""
        words = f"{steps.get(step, step)}{when}: {reason_words(reason)}"
        lines.append(Markup(f"{esc(run)}<strong>{esc(site)}</strong> {esc(words)}. <code>{esc(reason)}</code>"))
    return lines


# ---------------------------------------------------------------------- the tables


def _metrics(record: Record, parts: bool = False) -> list[str]:
    """The metrics of the test, the one that picked the model first; ``parts``: those of single classes instead."""
    found = [name for name in record.scores["federated"].get("n", {}) if (":" in name) == parts]
    return sorted(found, key=lambda name: name != record.metric)


def _results(record: Record) -> Markup:
    models, metrics = record.models, _metrics(record)
    if not metrics:
        return _paragraph("There is no test figure.", "note")

    def row(name: str) -> list[object]:
        scores = models[name]
        steps, best = f"{scores['gradient_steps']:,}", scores.get("best_round", "–")
        tested = f"{scores['n'][record.metric]:,}" if "n" in scores else "–"
        return [name, *(_cell(scores, metric) for metric in metrics), tested, steps, f"{best} of {scores['rounds']}"]

    alone = [name for name in models if name.startswith("Only ")]
    alone.sort(
        key=lambda name: (
            -record.sign * (models[name][record.metric] if _has(models[name], record.metric) else -9e9 * record.sign)
        )
    )
    shown = [name for name in models if name not in alone] + (alone if len(alone) <= FEW else [alone[0], alone[-1]])
    head = ["Model", *(metric_name(metric, True) for metric in metrics), "Test images", "Gradient steps", "Kept round"]
    table = _table("Every model on the same test images, those of all sites", head, map(row, shown))
    if len(alone) > FEW:
        note = _paragraph(f"Of {len(alone)} single-site models the best and the worst are shown.", "note")
        return Markup(
            table + note + _folded("All single-site models", _table("Every single-site model", head, map(row, alone)))
        )
    return table


def _by_class(record: Record) -> Markup:
    metrics = _metrics(record, parts=True)
    models = {name: s for name, s in record.models.items() if not name.startswith("Only ") and "n" in s}
    if not metrics or not models:
        return Markup("")
    rows = [[metric_name(metric), *(_cell(scores, metric) for scores in models.values())] for metric in metrics]
    return _table("By class, on the test images of all sites", ["Metric", *models], rows)


def _sites(record: Record) -> Markup:
    """The test figures at each site: the federated model, and what the site would have without the others."""
    own, metric = record.scores["federated"], record.metric
    sites: dict[str, Any] = own.get("sites", {})
    if not sites:
        return _paragraph("There is no test figure of any site.", "note")
    name, worst = metric_name(metric), _worst(record)
    columns: dict[str, Callable[[str], Markup]] = {f"Federated: {name}": lambda site: _cell(sites[site], metric)}
    if "local" in record.scores:
        local = record.scores["local"]
        columns[f"Trained only here: {name}"] = lambda site: _cell(
            local.get(site, {}).get("sites", {}).get(site, {}), metric
        )
    if "pooled" in record.scores:
        pooled = record.scores["pooled"].get("sites", {})
        columns[f"All data in one place: {name}"] = lambda site: _cell(pooled.get(site, {}), metric)
    for other in _metrics(record)[1:]:
        columns[f"Federated: {metric_name(other)}"] = partial(lambda kind, site: _cell(sites[site], kind), other)
    badge = Markup(f'{esc(worst)} <span class="badge">worst</span>')
    rows = [
        [badge if site == worst else site, f"{sites[site]['n'][metric]:,}", *(cell(site) for cell in columns.values())]
        for site in sites
    ]
    if "server" in own:
        rest = [
            _cell(own["server"], other) if head.startswith("Federated") else "–"
            for head, other in _heads(record, columns)
        ]
        rows.append(["server’s own images", f"{own['server']['n'][metric]:,}", *rest])
    return _table("Each site’s own test images", ["Site", "Test images", *columns], rows)


def _heads(record: Record, columns: Iterable[str]) -> list[tuple[str, str]]:
    """Each column of the site table with its metric."""
    metrics = {metric_name(metric): metric for metric in _metrics(record)}
    return [(head, metrics[head.partition(": ")[2]]) for head in columns]


def _data(record: Record) -> Markup:
    """What each site brought along; counts of classes are of its training images."""
    sites, classes = record.survey["sites"], record.job.classes
    if not sites:
        return _paragraph("No site has named its data.", "note")

    def row(site: dict[str, Any]) -> list[object]:
        counts = (
            [site["images"][split] for split in ("train", "val", "test")]
            + site["classes"][: len(classes)]
            + [site["skipped"]]
        )
        return [site["name"], *(f"{n:,}" for n in counts)]

    total = {"name": "all", "skipped": sum(site["skipped"] for site in sites)}
    total["images"] = {split: sum(site["images"][split] for site in sites) for split in sites[0]["images"]}
    total["classes"] = [sum(column) for column in zip(*(site["classes"] for site in sites), strict=True)]
    head = ["Site", "Training", "Validation", "Test", *(f"{name}, training" for name in classes), "Unreadable"]
    return _table("Images at each site", head, map(row, [*sites, total] if len(sites) > 1 else sites))


def _job(record: Record) -> Markup:
    about, defaults = knobs(), {key: item.default for key, item in knobs().items()}
    rows = [
        [
            Markup(f"<code>{esc(key)}</code>"),
            Markup(f"<strong>{esc(value)}</strong>") if value != defaults[key] else value,
            about[key].metadata["help"],
        ]
        for key, value in record.job.flat().items()
    ]
    digest = Markup(f'<p class="note">SHA-256 of the job: <code>{esc(record.job.sha256)}</code></p>\n')
    return Markup(
        digest
        + _folded(
            "All settings (bold: not the default)",
            _table("The job as it was run", ["Setting", "Value", "Meaning"], rows),
            "prose",
        )
    )


def _versions(record: Record) -> Markup:
    start: Event = next((event for event in record.events if event["event"] == "start"), {})
    when = time.strftime("%Y-%m-%d %H:%M", time.gmtime(record.events[0]["time"])) + " UTC" if record.events else "–"
    seconds = record.events[-1]["time"] - record.events[0]["time"] if record.events else 0
    lasted = (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
    rows = [
        ["Run started", when],
        ["Run took", lasted],
        ["Consilium, run", start.get("version", record.scores.get("version", "–"))],
        ["Consilium, this page", __version__],
        ["Plotly", plotly.__version__],
    ]
    return _table("Versions and times", ["Item", "Value"], rows)

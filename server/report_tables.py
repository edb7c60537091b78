"""The tables of the report: models, classes, sites, what each site brought along, the job, versions."""

from __future__ import annotations

import time
from typing import Any

import plotly

from server.record import FEDERATED, ONLY, PERSONAL, POOLED, SERVER, Record
from server.report_parts import Markup, cell, esc, folded, heads, paragraph, table
from server.store import Event
from shared import __version__
from shared.config import knobs
from shared.tasks import TASKS

FEW = 8  # more single-site models than this are folded away, all but the best and the worst
WIDE = 5  # so many metrics stand side by side; further ones follow in a table of their own


def results(record: Record) -> Markup:
    """Every model on the test cases of all sites."""
    models, metrics = record.models, record.metrics()[:WIDE]
    if not metrics:
        return paragraph("There is no test figure.", "note")

    def row(name: str) -> list[object]:
        scores = models[name]
        steps, best = f"{scores['gradient_steps']:,}", scores.get("best_round", "–")
        tested = f"{scores['images']:,}" if "images" in scores else "–"
        return [name, *(cell(scores, metric) for metric in metrics), tested, steps, f"{best} of {scores['rounds']}"]

    alone = [name for name in record.best_first(models) if name.startswith(ONLY)]
    shown = [name for name in models if name not in alone] + (alone if len(alone) <= FEW else [alone[0], alone[-1]])
    head = ["Model", *heads(record, metrics), f"Test {record.case}s", "Gradient steps", "Kept round"]
    page: str = table(
        f"Every model on the same test {record.case}s, those of {record.whose('test')}", head, map(row, shown)
    )
    if len(alone) > FEW:
        page += paragraph(f"Of {len(alone)} single-site models the best and the worst are shown.", "note")
        page += folded("All single-site models", table("Every single-site model", head, map(row, alone)))
    return Markup(page)


def further(record: Record) -> Markup:
    """The metrics there was no room for beside the others, and those of single classes: a line each."""
    models = {name: s for name, s in record.models.items() if not name.startswith(ONLY) and "n" in s}
    page = ""
    for what, metrics in (("Further metrics", record.metrics()[WIDE:]), ("By class", record.metrics(parts=True))):
        rows = [[name, *(cell(scores, metric) for scores in models.values())]
                for metric, name in zip(metrics, heads(record, metrics), strict=True)]  # fmt: skip
        if rows and models:
            page += table(f"{what}, on the test {record.case}s of {record.whose('test')}", ["Metric", *models], rows)
    return Markup(page)


def sites(record: Record) -> Markup:
    """The test figures at each site: the federated model, and what the site would have without the others."""
    scores, metric, worst = record.scores, record.metric, record.worst
    own = scores["federated"]
    places: dict[str, Any] = own.get("sites", {}) | ({SERVER: own["server"]} if "server" in own else {})
    if not places:
        return paragraph("There is no test figure of any site.", "note")
    columns = [(FEDERATED, metric, places)]
    if "personal" in own:
        columns.append((PERSONAL, metric, own["personal"].get("sites", {})))
    if "local" in scores:
        alone = {site: model.get("sites", {}).get(site, {}) for site, model in scores["local"].items()}
        columns.append(("Trained only here", metric, alone))
    if "pooled" in scores:
        columns.append((POOLED, metric, scores["pooled"].get("sites", {})))
    columns += [(FEDERATED, other, places) for other in record.metrics()[1 : WIDE - 1]]
    badge = Markup(f'{esc(worst)} <span class="badge">worst</span>')
    names: dict[str, object] = {place: badge if place == worst else place for place in places}
    rows = [
        [names[place], f"{places[place]['images']:,}"]
        + [cell(found.get(place, {}), kind) for _, kind, found in columns]
        for place in places
    ]
    head = ["Site", f"Test {record.case}s", *(heads(record, [kind], f"{who}: ")[0] for who, kind, _ in columns)]
    if spent := own.get("privacy", {}).get("sites"):  # the ledgers' own figures, of all runs
        head.append("Epsilon spent")
        rows = [
            [*row, f"{spent[place]:.2f}" if place in spent else "–"] for place, row in zip(places, rows, strict=True)
        ]
    page: str = table(f"Each site’s own test {record.case}s", head, rows)
    rest = [*record.metrics()[WIDE - 1 :], *record.metrics(parts=True)]
    if rest:
        lines = [[names[place], *(cell(places[place], kind) for kind in rest)] for place in places]
        title = f"Further metrics of the federated model on each site’s own test {record.case}s"
        page += folded("Further metrics at each site", table(title, ["Site", *heads(record, rest)], lines))
    return Markup(page)


def data(record: Record) -> Markup:
    """What each site brought along; counts of classes are of its training cases."""
    there = record.survey["sites"]
    if not there:
        return paragraph("No site has named its data.", "note")
    named = [*record.job.classes, *record.job.labels][: min(len(site["classes"]) for site in there)]

    def row(site: dict[str, Any]) -> list[object]:
        cases = [site["images"][split] for split in ("train", "val", "test")]
        counts = [*cases, *site["classes"][: len(named)], site["skipped"]]
        return [site["name"], *(f"{n:,}" for n in counts)]

    total = {"name": "all", "skipped": sum(site["skipped"] for site in there)}
    total["images"] = {split: sum(site["images"][split] for site in there) for split in there[0]["images"]}
    total["classes"] = [sum(column) for column in zip(*(site["classes"] for site in there), strict=True)]
    counted = TASKS[record.job.task].counted
    columns = [f"{name}, training {counted}" for name in named]
    head = ["Site", "Training", "Validation", "Test", *columns, "Unreadable"]
    return table(
        f"{record.case.capitalize()}s at each site", head, map(row, [*there, total] if len(there) > 1 else there)
    )


def job(record: Record) -> Markup:
    """Every setting, folded away."""
    about = knobs()

    def row(key: str, value: object) -> list[object]:
        shown = Markup(f"<strong>{esc(value)}</strong>") if value != about[key].default else value
        return [Markup(f"<code>{esc(key)}</code>"), shown, about[key].metadata["help"]]

    rows = [row(key, value) for key, value in record.job.flat().items()]
    digest = Markup(f'<p class="note">SHA-256 of the job: <code>{esc(record.job.sha256)}</code></p>\n')
    lines = table("The job as it was run", ["Setting", "Value", "Meaning"], rows)
    return Markup(digest + folded("All settings (bold: not the default)", lines, "prose"))


def versions(record: Record) -> Markup:
    """When the run was, how long it took, and with which programs."""
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
    return table("Versions and times", ["Item", "Value"], rows)

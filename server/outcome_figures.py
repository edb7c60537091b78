"""The report's figures on the test images: every model and site with its interval, what was taken for what, the ROC.

Nothing is computed with a model here: counts and histograms are the sums that the sites sent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go

from server.record import FEDERATED, ONLY, PERSONAL, POOLED, SERVER, Record, has, value_of
from server.report_style import BLUE, GREEN, GREY, RED, SERIES, fit, new_figure, plain
from server.wording import metric_name, with_interval, wording
from shared.config import Job
from shared.intervals import Estimate, proportion
from shared.tasks import Sums
from shared.tasks.classification.metrics import area_from_histograms, confusion_matrix, histograms, roc_points

FOLD = 15  # more single-site models than this are shown by the best, the middle and the worst


# ---------------------------------------------------------------------- models and sites


class Row(NamedTuple):
    """A line of the forest plot; without scores, a heading over the lines below it."""

    label: str
    scores: dict[str, Any]
    colour: str


def forest(record: Record) -> go.Figure | None:
    """Every model on the test images of all sites, and the federated model at each site, with intervals."""
    own, metric = record.scores["federated"], record.metric
    if not has(own, metric):
        return None
    models, left_out = _model_rows(record)
    rows = [Row(f"<b>sites’ test {record.case}s together</b>", {}, ""), *models]
    rows += [Row("<b>federated model at</b>", {}, ""), *_place_rows(record)]
    title = metric_name(metric, True)
    cases = f"test {record.case}s"
    caption = (
        f"{title} on {cases} with 95 % intervals. Dotted: the federated model on the {cases} of {record.whose('test')}."
    )
    caption += (" Less is better." if record.sign < 0 else "") + left_out
    alt = f"{title} on the {cases} of {record.whose('test')}. " + "; ".join(
        f"{name} {value_of(scores, metric)}" for name, scores, _ in models
    )
    figure = new_figure(70 + 26 * len(rows), caption, alt)
    figure.add_vline(x=own[metric], line={"color": BLUE, "width": 1, "dash": "dot"})
    for place, row in enumerate(rows):
        if row.scores:
            add_estimate(figure, place, row, metric, record.case)
    labels = [plain(row.label) if row.scores else row.label for row in rows]
    ends = [len(rows) - 0.4, -0.6]
    figure.update_yaxes(tickvals=list(range(len(rows))), ticktext=labels, range=ends, showgrid=False, zeroline=False)
    scored = [row.scores for row in rows if row.scores]
    values = [value for scores in scored for value in (scores[metric], *scores["intervals"][metric])]
    fit(figure, values, "xaxis", wording(metric).figures)
    figure.update_xaxes(title=f"{title}, test", nticks=7)
    return figure


def _model_rows(record: Record) -> tuple[list[Row], str]:
    """The models on all sites' test images, the single-site ones from best to worst; and a word on those left out."""
    models = {name: scores for name, scores in record.models.items() if has(scores, record.metric)}
    alone = [name for name in record.best_first(models) if name.startswith(ONLY)]
    shown = [alone[0], alone[len(alone) // 2], alone[-1]] if len(alone) > FOLD else alone
    colours = {FEDERATED: BLUE, PERSONAL: BLUE, POOLED: GREEN} | dict.fromkeys(shown, GREY)
    note = f" Of {len(alone)} single-site models the best, the middle and the worst are shown."
    rows = [Row(name, models[name], colour) for name, colour in colours.items() if name in models]
    return rows, note if len(alone) > FOLD else ""


def _place_rows(record: Record) -> list[Row]:
    """The federated model at each site, from best to worst, and on the images the server holds itself."""
    own, metric = record.scores["federated"], record.metric
    sites = {name: scores for name, scores in own.get("sites", {}).items() if has(scores, metric)}
    rows = [Row(name, sites[name], BLUE) for name in record.best_first(sites)]
    return rows + ([Row(SERVER, own["server"], RED)] if has(own.get("server", {}), metric) else [])


def add_estimate(figure: go.Figure, place: float, row: Row, metric: str, case: str, **look: Any) -> None:
    """A square with its interval, if it has one."""
    value, (low, high) = row.scores[metric], row.scores["intervals"][metric]
    n, cases = row.scores["n"][metric], row.scores["images"]
    about = f"{value_of(row.scores, metric)}, {cases:,} {case}s" + ("" if n == cases else f", n {n:,}")
    reach: dict[str, Any] = {"color": row.colour, "thickness": 2, "width": 4}
    if low is not None and high is not None:
        reach |= {"type": "data", "symmetric": False, "array": [high - value], "arrayminus": [value - low]}
    figure.add_scatter(
        x=[value], y=[place], error_x=reach, mode="markers",
        marker={"color": row.colour, "size": 10, "symbol": "square"},
        hovertemplate=f"{plain(row.label, 40)}<br>{about}<extra></extra>", **{"showlegend": False} | look,
    )  # fmt: skip


# ---------------------------------------------------------------------- what was taken for what


def _classifier(record: Record, prefix: str) -> tuple[Sums, Job]:
    """The sums under keys that start with ``prefix``, and the job they are of: with one, the labels of whole images."""
    sums: Sums = {key.removeprefix(prefix): value for key, value in record.test_sums.items() if key.startswith(prefix)}
    job = record.job
    if prefix:
        job = dataclasses.replace(job, data=dataclasses.replace(job.data, classes=job.data.labels, labels=""))
    return sums, job


def confusion(record: Record, prefix: str = "") -> go.Figure | None:
    """Truth against prediction on the test images of all sites; several labels per image: a line per label."""
    sums, job = _classifier(record, prefix)
    if not sums.get("confusion"):
        return None
    classes, several, case = job.classes, job.data.multilabel, record.case
    columns, counts, share = _confusion_cells(sums, job)
    what = f"the share is of the {case}s of that true class; the diagonal is right"
    if several:
        what = f"found and missed: of the {case}s with the label; false alarm and rightly not: of those without it"
    caption = f"Test {case}s of {record.whose('test')}: number, and share in per cent ({what})."
    if sums.get("made_distances"):  # of a generator
        caption += f" The classifier has seen invented {case}s only."
    alt = " ".join(
        f"{name}: {', '.join(f'{c} {k}' for c, k in zip(columns if several else classes, row, strict=True))}."
        for name, row in zip(classes, counts.tolist(), strict=True)
    )
    figure = new_figure(90 + max(230, 48 * len(classes)), caption, alt if several else f"Rows are the truth. {alt}")
    lines = [
        [f"{c:,}<br>{s:.0%}" for c, s in zip(*pair, strict=True)]
        for pair in zip(counts.tolist(), share.tolist(), strict=True)
    ]
    labels = [plain(name, 18) for name in classes]
    figure.add_heatmap(
        z=share, text=lines, texttemplate="%{text}" if len(columns) <= 6 else "%{z:.0%}",
        coloraxis="coloraxis", xgap=2, ygap=2,
        customdata=[[f"{row} → {column}" for column in columns] for row in labels],
        hovertemplate="%{customdata}<br>%{text}<extra></extra>",
    )  # fmt: skip
    figure.update_layout(coloraxis={"cmin": 0, "cmax": 1, "showscale": False})
    figure.update_xaxes(title=None if several else "predicted", tickangle=0 if len(columns) <= 4 else -45)
    figure.update_xaxes(tickvals=list(range(len(columns))), ticktext=columns, showgrid=False, zeroline=False)
    figure.update_yaxes(title="label" if several else "truth", autorange="reversed")
    figure.update_yaxes(tickvals=list(range(len(classes))), ticktext=labels, showgrid=False, zeroline=False)
    return figure


def _confusion_cells(sums: Sums, job: Job) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names of the columns; number of images per row and column; their share of the images they could be."""
    matrix = confusion_matrix(sums, job)
    if job.data.multilabel:
        columns = ["found", "missed", "false alarm", "rightly not"]
        counts = np.stack([[m[1, 1], m[1, 0], m[0, 1], m[0, 0]] for m in matrix])
        whole = np.stack([[m[1].sum(), m[1].sum(), m[0].sum(), m[0].sum()] for m in matrix])
    else:
        columns, counts = [plain(name, 14) for name in job.classes], matrix
        whole = np.broadcast_to(matrix.sum(1, keepdims=True), matrix.shape)
    return columns, counts, np.divide(counts, whole, out=np.zeros(counts.shape), where=whole > 0)


# ---------------------------------------------------------------------- sensitivity against false alarms


def roc(record: Record, prefix: str = "") -> go.Figure | None:
    """Sensitivity against false alarms over all thresholds, from the sites' score histograms added up."""
    parts, mirrored = classifier_parts(record, prefix)
    if not parts:
        return None
    caption = f"From the score histograms of the test {record.case}s of {record.whose('test')} added up, "
    caption += "each class against the rest."
    caption += f" Shown for {parts[0][0]}; the other class mirrors it." if mirrored else ""
    return draw_roc(parts, caption)


def classifier_parts(record: Record, prefix: str = "") -> tuple[list[tuple[str, np.ndarray, np.ndarray]], bool]:
    """Name and score histograms of each class on the test, and whether only one is given as the other mirrors it."""
    sums, job = _classifier(record, prefix)
    if not sums.get("positives"):
        return [], False
    parts = list(zip(job.classes, *histograms(sums, job), strict=True))
    mirrored = len(job.classes) == 2 and not job.data.multilabel
    return (parts[-1:] if mirrored else parts), mirrored


def draw_roc(named: Sequence[tuple[str, np.ndarray, np.ndarray]], caption: str) -> go.Figure | None:
    """ROC curves, each from the score histograms of those that have a finding and of those that have it not."""
    parts: list[tuple[str, Estimate, np.ndarray, np.ndarray]] = []
    for name, pos, neg in named:
        area = area_from_histograms(pos, neg)
        parts += [(name, area, pos, neg)] if area.n else []
    if not parts:
        return None
    banded = len(parts) <= 3
    if banded:
        caption += " Band: 95 % interval of the sensitivity at each threshold (Wilson), point by point."
    areas = [with_interval(area.value, area.low, area.high) for _, area, _, _ in parts]
    alt = "AUROC: " + "; ".join(f"{part[0]} {text}" for part, text in zip(parts, areas, strict=True))
    figure = new_figure(360 + 20 * len(parts), caption, alt)
    chance = {"color": GREY, "width": 1, "dash": "dot"}
    figure.add_scatter(x=[0, 1], y=[0, 1], mode="lines", line=chance, hoverinfo="skip", showlegend=False)
    for place, ((name, _, pos, neg), text) in enumerate(zip(parts, areas, strict=True)):
        wrong, right = roc_points(pos, neg)
        colour = SERIES[place % len(SERIES)]
        look = {"color": colour, "width": 2, "dash": ("solid", "dash", "dot")[place // len(SERIES) % 3]}
        if banded:
            _add_band(figure, wrong, [proportion(share * pos.sum(), int(pos.sum())) for share in right], colour)
        tip = "false alarms %{x:.1%}, sensitivity %{y:.1%}"
        label = f"{plain(name, 20)} {text}"
        figure.add_scatter(x=wrong, y=right, mode="lines", line=look, name=label, hovertemplate=tip)
    figure.update_xaxes(title="false alarms (1 − specificity)", range=[-0.01, 1.01], tickformat=".0%")
    figure.update_yaxes(title="sensitivity", range=[-0.01, 1.02], tickformat=".0%")
    return figure


def _add_band(figure: go.Figure, x: np.ndarray, reach: list[Estimate], colour: str) -> None:
    """The area between the lower and the upper ends of ``reach``."""
    figure.add_scatter(
        x=[*x, *x[::-1]], y=[e.high for e in reach] + [e.low for e in reach[::-1]],
        fill="toself", fillcolor=colour, opacity=0.16, line={"width": 0}, mode="lines",
        hoverinfo="skip", showlegend=False,
    )  # fmt: skip

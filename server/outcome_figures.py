"""The report's figures on the test images: every model and site with its interval, what was taken for what, the ROC.

Nothing is computed with a model here: counts and histograms are the sums that the sites sent.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go

from server.record import FEDERATED, ONLY, POOLED, SERVER, Record, has, metric_name, with_interval
from server.report_style import BLUE, GREEN, GREY, RED, SERIES, fit, new_figure, plain
from shared.intervals import Estimate, proportion
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
    rows = [Row("<b>all sites’ test images</b>", {}, ""), *models]
    rows += [Row("<b>federated model at</b>", {}, ""), *_place_rows(record)]
    title = metric_name(metric, True)
    caption = f"{title} on test images with 95 % intervals. Dotted: the federated model on all sites’ test images."
    caption += left_out
    alt = f"{title} on the test images of all sites. " + "; ".join(
        f"{name} {with_interval(scores[metric], *scores['intervals'][metric])}" for name, scores, _ in models
    )
    figure = new_figure(70 + 26 * len(rows), caption, alt)
    figure.add_vline(x=own[metric], line={"color": BLUE, "width": 1, "dash": "dot"})
    for place, row in enumerate(rows):
        if row.scores:
            _add_estimate(figure, place, row, metric)
    labels = [plain(row.label) if row.scores else row.label for row in rows]
    ends = [len(rows) - 0.4, -0.6]
    figure.update_yaxes(tickvals=list(range(len(rows))), ticktext=labels, range=ends, showgrid=False, zeroline=False)
    fit(figure, (end for row in rows if row.scores for end in row.scores["intervals"][metric]), "xaxis")
    figure.update_xaxes(title=f"{title}, test", nticks=7)
    return figure


def _model_rows(record: Record) -> tuple[list[Row], str]:
    """The models on all sites' test images, the single-site ones from best to worst; and a word on those left out."""
    models = {name: scores for name, scores in record.models.items() if has(scores, record.metric)}
    alone = [name for name in record.best_first(models) if name.startswith(ONLY)]
    shown = [alone[0], alone[len(alone) // 2], alone[-1]] if len(alone) > FOLD else alone
    colours = {FEDERATED: BLUE, POOLED: GREEN} | dict.fromkeys(shown, GREY)
    note = f" Of {len(alone)} single-site models the best, the middle and the worst are shown."
    rows = [Row(name, models[name], colour) for name, colour in colours.items() if name in models]
    return rows, note if len(alone) > FOLD else ""


def _place_rows(record: Record) -> list[Row]:
    """The federated model at each site, from best to worst, and on the images the server holds itself."""
    own, metric = record.scores["federated"], record.metric
    sites = {name: scores for name, scores in own.get("sites", {}).items() if has(scores, metric)}
    rows = [Row(name, sites[name], BLUE) for name in record.best_first(sites)]
    return rows + ([Row(SERVER, own["server"], RED)] if has(own.get("server", {}), metric) else [])


def _add_estimate(figure: go.Figure, place: int, row: Row, metric: str) -> None:
    """A square with its interval."""
    value, (low, high) = row.scores[metric], row.scores["intervals"][metric]
    reach = {"type": "data", "symmetric": False, "array": [high - value], "arrayminus": [value - low]}
    reach |= {"color": row.colour, "thickness": 2, "width": 4}
    about = f"{with_interval(value, low, high)}, {row.scores['n'][metric]:,} images"
    figure.add_scatter(
        x=[value], y=[place], error_x=reach, mode="markers", showlegend=False,
        marker={"color": row.colour, "size": 10, "symbol": "square"},
        hovertemplate=f"{plain(row.label, 40)}<br>{about}<extra></extra>",
    )  # fmt: skip


# ---------------------------------------------------------------------- what was taken for what


def confusion(record: Record) -> go.Figure | None:
    """Truth against prediction on the test images of all sites; several labels per image: a line per label."""
    if not record.test_sums.get("confusion"):
        return None
    classes, several = record.job.classes, record.job.data.multilabel
    columns, counts, share = _confusion_cells(record)
    what = "the share is of the images of that true class; the diagonal is right"
    if several:
        what = "found and missed: of the images with the label; false alarm and rightly not: of those without it"
    caption = f"Test images of all sites: number, and share in per cent ({what})."
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


def _confusion_cells(record: Record) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names of the columns; number of images per row and column; their share of the images they could be."""
    matrix = confusion_matrix(record.test_sums, record.job)
    if record.job.data.multilabel:
        columns = ["found", "missed", "false alarm", "rightly not"]
        counts = np.stack([[m[1, 1], m[1, 0], m[0, 1], m[0, 0]] for m in matrix])
        whole = np.stack([[m[1].sum(), m[1].sum(), m[0].sum(), m[0].sum()] for m in matrix])
    else:
        columns, counts = [plain(name, 14) for name in record.job.classes], matrix
        whole = np.broadcast_to(matrix.sum(1, keepdims=True), matrix.shape)
    return columns, counts, np.divide(counts, whole, out=np.zeros(counts.shape), where=whole > 0)


# ---------------------------------------------------------------------- sensitivity against false alarms


def roc(record: Record) -> go.Figure | None:
    """Sensitivity against false alarms over all thresholds, from the sites' score histograms added up."""
    job = record.job
    parts: list[tuple[str, Estimate, np.ndarray, np.ndarray]] = []
    if record.test_sums.get("positives"):
        for name, pos, neg in zip(job.classes, *histograms(record.test_sums, job), strict=True):
            area = area_from_histograms(pos, neg)
            parts += [(name, area, pos, neg)] if area.n else []
    mirrored = len(job.classes) == 2 and not job.data.multilabel
    parts = parts[-1:] if mirrored else parts
    if not parts:
        return None
    caption = "From the score histograms of all sites’ test images added up, each class against the rest."
    caption += f" Shown for {parts[0][0]}; the other class mirrors it." if mirrored else ""
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

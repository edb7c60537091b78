"""The report's figures on the test images: every model and site with its interval, what was taken for what, the ROC.

Nothing is computed with a model here: counts and histograms are the sums that the sites sent.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go

from server.record import Record, has, metric_name, with_interval
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
    metric = record.metric
    models, folded = _model_rows(record)
    places = _place_rows(record)
    if not (models and models[0].label == "Federated") and not places:
        return None
    rows = ([Row("<b>all sites’ test images</b>", {}, ""), *models] if models else []) + places
    title = metric_name(metric, True)
    caption = f"{title} on test images with 95 % intervals."
    alt = f"{title} on the test images of all sites. " + "; ".join(
        f"{name} {with_interval(scores[metric], *scores['intervals'][metric])}" for name, scores, _ in models
    )


def confusion(record: Record) -> go.Figure | None:
    """Truth against prediction on the test images of all sites; several labels per image: a line per label."""
    if not record.test_sums.get("confusion"):
        return None
    matrix, several = confusion_matrix(record.test_sums, record.job), record.job.data.multilabel
    classes = record.job.classes
    if several:
        columns = ["found", "missed", "false alarm", "rightly not"]
        counts = np.stack([[m[1, 1], m[1, 0], m[0, 1], m[0, 0]] for m in matrix])
        whole = np.stack([[m[1].sum(), m[1].sum(), m[0].sum(), m[0].sum()] for m in matrix])
        what = "found and missed: of the images with the label; false alarm and rightly not: of those without it"
    else:
        columns, counts = [plain(name, 14) for name in classes], matrix
        whole = np.broadcast_to(matrix.sum(1, keepdims=True), matrix.shape)
        what = "the share is of the images of that true class; the diagonal is right"
    share = np.divide(counts, whole, out=np.zeros(counts.shape), where=whole > 0)
    caption = f"Test images of all sites: number, and share in per cent ({what})."
    alt = " ".join(
        f"{name}: {', '.join(f'{c} {k}' for c, k in zip(columns if several else classes, row, strict=True))}."
        for name, row in zip(classes, counts.tolist(), strict=True)
    )
    figure = _figure(90 + max(230, 48 * len(classes)), caption, alt if several else f"Rows are the truth. {alt}")
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
    figure.update_xaxes(tickangle=0 if len(columns) <= 4 else -45)
    figure.update_xaxes(
        title=None if several else "predicted",
        tickvals=list(range(len(columns))),
        ticktext=columns,
        showgrid=False,
        zeroline=False,
    )
    figure.update_yaxes(
        title="label" if several else "truth",
        tickvals=list(range(len(classes))),
        ticktext=labels,
        autorange="reversed",
        showgrid=False,
        zeroline=False,
    )
    return figure


def roc(record: Record) -> go.Figure | None:
    """Sensitivity against false alarms over all thresholds, from the sites' score histograms added up."""
    if not record.test_sums.get("positives"):
        return None
    job = record.job
    parts: list[tuple[str, Estimate, np.ndarray, np.ndarray]] = []
    for name, pos, neg in zip(job.classes, *histograms(record.test_sums, job), strict=True):
        area = area_from_histograms(pos, neg)
        if area.n:
            parts.append((name, area, pos, neg))
    mirrored = len(job.classes) == 2 and not job.data.multilabel
    parts = parts[-1:] if mirrored else parts
    if not parts:
        return None
    caption = "From the score histograms of all sites’ test images added up, each class against the rest."
    caption += f" Shown for {parts[0][0]}; the other class mirrors it." if mirrored else ""
    if banded := len(parts) <= 3:
        caption += " Band: 95 % interval of the sensitivity at each threshold (Wilson), point by point."
    shown = [(name, with_interval(a.value, a.low, a.high)) for name, a, _, _ in parts]
    figure = _figure(360 + 20 * len(parts), caption, "AUROC: " + "; ".join(f"{name} {area}" for name, area in shown))
    figure.add_scatter(
        x=[0, 1],
        y=[0, 1],
        mode="lines",
        line={"color": GREY, "width": 1, "dash": "dot"},
        hoverinfo="skip",
        showlegend=False,
    )
    for place, ((name, text), (_, _, pos, neg)) in enumerate(zip(shown, parts, strict=True)):
        wrong, right = roc_points(pos, neg)
        colour = SERIES[place % len(SERIES)]
        look = {"color": colour, "width": 2, "dash": ("solid", "dash", "dot")[place // len(SERIES) % 3]}
        if banded:
            reach = [proportion(share * pos.sum(), int(pos.sum())) for share in right]
            edge = {"x": [*wrong, *wrong[::-1]], "y": [e.high for e in reach] + [e.low for e in reach[::-1]]}
            figure.add_scatter(
                **edge,
                fill="toself",
                fillcolor=colour,
                opacity=0.16,
                line={"width": 0},
                mode="lines",
                hoverinfo="skip",
                showlegend=False,
            )
        figure.add_scatter(
            x=wrong,
            y=right,
            mode="lines",
            line=look,
            name=f"{plain(name, 20)} {text}",
            hovertemplate="false alarms %{x:.1%}, sensitivity %{y:.1%}",
        )
    figure.update_xaxes(title="false alarms (1 − specificity)", range=[-0.01, 1.01], tickformat=".0%")
    figure.update_yaxes(title="sensitivity", range=[-0.01, 1.02], tickformat=".0%")
    return figure

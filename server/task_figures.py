"""Figures for what only some tasks have, each drawn where a run's sums hold what it needs.

Nothing is computed with a model here: counts and histograms are the sums that the sites sent.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go

from server.outcome_figures import Row, add_estimate, draw_roc
from server.record import FEDERATED, POOLED, Record, has, value_of
from server.report_style import BLUE, GREEN, GREY, SERIES, fit, new_figure, plain
from server.wording import metric_name, wording
from shared.tasks.detection.metrics import BINS, GROUPS, OVERLAPS
from shared.tasks.reconstruction.metrics import LEAST, MOST, normal_class
from shared.tasks.reconstruction.metrics import histograms as error_histograms

LOWEST_RATE, HIGHEST_RATE = 1 / 16, 8.0  # false detections per image: the ends of a FROC curve's axis
BARS = 40  # a histogram of anomaly scores has about so many bars


# ---------------------------------------------------------------------- class by class


def by_class(record: Record) -> go.Figure | None:
    """The Dice of each class on the test images of all sites, every site's as a grey dot."""
    if not record.test_sums.get("dice_class"):
        return None
    own = record.scores["federated"]
    metrics = [metric for metric in record.metrics(parts=True) if metric.startswith("dice:") and has(own, metric)]
    if not metrics:
        return None
    models = {FEDERATED: (own, BLUE), POOLED: (record.scores.get("pooled", {}), GREEN)}
    caption = f"Dice on test {record.case}s with 95 % intervals. Grey: the federated model at each site."
    alt = "Dice of each class, federated model: " + "; ".join(
        f"{metric.partition(':')[2]} {value_of(own, metric)}" for metric in metrics
    )
    figure = new_figure(110 + 44 * len(metrics), caption, alt)
    values: list[float | None] = []
    for place, metric in enumerate(metrics):
        at = {name: s[metric] for name, s in own.get("sites", {}).items() if has(s, metric)}
        figure.add_scatter(
            x=list(at.values()), y=[place + 0.25] * len(at), mode="markers", name="at each site",
            marker={"color": GREY, "size": 6}, text=[plain(name) for name in at], showlegend=not place,
            hovertemplate="%{text}: %{x:.3f}<extra></extra>",
        )  # fmt: skip
        values += at.values()
        for shift, (model, (scores, colour)) in zip((0.0, -0.25), models.items(), strict=True):
            if has(scores, metric):
                row = Row(f"{model}: {metric.partition(':')[2]}", scores, colour)
                add_estimate(figure, place + shift, row, metric, record.case, name=model, showlegend=not place)
                values += [scores[metric], *scores["intervals"][metric]]
    labels = [plain(metric.partition(":")[2]) for metric in metrics]
    figure.update_yaxes(tickvals=list(range(len(metrics))), ticktext=labels, range=[len(metrics) - 0.5, -0.5])
    figure.update_yaxes(showgrid=False, zeroline=False)
    fit(figure, values, "xaxis", wording(metrics[0]).figures)
    figure.update_xaxes(title="Dice, test", nticks=7)
    return figure


# ---------------------------------------------------------------------- boxes


class Boxes(NamedTuple):
    """Of one class: boxes there are, and by bin of the score, from the highest, all detections and the right ones."""

    name: str
    objects: int
    found: np.ndarray
    right: np.ndarray


def _boxes(record: Record) -> list[Boxes]:
    """Detections on the test images of all sites, right at an overlap of .5; empty where the task has none."""
    sums, classes = record.test_sums, record.job.classes
    if not sums.get("fine"):
        return []
    fine = np.asarray(sums["fine"], dtype=np.int64).reshape(len(classes), 1 + len(OVERLAPS), BINS)[:, :2, ::-1]
    objects = np.asarray(sums["objects"], dtype=np.int64).reshape(GROUPS, len(classes)).sum(0)
    return [Boxes(name, int(n), *rows) for name, n, rows in zip(classes, objects, fine, strict=True)]


def precision_recall(record: Record) -> go.Figure | None:
    """Precision against recall of each class over all thresholds, at an overlap of .5."""
    parts = [part for part in _boxes(record) if part.objects]
    if not parts:
        return None
    own = record.scores["federated"]
    metrics = [f"map50:{part.name}" for part in parts]
    areas = [value_of(own, metric) for metric in metrics]
    caption = "A detection is right where it overlaps a box not yet found by .5 or more (intersection over union). From"
    caption += f" the score histograms of the test {record.case}s of {record.whose('test')} added up."
    alt = f"{metric_name('map50:')}: " + "; ".join(f"{p.name} {a}" for p, a in zip(parts, areas, strict=True))
    figure = new_figure(360 + 20 * len(parts), caption, alt)
    for place, (part, area) in enumerate(zip(parts, areas, strict=True)):
        found, right = _thresholds(part)
        figure.add_scatter(
            x=right / part.objects, y=right / np.maximum(found, 1), mode="lines", line=_look(place, 2),
            name=f"{plain(part.name, 20)} {area}", customdata=found, showlegend=True,
            hovertemplate="recall %{x:.1%}, precision %{y:.1%}, %{customdata:,} detections",
        )  # fmt: skip
    figure.update_xaxes(title="recall: share of the boxes found", range=[-0.01, 1.01], tickformat=".0%")
    figure.update_yaxes(title="precision: share that is right", range=[-0.01, 1.02], tickformat=".0%")
    return figure


def _thresholds(part: Boxes) -> tuple[np.ndarray, np.ndarray]:
    """Detections, and those that are right, at every threshold that some detection just reaches; else nothing, once."""
    found, right = np.cumsum(part.found), np.cumsum(part.right)
    keep = np.flatnonzero(part.found)
    return (found[keep], right[keep]) if len(keep) else (np.zeros(1, np.int64), np.zeros(1, np.int64))


def free_response(record: Record) -> go.Figure | None:
    """FROC: the share of boxes found against false detections per image (Chakraborty 1989)."""
    parts = [part for part in _boxes(record) if part.objects]
    cases = int(record.test_sums.get("n", 0))  # type: ignore[arg-type]
    if not parts or not cases:
        return None
    whole = Boxes("all", *(sum(part[k] for part in parts) for k in (1, 2, 3)))  # type: ignore[arg-type, misc]
    own = record.scores["federated"]
    reached = value_of(own, "sensitivity_1fp")
    caption = f"Dotted: one false detection per {record.case}, where all classes together reach {reached}."
    caption += " Left of the axis lie fewer still." + (" Thin: single classes." if len(parts) > 1 else "")
    alt = f"At one false detection per {record.case} {reached} of the boxes are found."
    figure = new_figure(360 + 20 * len(parts), caption, alt)
    figure.add_vline(x=1, line={"color": GREY, "width": 1, "dash": "dot"})
    for place, part in enumerate(parts if len(parts) > 1 else []):
        figure.add_trace(_response(part, cases, plain(part.name, 20), _look(place, 1.5)))
    label = "all classes" if len(parts) > 1 else plain(parts[0].name, 20)
    figure.add_trace(_response(whole, cases, label, {"color": GREY if len(parts) > 1 else BLUE, "width": 3}))
    ticks = [0.125, 0.25, 0.5, 1, 2, 4, 8]
    figure.update_xaxes(
        title=f"false detections per {record.case}", type="log", tickvals=ticks, ticktext=[f"{t:g}" for t in ticks],
        range=[np.log10(LOWEST_RATE), np.log10(HIGHEST_RATE)],
    )  # fmt: skip
    figure.update_yaxes(title="sensitivity: share of the boxes found", range=[-0.01, 1.02], tickformat=".0%")
    return figure


def _response(part: Boxes, cases: int, name: str, look: dict[str, Any]) -> go.Scatter:
    """A FROC curve over all thresholds; what lies left of the axis stands on its edge."""
    found, right = _thresholds(part)
    wrong = (found - right) / cases
    return go.Scatter(
        x=np.clip(wrong, LOWEST_RATE, None), y=right / part.objects, mode="lines", line=look, name=name,
        customdata=wrong, hovertemplate="%{customdata:.2f} false, %{y:.1%} found", showlegend=True,
    )  # fmt: skip


def _look(place: int, width: float) -> dict[str, Any]:
    """The line of the n-th class."""
    dash = ("solid", "dash", "dot")[place // len(SERIES) % 3]
    return {"color": SERIES[place % len(SERIES)], "width": width, "dash": dash}


# ---------------------------------------------------------------------- anomalies


def _errors(record: Record) -> np.ndarray | None:
    """How many test images of each class fell into each bin of the error; None where the task has no errors."""
    return error_histograms(record.test_sums, record.job) if record.test_sums.get("errors") else None


def anomaly_scores(record: Record) -> go.Figure | None:
    """How the anomaly scores of normal test images and of all others are spread."""
    table = _errors(record)
    if table is None or not table.sum():
        return None
    classes, normal = record.job.classes, normal_class(record.job)
    order = [normal, *(k for k in range(len(classes)) if k != normal)]
    order = [k for k in order if table[k].sum()]
    caption = "The anomaly score is an image’s mean squared error after the model has rebuilt it. Shares are of the"
    caption += f" test {record.case}s of each class; the model was trained on {classes[normal]} alone."
    edges = LEAST * (MOST / LEAST) ** np.linspace(0, 1, table.shape[1] + 1)
    alt = "Median anomaly score: " + "; ".join(
        f"{classes[k]} {_median(table[k], edges):.2g} ({table[k].sum():,} {record.case}s)" for k in order
    )
    figure = new_figure(340 + 20 * len(order), caption, alt)
    names = [f"{plain(classes[k], 20)}{' (normal)' if k == normal else ''}" for k in order]
    _add_histograms(figure, names, table[order], edges)
    # Named one by one: Plotly writes the 2 and the 5 between powers of ten without their zeros.
    ticks = [digit * 10.0**power for power in range(round(np.log10(LEAST)), 1) for digit in (1, 2, 5)]
    figure.update_xaxes(
        title="anomaly score (mean squared error)", type="log", tickvals=ticks, ticktext=[f"{t:g}" for t in ticks]
    )
    figure.update_yaxes(title=f"share of the {record.case}s")
    return figure


def nearest_training(record: Record) -> go.Figure | None:
    """How far invented images are from the nearest training image of a site, beside how far held-out ones are."""
    sums = record.test_sums
    if not sums.get("made_distances"):
        return None
    table = np.asarray([sums["held_distances"], sums["made_distances"]], dtype=np.int64)
    if not table.sum(1).all():
        return None
    own, metric = record.scores["federated"], "memorised"
    edges = np.linspace(0, 1, table.shape[1] + 1)
    caption = f"Distance to the nearest training {record.case} of the same site. A model that copies puts invented"
    caption += f" {record.case}s left of held-out ones. {metric_name(metric, True)}: {value_of(own, metric)}."
    held, made = (_median(row, edges) for row in table)
    alt = f"Median distance: held-out {record.case}s {held:.2g}, invented {record.case}s {made:.2g}."
    figure = new_figure(380, caption, alt)
    _add_histograms(figure, [f"held-out test {record.case}s", f"invented {record.case}s"], table, edges)
    figure.update_xaxes(title=f"distance to the nearest training {record.case}")
    figure.update_yaxes(title="share")
    return figure


def _add_histograms(figure: go.Figure, names: list[str], table: np.ndarray, edges: np.ndarray) -> None:
    """A filled outline for each row of counts, as shares of the row; several narrow bins make a bar."""
    used = np.flatnonzero(table.sum(0))
    step = max(1, -(-int(used[-1] - used[0] + 1) // BARS))
    first, last = int(used[0]), int(used[-1]) + 1
    last += -(last - first) % step
    counts = np.pad(table, ((0, 0), (0, step)))[:, first:last].reshape(len(table), -1, step).sum(2)
    ends = edges[np.minimum(np.arange(first, last + 1, step), len(edges) - 1)]
    for place, (name, row) in enumerate(zip(names, counts, strict=True)):
        figure.add_scatter(  # outlines: bars over bars of another colour could not be read
            x=ends, y=[*(row / row.sum()), 0.0], mode="lines", line=_look(place, 2) | {"shape": "hv"}, fill="tozeroy",
            name=name, hovertemplate="from %{x:.2g}: %{y:.1%}",
        )  # fmt: skip
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")


def _median(counts: np.ndarray, edges: np.ndarray) -> float:
    """The middle of a histogram, to a bin."""
    place = int(np.searchsorted(np.cumsum(counts), counts.sum() / 2))
    return float((edges[place] + edges[place + 1]) / 2)


def anomaly_roc(record: Record) -> go.Figure | None:
    """How well the anomaly score tells each other class, and all of them, from the normal one."""
    table = _errors(record)
    if table is None:
        return None
    classes, normal = record.job.classes, normal_class(record.job)
    others = [k for k in range(len(classes)) if k != normal]
    parts = [(classes[k], table[k], table[normal]) for k in others]
    if len(others) > 1:
        parts.insert(0, ("all anomalies", table[others].sum(0), table[normal]))
    caption = f"Each class against {classes[normal]}, from the histograms of the test {record.case}s of "
    caption += f"{record.whose('test')} added up."
    return draw_roc(parts, caption)

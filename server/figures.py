"""The report's figures over the rounds: the metric over all sites and at each, the training loss, who took part.

Figures are drawn from what a run folder holds; nothing is computed with a model here. Every figure carries
``layout.meta`` = {"caption", "alt"}: what it shows and how it was made, and what a reader who cannot see it should
know. Names come from files: they pass ``plain`` before Plotly, which reads markup, sees them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go

from server.calibration_figures import calibration
from server.outcome_figures import confusion, forest, roc
from server.record import DECLINED, FEDERATED, ONLY, POOLED, SERVER, Record, lost_replies, read_record, reason_words
from server.report_style import BAND, BLUE, GREEN, GREY, RED, SERIES, SYMBOLS, fit, new_figure, plain
from server.results import curve, told
from server.store import Event
from server.task_figures import (
    anomaly_roc,
    anomaly_scores,
    by_class,
    free_response,
    nearest_training,
    precision_recall,
)
from server.wording import metric_name, number, with_interval, wording

MANY = 12  # more sites than this are shown by their spread
UNASKED, TRAINED, LOST = "rgba(128,140,150,.22)", BLUE, "rgba(213,94,0,.30)"  # the cells of the participation grid


def all_figures(folder: Path, store: str = "") -> dict[str, go.Figure]:
    """The figures a run folder gives something for, by name, in the order of the report."""
    record = read_record(folder, store)
    makers: dict[str, Callable[[Record], go.Figure | None]] = {
        "metric by round": metric_by_round,
        "metric by site": metric_by_site,
        "test figures": forest,
        "classes": by_class,
        "confusion matrix": confusion,
        "ROC": roc,
        "calibration": calibration,
        "confusion matrix, whole image": partial(confusion, prefix="image_"),
        "ROC, whole image": partial(roc, prefix="image_"),
        "calibration, whole image": partial(calibration, prefix="image_"),
        "precision and recall": precision_recall,
        "FROC": free_response,
        "anomaly scores": anomaly_scores,
        "anomaly ROC": anomaly_roc,
        "nearest training": nearest_training,
        "training loss": training_loss,
        "participation": participation,
    }
    return {name: figure for name, make in makers.items() if (figure := make(record)) is not None}


# ---------------------------------------------------------------------- round by round


def metric_by_round(record: Record) -> go.Figure | None:
    """The global model on the validation images, with the baselines as thin lines."""
    points = _points(record.events, record.metric)
    if not points:
        return None
    best = record.scores["federated"].get("best_round")
    metric, name = record.metric, metric_name(record.metric, True)
    marked = [p for p in points if p[0] == best]
    alt = f"{name} on validation {record.case}s goes {_from_to(points, metric)}."
    alt += f" Best round: {best}, {number(marked[0][1], metric)}." if marked else ""
    caption = (
        f"The global model on the validation {record.case}s of {record.whose('val')}; the band is the 95 % interval."
    )
    if len(record.baselines) > 1:
        caption += f" Each single-site model is judged on its own validation {record.case}s only."
    caption += " Less is better." if record.sign < 0 else ""
    figure = new_figure(420, caption, alt)
    x = [p[0] for p in points]
    # A figure without an interval has a band of no width there.
    ends = [[p[1] if math.isnan(p[side]) else p[side] for p in points] for side in (3, 2)]
    values = ends[0] + ends[1][::-1]
    look = {"fill": "toself", "fillcolor": BAND, "line": {"width": 0}, "mode": "lines", "hoverinfo": "skip"}
    figure.add_scatter(x=x + x[::-1], y=values, name="95 % interval", legendrank=2, **look)
    curves = {key: _points(events, record.metric) for key, events in record.baselines.items()}
    values += _add_baselines(figure, curves, metric)
    own = _points([e | {"metrics": e["server"]} for e in record.events if "server" in e], metric)
    if own:
        figure.add_trace(_line(own, f"{FEDERATED}, {SERVER}", RED, 1.5, metric, dash="dot"))
    mode = "lines+markers" if len(points) < 40 else "lines"
    figure.add_trace(_line(points, FEDERATED, BLUE, 3, metric, mode=mode, legendrank=1))
    if marked:
        mark, name_ = {"symbol": "star", "size": 15, "color": RED}, f"best round: {best}"
        figure.add_scatter(
            x=[best], y=[marked[0][1]], mode="markers", marker=mark, name=name_, hoverinfo="skip", legendrank=3
        )
    fit(figure, values + [p[1] for p in own], measure=wording(metric).figures)
    _round_axis(figure, min(x), max(x))
    figure.update_yaxes(title=f"{name}, validation")
    return figure


def _add_baselines(figure: go.Figure, curves: dict[str, list[Any]], metric: str = "loss") -> list[float]:
    """Thin lines for the pooled and the single-site models; gives their values. Many sites are one grey bundle."""
    alone = {name: points for name, points in curves.items() if name != "pooled"}
    for place, (name, points) in enumerate(alone.items()):
        few = len(alone) <= 6
        label = f"{ONLY}{plain(name)}" if few else f"each of {len(alone)} sites alone"
        dash = ("dot", "dash", "dashdot", "longdash", "longdashdot", "5px,2px")[place % 6] if few else "solid"
        trace = _line(points, label, GREY, 1.5 if few else 0.8, metric, dash=dash, legendgroup=None if few else "alone")
        figure.add_trace(trace.update(showlegend=few or not place, opacity=1 if few else 0.6))
    if curves.get("pooled"):
        figure.add_trace(_line(curves["pooled"], POOLED, GREEN, 2, metric, dash="dash", legendrank=4))
    return [point[1] for points in curves.values() for point in points]


def metric_by_site(record: Record) -> go.Figure | None:
    """The global model at each site; of many sites the spread, and the worst by name."""
    curves = {name: _points(record.events, record.metric, name) for name in record.sites}
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return None
    worst = min(curves, key=lambda name: record.sign * curves[name][-1][1])
    metric, name = record.metric, metric_name(record.metric, True)
    alt = f"At the last validation the worst site is {worst}, {name} {number(curves[worst][-1][1], metric)}."
    caption = f"The global model on each site’s validation {record.case}s."
    caption += f" The worst site at the last validation is {worst}." + (" Less is better." if record.sign < 0 else "")
    if len(curves) > MANY:
        caption += f" The band reaches from the worst to the best of {len(curves)} sites."
    figure = new_figure(400 + (18 * len(curves) if len(curves) <= MANY else 0) // 3, caption, alt)
    if len(curves) > MANY:
        _add_spread(figure, curves, metric)
        figure.add_trace(_line(curves[worst], f"worst at the end: {plain(worst)}", RED, 2, metric, dash="dash"))
    for place, (site, points) in enumerate(curves.items() if len(curves) <= MANY else []):
        colour, dash = SERIES[place % len(SERIES)], "solid" if place < len(SERIES) else "dash"
        few = len(points) <= 40
        mark = {"symbol": SYMBOLS[place % len(SYMBOLS)], "size": 8}
        figure.add_trace(
            _line(
                points, plain(site), colour, 2, metric, dash=dash, mode="lines+markers" if few else "lines", marker=mark
            )
        )
    fit(figure, (point[1] for points in curves.values() for point in points), measure=wording(metric).figures)
    _round_axis(figure, 0, max(points[-1][0] for points in curves.values()))
    figure.update_yaxes(title=f"{name}, validation")
    return figure


def _add_spread(figure: go.Figure, curves: dict[str, list[Any]], metric: str) -> None:
    by_round: dict[int, list[float]] = {}
    for points in curves.values():
        for point in points:
            by_round.setdefault(point[0], []).append(point[1])
    x = sorted(by_round)
    ends = [max(by_round[r]) for r in x] + [min(by_round[r]) for r in x[::-1]]
    fill = {"fill": "toself", "fillcolor": BAND, "line": {"width": 0}, "mode": "lines", "hoverinfo": "skip"}
    figure.add_scatter(x=x + x[::-1], y=ends, name="all sites, lowest to highest", **fill)
    figure.add_trace(_line([(r, float(np.median(by_round[r]))) for r in x], "median site", BLUE, 3, metric))


def training_loss(record: Record) -> go.Figure | None:
    """Mean training loss per case, round by round; of a model of several parts, each part's."""
    own = _losses(record.rounds.values())
    if not own:
        return None
    parts = sorted({name for e in record.rounds.values() for row in told(e) for name in row.get("losses", {})})
    if parts:
        return _losses_of_parts(record, parts)
    caption = (
        f"Mean loss over the {record.case}s trained on in each round, with augmentation and class weights as trained."
    )
    alt = f"The training loss goes {_from_to(own)}."
    figure = new_figure(360, caption, alt)
    _add_baselines(figure, {name: _losses(events) for name, events in record.baselines.items()})
    figure.add_trace(_line(own, FEDERATED, BLUE, 3, legendrank=1))
    _round_axis(figure, own[0][0], own[-1][0])
    figure.update_yaxes(title="training loss", rangemode="tozero")
    return figure


def _losses(events: Iterable[Event], part: str = "") -> list[tuple[int, float]]:
    """(round, mean loss per case) of the whole model, or of a part of it."""
    found = []
    for event in events:
        rows = [(row.get("losses", {}).get(part) if part else row["loss"], row["images"]) for row in told(event)]
        rows = [(loss, images) for loss, images in rows if loss is not None and images]
        if rows:
            found.append((event["round"], sum(loss for loss, _ in rows) / sum(images for _, images in rows)))
    return found


def _losses_of_parts(record: Record, parts: list[str]) -> go.Figure:
    """A line for each part of the federated model, dashed for the pooled one."""
    own = {part: _losses(record.rounds.values(), part) for part in parts}
    caption = f"Mean loss of each part of the model over the {record.case}s of each round. The parts are trained in"
    caption += " turn, one against the other: neither loss need fall."
    alt = "The training losses go: " + "; ".join(f"{part} {_from_to(points)}" for part, points in own.items()) + "."
    figure = new_figure(380, caption, alt)
    for place, part in enumerate(parts):
        colour, dashed = SERIES[place % len(SERIES)], _losses(record.baselines.get("pooled", []), part)
        figure.add_trace(_line(own[part], f"{FEDERATED}: {plain(part)}", colour, 3))
        if dashed:
            figure.add_trace(_line(dashed, f"{POOLED}: {plain(part)}", colour, 1.5, dash="dash"))
    _round_axis(figure, min(p[0][0] for p in own.values()), max(p[-1][0] for p in own.values()))
    figure.update_yaxes(title="training loss", rangemode="tozero")
    return figure


# ---------------------------------------------------------------------- who took part


def participation(record: Record) -> go.Figure | None:
    """Who trained in which round, and why a reply was not used."""
    if not record.rounds:
        return None
    absent = {lost.site: lost.reason for lost in lost_replies(record.events) if lost.step == "survey"}
    asked = [str(item["site"]) for e in record.rounds.values() for item in e["trained"] + e["dropped"]]
    names, numbers = list(dict.fromkeys([*record.sites, *absent, *asked])), sorted(record.rounds)
    state, text, lost = _attendance(record, names, numbers, absent)
    used, wanted = int((state == 1).sum()), int((state > 0).sum())
    alt = f"{len(names)} sites over {len(numbers)} rounds: {used} of {wanted} replies asked for were used."
    caption = "Every cell is one site in one round. A reply that was not used has a mark, its kind tells the reason."
    figure = new_figure(110 + max(15, min(34, 560 // len(names))) * len(names), caption, alt)
    wide = len(numbers) <= 60
    labels = [plain(name) for name in names]
    places = list(range(len(names)))
    figure.add_heatmap(
        z=state, x=numbers, y=places, text=text, customdata=[[label] * len(numbers) for label in labels],
        colorscale=[[(k + side) / 3, c] for k, c in enumerate((UNASKED, TRAINED, LOST)) for side in (0, 1)],
        zmin=-0.5, zmax=2.5, showscale=False, xgap=1 if wide else 0, ygap=1,
        hovertemplate="%{customdata}, round %{x}: %{text}<extra></extra>",
    )  # fmt: skip
    for label, colour in (("trained", TRAINED), ("not asked", UNASKED)):
        mark = {"symbol": "square", "size": 12, "color": colour}
        figure.add_scatter(x=[None], y=[None], mode="markers", name=label, marker=mark)
    _add_reasons(figure, lost, 9 if wide else 5)
    bare = {"showgrid": False, "range": [len(names) - 0.5, -0.5]}
    figure.update_yaxes(tickvals=places, ticktext=labels, zeroline=False, **bare)
    bare["range"] = [numbers[0] - 0.5, numbers[-1] + 0.5]
    step = 1 if len(numbers) <= 10 else None  # else Plotly would put ticks between rounds
    figure.update_xaxes(title="round", tickformat="d", dtick=step, nticks=12, **bare)
    return figure


def _attendance(
    record: Record, names: list[str], numbers: list[int], absent: dict[str, str]
) -> tuple[np.ndarray, list[list[str]], list[tuple[int, int, str]]]:
    """For every site and round 0 not asked, 1 trained, 2 reply not used, and its words; then (row, round, reason)."""
    row, column = {name: k for k, name in enumerate(names)}, {r: k for k, r in enumerate(numbers)}
    state = np.zeros((len(names), len(numbers)), np.uint8)
    never = {name: f"not in the run: {plain(reason_words(reason), 80)}" for name, reason in absent.items()}
    text = [[never.get(name, "not asked")] * len(numbers) for name in names]
    lost: list[tuple[int, int, str]] = []
    for r, event in record.rounds.items():
        for item in event["trained"]:
            y, x = row[str(item["site"])], column[r]
            of = "in the sum only" if "secure" in event else f"{item['images']} {record.case}s"
            state[y, x], text[y][x] = 1, f"trained, {of}"
        for item in event["dropped"]:
            y, x = row[str(item["site"])], column[r]
            state[y, x], text[y][x] = 2, f"not used: {plain(reason_words(item['reason']), 80)}"
            lost.append((y, r, str(item["reason"])))
    return state, text, lost


def _add_reasons(figure: go.Figure, lost: list[tuple[int, int, str]], size: int) -> None:
    """Marks over the cells of replies that were not used: of fixed size, so that one in 300 rounds is still seen."""
    common = [reason for reason, _ in Counter(item[2] for item in lost).most_common(5)]
    looks = zip(
        [*common, "other reasons"],
        ("#B34700", "#A13D7A", "#5E4BB5", "#7A5C00", "#00735A", GREY),
        ("x", "diamond", "triangle-up", "square", "cross", "circle"),
        strict=False,
    )
    for reason, colour, symbol in looks:
        cells = [item for item in lost if item[2] == reason or (reason == "other reasons" and item[2] not in common)]
        if cells:
            x, y, name = [c[1] for c in cells], [c[0] for c in cells], plain(reason.removeprefix(DECLINED), 30)
            mark = {"symbol": symbol, "size": size, "color": colour, "line": {"color": "#fff", "width": 1}}
            figure.add_scatter(x=x, y=y, mode="markers", marker=mark, name=f"not used: {name}", hoverinfo="skip")


# ---------------------------------------------------------------------- lines and axes


def _round_axis(figure: go.Figure, first: int, last: int) -> None:
    """Whole numbers only."""
    pad = 0.02 * (last - first) + 0.2
    figure.update_xaxes(
        title="round", tickformat="d", dtick=1 if last <= 10 else None, nticks=12, range=[first - pad, last + pad]
    )


def _from_to(points: Sequence[tuple[Any, ...]], metric: str = "loss") -> str:
    (first, start, *_), (last, end, *_) = points[0], points[-1]
    return f"from {number(start, metric)} in round {first} to {number(end, metric)} in round {last}"


def _points(events: list[Event], metric: str, site: str | None = None) -> list[tuple[int, float, float, float]]:
    """The validation curve without its gaps; of a round that was repeated, the last."""
    last = {point[0]: point for point in curve(events, metric, site=site)}
    return [last[key] for key in sorted(last) if math.isfinite(last[key][1])]


def _line(
    points: list[tuple[Any, ...]], name: str, colour: str, width: float = 1.5, metric: str = "loss", **more: Any
) -> go.Scatter:
    tips = [with_interval(*p[1:], metric) if len(p) == 4 else number(p[1], metric) for p in points]
    shape = {"color": colour, "width": width, "dash": more.pop("dash", "solid")}
    more.setdefault("mode", "lines")
    return go.Scatter(
        x=[p[0] for p in points], y=[p[1] for p in points], name=name, text=tips, line=shape,
        hovertemplate="round %{x}: %{text}", **more,
    )  # fmt: skip

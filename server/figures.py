"""The report's pictures, drawn from what a run folder holds; nothing is computed with a model here.

Every figure carries ``layout.meta`` = {"caption", "alt"}: what it shows and how it was made, and what a reader who
cannot see it should know. Names come from files: they pass ``plain`` before Plotly, which reads markup, sees them.
"""

from __future__ import annotations

import html
import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go

from server.results import curve, run_scores
from server.store import Event, read_events
from shared.config import Job, job_from_flat, load_job
from shared.intervals import Estimate, proportion
from shared.tasks import METRICS, Sums, add_sums
from shared.tasks.classification.metrics import area_from_histograms, confusion_matrix, histograms, roc_points

# Told apart by readers with any colour vision, and at least 3:1 on the light and on the dark page.
BLUE, RED, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#7A8793"
SERIES = (BLUE, RED, GREEN, "#BF5F98", "#7B68C8", "#97751B")
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "x", "triangle-down")
BAND = "rgba(0,114,178,.16)"
MANY = 12  # more sites than this are shown by their spread


def theme(ink: str, muted: str, grid: str, low: str, high: str) -> dict[str, Any]:
    """What of a figure depends on the page being light or dark."""
    axis = {"gridcolor": grid, "linecolor": muted, "zerolinecolor": grid, "tickcolor": muted, "automargin": True}
    return {
        "layout": {
            "font": {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 13, "color": ink},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "xaxis": axis,
            "yaxis": axis,
            "coloraxis": {"colorscale": [[0, low], [1, high]]},
            "hoverlabel": {"bgcolor": low, "font": {"color": ink}, "bordercolor": muted, "namelength": -1},
        }
    }


THEMES = {
    "light": theme("#1b2430", "#5b6875", "#e1e6ea", "#f5f8fa", "#0b5c8f"),
    "dark": theme("#e6eaee", "#a3afba", "#303a45", "#1d252e", "#79bfee"),
}


@dataclass(frozen=True)
class Record:
    """A run as it lies in its folder. ``scores`` is result.json, or the same taken from the events where it lacks."""

    folder: Path
    job: Job
    events: list[Event]
    baselines: dict[str, list[Event]]
    scores: dict[str, Any]

    @property
    def metric(self) -> str:
        """The metric that picked the model, and that the pictures show."""
        return self.job.evaluation.best_metric

    @property
    def sign(self) -> int:
        """1 where a larger value of ``metric`` is better, -1 where a smaller one is."""
        return METRICS[self.job.task][self.metric]

    @cached_property
    def survey(self) -> Event:
        """Who answered before the first round, and who did not."""
        return self._last("survey") or {"sites": [], "dropped": []}

    @cached_property
    def test(self) -> Event | None:
        """The final evaluation, if the run came so far."""
        return self._last("evaluation", "test")

    @cached_property
    def rounds(self) -> dict[int, Event]:
        """The training rounds; of a round that was repeated, the last."""
        return {event["round"]: event for event in self.events if event["event"] == "round"}

    @cached_property
    def test_sums(self) -> Sums:
        """The sums behind the test figures, added over the sites."""
        return add_sums((self.test or {}).get("sums", {}).values())

    @property
    def sites(self) -> list[str]:
        """The sites of the run, in the order of the survey."""
        return [str(site["name"]) for site in self.survey["sites"]]

    @property
    def models(self) -> dict[str, dict[str, Any]]:
        """Scores of every trained model, by what it is called in the report."""
        found = {"Federated": self.scores["federated"]}
        found |= {"All data in one place": self.scores["pooled"]} if "pooled" in self.scores else {}
        return found | {f"Only {name}": scores for name, scores in self.scores.get("local", {}).items()}

    def _last(self, kind: str, split: str = "") -> Event | None:
        found = [e for e in self.events if e["event"] == kind and (not split or e.get("split") == split)]
        return found[-1] if found else None


def read_record(folder: Path) -> Record:
    """Read a run folder; a run by ``flwr run`` has no result.json."""
    others = {"pooled": folder / "baselines" / "pooled"} if (folder / "baselines" / "pooled").is_dir() else {}
    others |= {path.name.removeprefix("local-"): path for path in sorted(folder.glob("baselines/local-*"))}
    if (folder / "result.json").exists():
        scores = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    else:
        scores = {"federated": run_scores(folder)}
    own = folder / "job.toml"
    job = load_job(own) if own.exists() else job_from_flat(scores["job"])
    return Record(folder, job, read_events(folder), {name: read_events(path) for name, path in others.items()}, scores)


def all_figures(folder: Path) -> dict[str, go.Figure]:
    """The figures a run folder gives something for, by name, in the order of the report."""
    record = read_record(folder)
    makers = {
        "metric by round": metric_by_round,
        "metric by site": metric_by_site,
        "test figures": forest,
        "confusion matrix": confusion,
        "ROC": roc,
        "training loss": training_loss,
        "participation": participation,
    }
    return {name: figure for name, make in makers.items() if (figure := make(record)) is not None}


# ---------------------------------------------------------------------- words and numbers


def metric_name(metric: str, start: bool = False) -> str:
    """``auroc:WBC`` as AUROC WBC, ``balanced_accuracy`` as balanced accuracy; ``start``: with a capital."""
    name, _, part = metric.partition(":")
    name = "AUROC" if name == "auroc" else name.replace("_", " ")
    return f"{name[0].upper() + name[1:] if start else name}{' ' if part else ''}{part}"


def number(value: float | None) -> str:
    """Three decimals, no leading zero; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{abs(value):.3f}"
    return ("−" if value < 0 and float(text) else "") + text.removeprefix("0")


def with_interval(value: float | None, low: float | None, high: float | None) -> str:
    """``.940 [.911, .960]``."""
    return f"{number(value)} [{number(low)}, {number(high)}]" if number(value) != "–" else "–"


def plain(name: str, length: int = 26) -> str:
    """A name from a file as a label: shortened, and nothing in it is markup to Plotly."""
    name = " ".join(str(name).split())
    return html.escape(name if len(name) <= length else name[: length - 1] + "…", quote=False)


def _figure(height: int, caption: str, alt: str) -> go.Figure:
    legend = {"orientation": "h", "x": 0, "y": 1.01, "yanchor": "bottom", "itemsizing": "constant"}
    margin = {"l": 10, "r": 12, "t": 10, "b": 10}
    meta = {"caption": caption, "alt": alt}
    return go.Figure(layout={"template": THEMES["light"], "height": height, "margin": margin, "legend": legend, "meta": meta})


def _round_axis(figure: go.Figure, last: int) -> None:
    """Whole numbers only."""
    figure.update_xaxes(title="round", tickformat="d", dtick=1 if last <= 10 else None, nticks=12, range=[-0.02 * last - 0.3, last * 1.02 + 0.3])


def _fit(figure: go.Figure, values: Iterable[float], axis: str = "yaxis") -> None:
    """An axis just wide enough for the values; one of shares does not go beyond 0 and 1."""
    finite = [value for value in values if math.isfinite(value)]
    if finite:
        low, high = min(finite), max(finite)
        pad = max(0.05 * (high - low), 0.01)
        share = low >= 0 and high <= 1
        span = [max(low - pad, 0), min(high + pad, 1.005)] if share else [low - pad, high + pad]
        figure.update_layout({axis: {"range": span}})


def _points(events: list[Event], metric: str, site: str | None = None) -> list[tuple[int, float, float, float]]:
    """The validation curve without its gaps; of a round that was repeated, the last."""
    last = {point[0]: point for point in curve(events, metric, site=site)}
    return [last[key] for key in sorted(last) if math.isfinite(last[key][1])]


def _line(points: list[tuple[Any, ...]], name: str, colour: str, width: float = 1.5, **more: Any) -> go.Scatter:
    tips = [f"{with_interval(*p[1:])}" if len(p) == 4 else number(p[1]) for p in points]
    shape = {"color": colour, "width": width, "dash": more.pop("dash", "solid")}
    return go.Scatter(
        x=[p[0] for p in points], y=[p[1] for p in points], name=name, text=tips, mode=more.pop("mode", "lines"), line=shape,
        hovertemplate="round %{x}: %{text}", **more,
    )  # fmt: skip


# ---------------------------------------------------------------------- round by round


def metric_by_round(record: Record) -> go.Figure | None:
    """The global model on the validation images, with the baselines as thin lines."""
    points = _points(record.events, record.metric)
    if not points:
        return None
    best = record.scores["federated"].get("best_round")
    name = metric_name(record.metric, True)
    marked = [p for p in points if p[0] == best]
    alt = f"{name} on validation images goes from {number(points[0][1])} in round {points[0][0]} to {number(points[-1][1])} in round {points[-1][0]}."
    alt += f" Best round: {best}, {number(marked[0][1])}." if marked else ""
    caption = "The global model on the validation images of all sites; the band is the 95 % interval."
    caption += " Each single-site model is judged on its own validation images only." if len(record.baselines) > 1 else ""
    figure = _figure(420, caption, alt)
    x = [p[0] for p in points]
    band = {"x": x + x[::-1], "y": [p[3] for p in points] + [p[2] for p in points][::-1]}
    figure.add_scatter(**band, fill="toself", fillcolor=BAND, line={"width": 0}, hoverinfo="skip", name="95 % interval", mode="lines")
    values = band["y"]
    values += _add_baselines(figure, {key: _points(events, record.metric) for key, events in record.baselines.items()})
    own = curve([e | {"metrics": e["server"]} for e in record.events if "server" in e], record.metric)
    if own:
        figure.add_trace(_line(own, "Federated, server’s own images", RED, 1.5, dash="dot"))
    figure.add_trace(_line(points, "Federated", BLUE, 3, mode="lines+markers" if len(points) < 40 else "lines"))
    if marked:
        mark = {"symbol": "star", "size": 15, "color": RED}
        figure.add_scatter(x=[best], y=[marked[0][1]], mode="markers", marker=mark, name=f"best round: {best}", hoverinfo="skip")
    _fit(figure, values + [p[1] for p in own])
    _round_axis(figure, max(x))
    figure.update_yaxes(title=f"{name}, validation")
    return figure


def _add_baselines(figure: go.Figure, curves: dict[str, list[Any]]) -> list[float]:
    """Thin lines for the pooled and the single-site models; gives their values. Many sites are one grey bundle."""
    alone = {name: points for name, points in curves.items() if name != "pooled"}
    for place, (name, points) in enumerate(alone.items()):
        few = len(alone) <= 6
        label = f"Only {plain(name)}" if few else f"each of {len(alone)} sites alone"
        dash = ("dot", "dash", "dashdot", "longdash", "longdashdot", "5px,2px")[place % 6] if few else "solid"
        trace = _line(points, label, GREY, 1.5 if few else 0.8, dash=dash, legendgroup=None if few else "alone")
        figure.add_trace(trace.update(showlegend=few or not place, opacity=1 if few else 0.6))
    if curves.get("pooled"):
        figure.add_trace(_line(curves["pooled"], "All data in one place", GREEN, 2, dash="dash"))
    return [point[1] for points in curves.values() for point in points]


def metric_by_site(record: Record) -> go.Figure | None:
    """The global model at each site; of many sites the spread, and the worst by name."""
    curves = {name: _points(record.events, record.metric, name) for name in record.sites}
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return None
    worst = min(curves, key=lambda name: record.sign * curves[name][-1][1])
    name = metric_name(record.metric, True)
    alt = f"At the last validation the lowest site is {worst}, {name} {number(curves[worst][-1][1])}."
    alt = alt if record.sign > 0 else alt.replace("lowest", "worst")
    caption = f"The global model on each site’s validation images. The worst site at the last validation is {worst}."
    if len(curves) > MANY:
        caption += f" The band reaches from the worst to the best of {len(curves)} sites."
    figure = _figure(400 + (18 * len(curves) if len(curves) <= MANY else 0) // 3, caption, alt)
    if len(curves) > MANY:
        _add_spread(figure, curves)
        figure.add_trace(_line(curves[worst], f"worst at the end: {plain(worst)}", RED, 2, dash="dash"))
    for place, (site, points) in enumerate(curves.items() if len(curves) <= MANY else []):
        colour, dash = SERIES[place % len(SERIES)], "solid" if place < len(SERIES) else "dash"
        few = len(points) <= 40
        mark = {"symbol": SYMBOLS[place % len(SYMBOLS)], "size": 8}
        figure.add_trace(_line(points, plain(site), colour, 2, dash=dash, mode="lines+markers" if few else "lines", marker=mark))
    _fit(figure, (point[1] for points in curves.values() for point in points))
    _round_axis(figure, max(points[-1][0] for points in curves.values()))
    figure.update_yaxes(title=f"{name}, validation")
    return figure


def _add_spread(figure: go.Figure, curves: dict[str, list[Any]]) -> None:
    by_round: dict[int, list[float]] = {}
    for points in curves.values():
        for point in points:
            by_round.setdefault(point[0], []).append(point[1])
    x = sorted(by_round)
    ends = [max(by_round[r]) for r in x] + [min(by_round[r]) for r in x[::-1]]
    fill = {"fill": "toself", "fillcolor": BAND, "line": {"width": 0}, "mode": "lines", "hoverinfo": "skip"}
    figure.add_scatter(x=x + x[::-1], y=ends, name="all sites, lowest to highest", **fill)
    figure.add_trace(_line([(r, float(np.median(by_round[r]))) for r in x], "median site", BLUE, 3))


def training_loss(record: Record) -> go.Figure | None:
    """Mean training loss per image, round by round."""

    def points(events: Iterable[Event]) -> list[tuple[int, float]]:
        found = []
        for event in events:
            rows = [row for row in event.get("trained", []) if row["loss"] is not None and row["images"]]
            if rows:
                found.append((event["round"], sum(row["loss"] for row in rows) / sum(row["images"] for row in rows)))
        return found

    own = points(record.rounds.values())
    if not own:
        return None
    caption = "Mean loss over the images trained on in each round, with augmentation and class weights as trained."
    alt = f"The training loss goes from {number(own[0][1])} in round {own[0][0]} to {number(own[-1][1])} in round {own[-1][0]}."
    figure = _figure(360, caption, alt)
    _add_baselines(figure, {name: points(events) for name, events in record.baselines.items()})
    figure.add_trace(_line(own, "Federated", BLUE, 3))
    _round_axis(figure, own[-1][0])
    figure.update_yaxes(title="training loss", rangemode="tozero")
    return figure


def participation(record: Record) -> go.Figure | None:
    """Who trained in which round, and why a reply was not used."""
    if not record.rounds:
        return None
    numbers = sorted(record.rounds)
    absent = {str(item["site"]): item["reason"] for item in record.survey["dropped"]}
    names = record.sites + [name for name in absent if name not in record.sites]
    row, column = {name: k for k, name in enumerate(names)}, {r: k for k, r in enumerate(numbers)}
    state = np.zeros((len(names), len(numbers)), np.uint8)
    text = [[f"not in the run: {plain(absent[name], 60)}" if name in absent else "not asked"] * len(numbers) for name in names]
    lost: list[tuple[int, int, str]] = []
    for r, event in record.rounds.items():
        for item in event["trained"]:
            state[row[item["site"]], column[r]], text[row[item["site"]]][column[r]] = 1, f"trained, {item['images']} images"
        for item in event["dropped"]:
            state[row[item["site"]], column[r]] = 2
            text[row[item["site"]]][column[r]] = f"not used: {plain(item['reason'], 60)}"
            lost.append((row[item["site"]], r, str(item["reason"])))
    asked = int((state > 0).sum())
    alt = f"{len(names)} sites over {len(numbers)} rounds: {int((state == 1).sum())} of {asked} replies asked for were used."
    caption = "Every cell is one site in one round. A reply that was not used has a mark, its kind tells the reason."
    gap = 1 if len(numbers) <= 60 else 0
    tall = max(15, min(34, 560 // len(names)))
    figure = _figure(110 + tall * len(names), caption, alt)
    colours = ["rgba(128,140,150,.22)", BLUE, "rgba(213,94,0,.30)"]
    scale = [[(k + side) / 3, colour] for k, colour in enumerate(colours) for side in (0, 1)]
    labels = [plain(name) for name in names]
    figure.add_heatmap(
        z=state, x=numbers, y=list(range(len(names))), text=text, customdata=[[label] * len(numbers) for label in labels], zmin=-0.5, zmax=2.5,
        colorscale=scale, showscale=False, xgap=gap, ygap=1, hovertemplate="%{customdata}, round %{x}: %{text}<extra></extra>",
    )  # fmt: skip
    for label, colour in (("trained", colours[1]), ("not asked", colours[0])):
        figure.add_scatter(x=[None], y=[None], mode="markers", name=label, marker={"symbol": "square", "size": 12, "color": colour})
    _add_reasons(figure, lost, 9 if len(numbers) <= 60 else 5)
    figure.update_yaxes(tickvals=list(range(len(names))), ticktext=labels, range=[len(names) - 0.5, -0.5], showgrid=False, zeroline=False)
    figure.update_xaxes(title="round", tickformat="d", nticks=12, showgrid=False, range=[numbers[0] - 0.5, numbers[-1] + 0.5])
    return figure


def _add_reasons(figure: go.Figure, lost: list[tuple[int, int, str]], size: int) -> None:
    """Marks over the cells of replies that were not used: of fixed size, so that one in 300 rounds is still seen."""
    common = [reason for reason, _ in Counter(item[2] for item in lost).most_common(5)]
    looks = zip([*common, "other reasons"], ("#B34700", "#A13D7A", "#5E4BB5", "#7A5C00", "#00735A", GREY), ("x", "diamond", "triangle-up", "square", "cross", "circle"), strict=False)
    for reason, colour, symbol in looks:
        cells = [item for item in lost if item[2] == reason or (reason == "other reasons" and item[2] not in common)]
        if cells:
            mark = {"symbol": symbol, "size": size, "color": colour}
            figure.add_scatter(x=[c[1] for c in cells], y=[c[0] for c in cells], mode="markers", marker=mark, name=f"not used: {plain(reason, 44)}", hoverinfo="skip")


# ---------------------------------------------------------------------- on the test images


def forest(record: Record) -> go.Figure | None:
    """Every model on the test images of all sites, and the federated model at each site, with intervals."""
    metric, models = record.metric, {name: s for name, s in record.models.items() if number(s.get(record.metric)) != "–"}
    if "Federated" not in models:
        return None
    alone = sorted((name for name in models if name.startswith("Only ")), key=lambda name: -record.sign * models[name][metric])
    folded = len(alone) > 15
    shown = [alone[0], alone[len(alone) // 2], alone[-1]] if folded else alone
    first = [("Federated", models["Federated"], BLUE)]
    first += [(name, models[name], GREEN) for name in models if name == "All data in one place"]
    first += [(name, models[name], GREY) for name in shown]
    sites = {name: part for name, part in models["Federated"].get("sites", {}).items() if number(part.get(metric)) != "–"}
    order = sorted(sites, key=lambda name: -record.sign * sites[name][metric])
    rows: list[Any] = [("<b>all sites’ test images</b>", None, ""), *first, ("<b>federated model at</b>", None, "")]
    rows += [(name, sites[name], BLUE) for name in order]
    title = metric_name(metric, True)
    caption = f"{title} on test images with 95 % intervals. The dotted line is the federated model on the test images of all sites."
    caption += f" Of {len(alone)} single-site models the best, the middle and the worst are shown." if folded else ""
    alt = f"{title} on the test images of all sites. " + "; ".join(f"{name} {with_interval(s[metric], *s['intervals'][metric])}" for name, s, _ in first)
    figure = _figure(70 + 26 * len(rows), caption, alt)
    figure.add_vline(x=models["Federated"][metric], line={"color": BLUE, "width": 1, "dash": "dot"})
    drawn = [(k, name, score, colour) for k, (name, score, colour) in enumerate(rows) if score]
    ends = [tuple(score["intervals"][metric]) for _, _, score, _ in drawn]
    for (k, name, score, colour), (low, high) in zip(drawn, ends, strict=True):
        value = score[metric]
        reach = {"type": "data", "symmetric": False, "array": [high - value], "arrayminus": [value - low], "color": colour, "thickness": 2, "width": 4}
        tip = f"{plain(name, 40)}<br>{with_interval(value, low, high)}, {score['n'][metric]:,} images<extra></extra>"
        figure.add_scatter(x=[value], y=[k], error_x=reach, mode="markers", marker={"color": colour, "size": 10, "symbol": "square"}, hovertemplate=tip, showlegend=False)
    labels = [name if score is None else plain(name) for name, score, _ in rows]
    figure.update_yaxes(tickvals=list(range(len(rows))), ticktext=labels, range=[len(rows) - 0.4, -0.6], showgrid=False, zeroline=False)
    _fit(figure, (end for pair in ends for end in pair), "xaxis")
    figure.update_xaxes(title=f"{title}, test", nticks=7)
    return figure


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
    alt = " ".join(f"{name}: {', '.join(f'{c} {k}' for c, k in zip(columns if several else classes, row, strict=True))}." for name, row in zip(classes, counts.tolist(), strict=True))
    figure = _figure(110 + max(150, 48 * len(classes)), caption, alt if several else f"Rows are the truth. {alt}")
    lines = [[f"{c:,}<br>{s:.0%}" for c, s in zip(*pair, strict=True)] for pair in zip(counts.tolist(), share.tolist(), strict=True)]
    labels = [plain(name, 18) for name in classes]
    figure.add_heatmap(
        z=share, text=lines, texttemplate="%{text}" if len(columns) <= 8 else None, coloraxis="coloraxis", xgap=2, ygap=2,
        customdata=[[f"{row} → {column}" for column in columns] for row in labels], hovertemplate="%{customdata}<br>%{text}<extra></extra>",
    )  # fmt: skip
    figure.update_layout(coloraxis={"cmin": 0, "cmax": 1, "showscale": False})
    figure.update_xaxes(title=None if several else "predicted", tickvals=list(range(len(columns))), ticktext=columns, showgrid=False, zeroline=False)
    figure.update_yaxes(title="label" if several else "truth", tickvals=list(range(len(classes))), ticktext=labels, autorange="reversed", showgrid=False, zeroline=False)
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
    figure.add_scatter(x=[0, 1], y=[0, 1], mode="lines", line={"color": GREY, "width": 1, "dash": "dot"}, hoverinfo="skip", showlegend=False)
    for place, ((name, text), (_, _, pos, neg)) in enumerate(zip(shown, parts, strict=True)):
        wrong, right = roc_points(pos, neg)
        colour = SERIES[place % len(SERIES)]
        look = {"color": colour, "width": 2, "dash": ("solid", "dash", "dot")[place // len(SERIES) % 3]}
        if banded:
            reach = [proportion(share * pos.sum(), int(pos.sum())) for share in right]
            edge = {"x": [*wrong, *wrong[::-1]], "y": [e.high for e in reach] + [e.low for e in reach[::-1]]}
            figure.add_scatter(**edge, fill="toself", fillcolor=colour, opacity=0.16, line={"width": 0}, mode="lines", hoverinfo="skip", showlegend=False)
        figure.add_scatter(x=wrong, y=right, mode="lines", line=look, name=f"{plain(name, 20)} {text}", hovertemplate="false alarms %{x:.1%}, sensitivity %{y:.1%}")
    figure.update_xaxes(title="false alarms (1 − specificity)", range=[-0.01, 1.01], tickformat=".0%")
    figure.update_yaxes(title="sensitivity", range=[-0.01, 1.02], tickformat=".0%")
    return figure

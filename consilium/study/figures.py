"""The figures of a study: methods beside each other, each hospital's gain, and metric against traffic and privacy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import plotly.graph_objects as go

from consilium.study.collect import POOLED, Found
from consilium.study.compare import Spread, front, spread
from consilium.study.plan import TRIVIAL
from consilium.study.tables import methods_of, size, title_of
from consilium.study.verdict import difference, gains, with_sd
from server.report_style import BLUE, GREEN, GREY, RED, SERIES, SYMBOLS, fit, new_figure, plain
from server.wording import limits, metric_name, wording


def methods_figure(found: Found, setting: str) -> go.Figure | None:
    """Every model on all test images: mean and interval over seeds, each seed a small mark."""
    names = [name for name in methods_of(found, setting) if found.values(setting, name)][::-1]
    if not names:
        return None
    metric = _metric(found, setting)
    least, most = limits(metric)
    spreads = {name: spread(list(found.values(setting, name).values())).within(least, most) for name in names}
    told = "; ".join(f"{title_of(found, setting, name)} {with_sd(spreads[name], metric)}" for name in names[::-1])
    caption = "Mean over the seeds with its 95 % interval (thick), and each seed (thin marks), on all test images."
    figure = new_figure(120 + 34 * len(names), caption, f"{metric_name(metric, True)}: {told}.")
    for place, name in enumerate(names):
        values, colour = list(found.values(setting, name).values()), _colour(name)
        figure.add_scatter(
            x=values, y=[place] * len(values), mode="markers", showlegend=False, hoverinfo="skip",
            marker={"symbol": "line-ns-open", "size": 14, "color": colour, "opacity": 0.6},
        )  # fmt: skip
        figure.add_scatter(
            x=[spreads[name].mean], y=[place], mode="markers", showlegend=False, marker={"size": 11, "color": colour},
            error_x=_bars([spreads[name]], colour, thickness=3, width=6),
            hovertemplate=f"{with_sd(spreads[name], metric)}<extra></extra>",
        )  # fmt: skip
    labels = [plain(title_of(found, setting, name), 44) for name in names]
    figure.update_yaxes(tickvals=list(range(len(names))), ticktext=labels, range=[-0.6, len(names) - 0.4])
    shown = [value for name in names for value in found.values(setting, name).values()]
    ends = [end for one in spreads.values() for end in (one.low, one.high) if math.isfinite(end)]
    fit(figure, [*shown, *ends], "xaxis", wording(metric).figures)
    figure.update_xaxes(title=f"{metric_name(metric, True)}, test")
    return figure


def gains_figure(found: Found, setting: str) -> go.Figure | None:
    """What each site gains over its own single-site model, by method."""
    methods = {name: gains(found, setting, name) for name in found.plan.methods}
    methods = {name: gained for name, gained in methods.items() if gained}
    sites = list(dict.fromkeys(site for gained in methods.values() for site in gained))[::-1]
    if not sites:
        return None
    metric = _metric(found, setting)
    least, most = limits(metric)
    caption = "Difference to the model that the site trained alone with as many gradient steps, on the site’s own test "
    caption += f"{found.cases[setting]}s; right of the line the federation is better. 95 % intervals, paired by seed."
    told = "; ".join(
        f"{name}: {', '.join(f'{site} {difference(gain, metric)}' for site, gain in gained.items())}"
        for name, gained in methods.items()
    )
    figure = new_figure(140 + (22 + 16 * len(methods)) * len(sites), caption, f"{told}.")
    for k, (name, gained) in enumerate(methods.items()):
        shift = 0.6 * (k / max(len(methods) - 1, 1) - 0.5) if len(methods) > 1 else 0.0
        colour = SERIES[k % len(SERIES)]
        there = [site for site in sites if site in gained]
        cut = [gained[site].within(least - most, most - least) for site in there]
        figure.add_scatter(
            x=[gained[site].mean for site in there], y=[sites.index(site) - shift for site in there], mode="markers",
            name=plain(name), marker={"size": 9, "color": colour, "symbol": SYMBOLS[k // len(SERIES) % len(SYMBOLS)]},
            error_x=_bars(cut, colour, thickness=2, width=4),
            text=[f"{plain(site)}: {difference(gained[site], metric)}" for site in there], hovertemplate="%{text}",
        )  # fmt: skip
    figure.add_vline(x=0, line={"color": GREY, "width": 1.5, "dash": "dot"})
    figure.update_yaxes(
        tickvals=list(range(len(sites))), ticktext=list(map(plain, sites)), range=[-0.6, len(sites) - 0.4]
    )
    figure.update_xaxes(title=f"gain in {metric_name(metric)} over alone")
    return figure


def pareto_figure(found: Found, setting: str) -> go.Figure | None:
    """The metric against what training sent, by level of privacy; which methods no other beats in all three."""
    points = {}
    for name in found.plan.methods:
        rows, value = found.of(setting, name), spread(list(found.compared(setting, name).values()))
        if rows and value.n:
            sent = spread([float(row.bytes) for row in rows.values()]).mean
            points[name] = (sent, value, spread([row.epsilon for row in rows.values()]).mean)
    if not points:
        return None
    metric = _metric(found, setting)
    best = on_front(found, setting)
    at_sites = found.compared_by(setting) == "mean"
    caption = "Mean over the seeds; bytes are those of the models sent both ways."
    if at_sites:
        caption += " The metric is the mean over the sites, each on its own test images."
    if best:
        caption += " Ringed: no other method is as good in metric, traffic and epsilon and better in one (methods "
        caption += "without privacy promise no epsilon)."
    told = "; ".join(f"{name} {with_sd(value, metric)} with {size(sent)}" for name, (sent, value, _) in points.items())
    figure = new_figure(430, caption, f"{told}." + (f" Not beaten: {', '.join(sorted(best))}." if best else ""))
    levels = list(dict.fromkeys(found.plan.levels[setting, name] for name in points))
    for k, level in enumerate(levels):
        there = [name for name in points if found.plan.levels[setting, name] == level]
        colour = SERIES[k % len(SERIES)]
        rings = [3 if name in best else 0 for name in there]
        figure.add_scatter(
            x=[points[name][0] / 1e6 for name in there], y=[points[name][1].mean for name in there],
            mode="markers+text", name=plain(level or "no privacy promised", 40), text=[plain(name) for name in there],
            textposition="top center",
            marker={"size": 12, "color": colour, "symbol": SYMBOLS[k % len(SYMBOLS)],
                    "line": {"color": RED, "width": rings}},
            error_y={"type": "data", "array": [points[name][1].sd for name in there], "color": colour},
            hovertemplate="%{text}: %{y:.3f}, %{x:.3g} MB",
        )  # fmt: skip
    fit(figure, [point[0] / 1e6 for point in points.values()], "xaxis", measure=True)
    values = [point[1].mean + side * (point[1].sd if point[1].n > 1 else 0) for point in points.values()
              for side in (-1, 0, 1)]  # fmt: skip
    fit(figure, values, measure=wording(metric).figures)
    figure.update_xaxes(title="sent in training, MB")
    where = "mean over sites" if at_sites else "test"
    figure.update_yaxes(title=f"{metric_name(metric, True)}, {where} (bars: sd over seeds)")
    return figure


def on_front(found: Found, setting: str) -> set[str]:
    """The methods that no other beats in metric, bytes and epsilon together; none in a quick study."""
    points = {}
    for name in () if found.plan.quick else found.plan.methods:
        rows = found.of(setting, name)
        value = spread(list(found.compared(setting, name).values())).mean
        if rows:
            sign = next(iter(rows.values())).sign
            epsilon = spread([row.epsilon for row in rows.values()]).mean
            sent = spread([float(row.bytes) for row in rows.values()]).mean
            points[name] = (-sign * value, sent, math.inf if math.isnan(epsilon) else epsilon)
    return front(points)


def _metric(found: Found, setting: str) -> str:
    return next(row.metric for row in found.rows if row.setting == setting)


def _bars(spreads: Sequence[Spread], colour: str, **form: float) -> dict[str, object]:
    """Their intervals, which are cut at what the metric can be and so need not be as long on both sides."""
    above = [one.high - one.mean if math.isfinite(one.high) else None for one in spreads]
    below = [one.mean - one.low if math.isfinite(one.low) else None for one in spreads]
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "color": colour, **form}


def _colour(name: str) -> str:
    return GREEN if name.startswith(POOLED) else GREY if name.startswith(TRIVIAL) else BLUE

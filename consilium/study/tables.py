"""The tables of a study as rows of plain values: for the page, the terminal, study.csv and study.json alike."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable
from typing import Any

from consilium.study.collect import ALONE, POOLED, Found, Row
from consilium.study.compare import Spread, spread
from consilium.study.plan import TRIVIAL
from consilium.study.verdict import difference, gains, with_sd
from server.wording import limits, number

COLUMNS = (
    "setting", "method", "privacy", "seed", "metric", "value", "low", "high", "n", "mean_over_sites", "worst_site",
    "worst_value", "validation", "gradient_steps", "examples", "rounds", "bytes", "rounds_to_target",
    "bytes_to_target", "epsilon",
)  # fmt: skip
SITE_COLUMNS = ("setting", "method", "seed", "site", "metric", "value", "personal", "alone")


def methods_of(found: Found, setting: str) -> list[str]:
    """All that has rows in a setting: baselines first, then the methods as the study names them."""
    there = dict.fromkeys(row.method for row in found.rows if row.setting == setting)
    others = [name for name in there if name not in found.plan.methods]
    order = sorted(others, key=lambda name: ((TRIVIAL, ALONE, POOLED).index(name.partition(" (")[0]), name))
    return [*order, *(name for name in found.plan.methods if name in there)]


def title_of(found: Found, setting: str, method: str) -> str:
    """What a method or baseline is called for a reader."""
    which, _, rest = method.partition(" (")
    if method in found.plan.methods or which not in (TRIVIAL, ALONE, POOLED):
        return method
    names = {POOLED: "All data in one place", ALONE: "Each hospital alone, on its own images"}
    names[TRIVIAL] = f"Trivial: {found.about.get(setting, '')}"
    return names[which] + (f" ({rest}" if rest else "")


def result_row(found: Found, setting: str, method: str) -> list[str]:
    """Metric (mean ± sd, interval), mean over sites, worst site, worst seed, least gain, number of seeds."""
    rows = found.of(setting, method)
    metric = next(iter(rows.values())).metric
    whole = spread(list(found.values(setting, method).values()))
    sites = spread([row.mean for row in rows.values()])
    worst = spread([row.worst for row in rows.values()])
    sign = next(iter(rows.values())).sign
    least = sign * min((sign * value for value in found.values(setting, method, "worst").values()), default=math.nan)
    gained = gains(found, setting, method) if method in found.plan.methods else {}
    gain = min(gained, key=lambda site: gained[site].mean, default="")
    told = f"{difference(gained[gain], metric)} {gain}" if gain else "–"
    return [_with_interval(whole, metric), with_sd(sites, metric), with_sd(worst, metric), number(least, metric), told,
            f"{len(rows)} of {len(found.plan.seeds)}"]  # fmt: skip


def _with_interval(found: Spread, metric: str) -> str:
    found = found.within(*limits(metric))
    ends = f" [{number(found.low, metric)}, {number(found.high, metric)}]" if math.isfinite(found.low) else ""
    return with_sd(found, metric) + ends


def budget_row(found: Found, setting: str, method: str) -> list[str]:
    """Steps, examples, rounds, bytes, rounds to target, bytes to target, epsilon: means over the seeds."""
    rows = list(found.of(setting, method).values())
    steps, examples, rounds, sent = (
        spread([float(getattr(row, what)) for row in rows]).mean for what in ("steps", "examples", "rounds", "bytes")
    )
    reached = [row.to_target for row in rows if math.isfinite(row.to_target[0])]
    asked = [row for row in rows if not math.isnan(row.to_target[0])]
    to_rounds, to_bytes = "–", "–"
    if asked:
        of = f" ({len(reached)} of {len(asked)} seeds)"
        to_rounds = (f"{spread([pair[0] for pair in reached]).mean:,.0f}" if reached else "never") + of
        to_bytes = size(spread([pair[1] for pair in reached]).mean) if reached else "–"
    epsilon = spread([row.epsilon for row in rows])
    return [f"{steps:,.0f}" if steps else "–", f"{examples:,.0f}" if examples else "–",
            f"{rounds:,.0f}" if rounds else "–", size(sent) if sent else "–", to_rounds, to_bytes,
            f"{epsilon.mean:.2f}" if epsilon.n else "–"]  # fmt: skip


def size(count: float) -> str:
    """Bytes in the unit that fits: 12.3 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.3g} {unit}" if count < 1000 else f"{count:,.0f} {unit}"
        count /= 1000
    return ""


def study_csv(found: Found) -> str:
    """One line for each model and seed; empty where there is no figure."""
    return _csv(COLUMNS, (_line(row) for row in _ordered(found)))


def sites_csv(found: Found) -> str:
    """One line for each model, seed and site; ``alone`` is the figure of the site's own single-site model."""
    return _csv(SITE_COLUMNS, (line for row in _ordered(found) for line in _site_lines(found, row)))


def _ordered(found: Found) -> list[Row]:
    order = {(setting, method): (k, i) for k, setting in enumerate(found.plan.settings)
             for i, method in enumerate(methods_of(found, setting))}  # fmt: skip
    return sorted(found.rows, key=lambda row: (*order[row.setting, row.method], row.seed))


def _line(row: Row) -> list[Any]:
    return [row.setting, row.method, row.level, row.seed, row.metric, row.value, row.low, row.high, row.n, row.mean,
            row.worst_site, row.worst, row.validation, row.steps, row.examples, row.rounds, row.bytes, *row.to_target,
            row.epsilon]  # fmt: skip


def _site_lines(found: Found, row: Row) -> Iterable[list[Any]]:
    alone = found.of(row.setting, found.baseline(row.setting, row.method, ALONE)).get(row.seed)
    for site, value in row.sites.items():
        without = alone.sites.get(site, math.nan) if alone else math.nan
        yield [row.setting, row.method, row.seed, site, row.metric, value, row.personal.get(site, math.nan), without]


def _csv(head: Iterable[str], lines: Iterable[list[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows([_plain(value) for value in line] for line in lines)
    return text.getvalue()


def _plain(value: object) -> object:
    if isinstance(value, float):
        return "" if math.isnan(value) else "never" if math.isinf(value) else f"{value:.6g}"
    return value

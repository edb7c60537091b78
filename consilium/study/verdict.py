"""The recommendation in plain words: which method, is it better than chance, is any hospital worse off?

The method is chosen by validation figures; the test figures that are then told were not looked at for the choice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from consilium.study.collect import ALONE, POOLED, Found
from consilium.study.compare import Spread, paired, spread
from consilium.study.plan import TRIVIAL
from server.wording import limits, metric_name, number


@dataclass(frozen=True)
class Verdict:
    """Of one setting and level of privacy: the method, what is said of it and of the hospitals, what to beware of."""

    setting: str
    level: str
    method: str
    lines: tuple[str, ...]
    hospitals: tuple[str, ...]
    warnings: tuple[str, ...]


def with_sd(found: Spread, metric: str) -> str:
    """``.957 ± .010``."""
    return number(found.mean, metric) + (f" ± {number(found.sd, metric)}" if math.isfinite(found.sd) else "")


def difference(found: Spread, metric: str) -> str:
    """``+.012 [+.002, +.022]``."""
    least, most = limits(metric)
    found = found.within(least - most, most - least)
    ends = (found.low, found.high)
    if found.low == found.high == 0:
        return "always the same"
    reach = f" [{', '.join(_signed(end, metric) for end in ends)}]" if all(map(math.isfinite, ends)) else ""
    return f"{_signed(found.mean, metric)}{reach}"


def _signed(value: float, metric: str) -> str:
    text = number(value, metric)
    return text if value < 0 or text == "–" else f"+{text}"


def gains(found: Found, setting: str, method: str) -> dict[str, Spread]:
    """What each site gains over the model it would train alone, on its own test images, paired by seed.

    Above zero is better for the site. Not widened for there being several sites: harm shall be seen rather than missed.
    """
    ours = found.of(setting, method)
    theirs = found.of(setting, found.baseline(setting, method, ALONE))
    sites = dict.fromkeys(site for row in ours.values() for site in row.own)
    sign = next((row.sign for row in ours.values()), 1)
    gained = {}
    for site in sites:
        own = {seed: row.own[site] for seed, row in ours.items() if site in row.own}
        without = {seed: row.sites[site] for seed, row in theirs.items() if site in row.sites}
        if own.keys() & without.keys():
            gained[site] = paired(own, without, sign)
    return gained


def harmed(gained: dict[str, Spread]) -> list[str]:
    """The sites that are worse off than alone by more than the interval of the difference."""
    return [site for site, gain in gained.items() if gain.below]


def verdicts(found: Found) -> list[Verdict]:
    """One for each setting and level of privacy that has a finished cell, no privacy first; of a quick study none."""
    plan = found.plan
    if plan.quick:
        return []
    levels = sorted(set(plan.levels.values()), key=lambda level: (bool(level), level))
    told = []
    for setting in plan.settings:
        plain = ""
        for level in levels:
            alike = [method for method in plan.methods if plan.levels[setting, method] == level]
            methods = [method for method in alike if found.of(setting, method)]
            if methods:
                told.append(_verdict(found, setting, level, methods, plain))
                plain = plain or (told[-1].method if not level else "")
    return told


def _verdict(found: Found, setting: str, level: str, methods: Sequence[str], plain: str) -> Verdict:
    row = next(iter(found.of(setting, methods[0]).values()))
    metric, sign = row.metric, row.sign
    best, how = _choose(found, setting, methods, sign)
    lines = [_head(found, setting, best, how, metric, sign)]
    lines += _against_others(found, setting, best, [method for method in methods if method != best], metric, sign)
    hospitals = tuple(_hospitals(found, setting, best, methods, metric))
    warnings = []
    if plain and plain != best:
        cost = paired(found.compared(setting, best), found.compared(setting, plain), sign)
        lines.append(f"Privacy ({level}) costs: {metric_name(metric)} {difference(cost, metric)} against {plain}.")
    if level and metric == "frechet":
        warnings.append("The network that measures it is trained under the same privacy: beside others no figure.")
    if setting in found.about:
        ahead = paired(found.compared(setting, best), found.compared(setting, TRIVIAL), sign)
        trivial = spread(list(found.compared(setting, TRIVIAL).values()))
        if not (ahead.above or (ahead.n == 1 and ahead.mean > 0)):
            warnings.append(
                f"{best} is not shown to be better than next to nothing: {found.about[setting]} reaches "
                f"{metric_name(metric)} {number(trivial.mean, metric)} ({difference(ahead, metric)})."
            )
    if len(found.of(setting, best)) < 2:
        warnings.append("One seed: whether any difference is more than chance cannot be told.")
    return Verdict(setting, level, best, tuple(lines), hospitals, tuple(warnings))


def _choose(found: Found, setting: str, methods: Sequence[str], sign: int) -> tuple[str, str]:
    """The method with the best mean validation figure, among those with the most seeds; and by what it was chosen.

    One that leaves each hospital a model of its own must be shown to be better than the best that ends with one for
    all: hospitals whose validation images give no figure do not count in this, and lose most by a model of their own.
    """
    ways = [("validation", "by validation"), ("value", "by the test images, for there is no validation")]
    if found.compared_by(setting) == "mean":
        ways.insert(0, ("at_sites", "by validation within each hospital"))
    for what, how in ways:
        values = {method: found.values(setting, method, what) for method in methods}
        most = max(map(len, values.values()))
        if most:
            means = {method: spread(list(own.values())).mean for method, own in values.items() if len(own) == most}
            order = sorted(means, key=lambda method: -sign * means[method])
            common = next((method for method in order if not found.own_models(setting, method)), order[0])
            gap = paired(values[order[0]], values[common], sign)
            if what != "at_sites" or common == order[0] or gap.above or gap.n < 2:
                return order[0], how
            return common, f"one model for all; {how} {order[0]} is not shown to be better"
    return methods[0], "the first, for none has a figure"


def _head(found: Found, setting: str, best: str, how: str, metric: str, sign: int) -> str:
    rows = found.of(setting, best)
    own, at_sites = spread(list(found.compared(setting, best).values())), found.compared_by(setting) == "mean"
    where = "on each hospital’s own test images, in the mean over the hospitals" if at_sites else "on the test images"
    text = f"{best} is best ({how}, {_seeds(own.n)}): {metric_name(metric)} {with_sd(own, metric)} {where}"
    lows = spread([row.low for row in rows.values()]).mean
    highs = spread([row.high for row in rows.values()]).mean
    if math.isfinite(lows) and not at_sites:
        text += (
            f" (one run’s interval, for the images that were drawn: [{number(lows, metric)}, {number(highs, metric)}])"
        )
    pooled = spread(list(found.compared(setting, found.baseline(setting, best, POOLED)).values()))
    if pooled.n:
        text += f"; all data in one place {with_sd(pooled, metric)}"
        if sign > 0 and pooled.mean > 0:
            text += f", of which it reaches {own.mean / pooled.mean:.1%}"
    worst = spread([row.worst for row in rows.values()])
    if worst.n:
        last = max(rows.values(), key=lambda row: -row.sign * row.worst if math.isfinite(row.worst) else -math.inf)
        text += f". Its worst hospital has {with_sd(worst, metric)}, in the worst seed {number(last.worst, metric)}"
        text += f" ({last.worst_site})"
    return text + "."


def _seeds(n: int) -> str:
    return f"{n} seed{'' if n == 1 else 's'}"


def _against_others(
    found: Found, setting: str, best: str, others: Sequence[str], metric: str, sign: int
) -> Iterable[str]:
    """Whether the others are really worse on the test images, all comparisons together at 95 %."""
    ours = found.compared(setting, best)
    gaps = {name: paired(ours, found.compared(setting, name), sign, len(others)) for name in others}
    gaps = {name: gap for name, gap in gaps.items() if gap.n > 1}
    worse = [f"{name} ({difference(gap, metric)})" for name, gap in gaps.items() if gap.above]
    better = [f"{name} ({difference(gap, metric)})" for name, gap in gaps.items() if gap.below]
    alike = [f"{name} ({difference(gap, metric)})" for name, gap in gaps.items() if not (gap.above or gap.below)]
    if worse:
        yield f"It is better, by more than chance, than {', '.join(worse)}."
    if alike:
        yield f"It cannot be told from {', '.join(alike)}: the interval of the difference holds zero."
    if better:
        yield f"On the test images it is worse than {', '.join(better)}, which validation did not show."


def _hospitals(found: Found, setting: str, best: str, methods: Sequence[str], metric: str) -> Iterable[str]:
    gained = gains(found, setting, best)
    if not gained:
        yield "Whether a hospital is worse off than alone is not known: there is no single-site model to compare with."
        return
    if max(gain.n for gain in gained.values()) < 2:
        low = [site for site, gain in gained.items() if gain.mean < 0]
        yield (
            f"Below their own single-site model: {', '.join(low) or 'no hospital'}; with one seed this may be chance."
        )
        return
    told = {site: difference(gain, metric) for site, gain in gained.items()}
    hurt = harmed(gained)
    unsure = [site for site, gain in gained.items() if not (gain.above or gain.below)]
    helped = [site for site, gain in gained.items() if gain.above]
    if hurt:
        yield (
            "Worse off than with their own model, by more than the interval: "
            f"{', '.join(f'{site} ({told[site]})' for site in hurt)}."
        )
        others = {name: gains(found, setting, name) for name in methods if name != best}
        known = {name: own for name, own in others.items() if own and min(gain.n for gain in own.values()) > 1}
        better = [name for name, own in known.items() if not harmed(own)]
        if better:
            yield f"No hospital is so with {', '.join(better)}."
    else:
        sure = "" if not unsure else " shown to be"
        yield f"No hospital is{sure} worse off than with its own model (intervals of the difference, paired by seed)."
    if helped:
        yield f"Better off: {', '.join(f'{site} ({told[site]})' for site in helped)}."
    if unsure:
        yield f"Cannot be told: {', '.join(f'{site} ({told[site]})' for site in unsure)}."

"""`consilium site budget`: what differential privacy has cost a site so far, in words and as a figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from shared.accounting import Mechanism, epsilon
from shared.errors import SiteRefusal, UserError

if TYPE_CHECKING:
    from client.ledger import Entry
    from client.policy import Policy

BAR = 40  # characters
MOST_ROUNDS = 100_000  # beyond so many nobody asks how many more fit


def budget(file: Path, plot: Path | None, verify: bool, seal: str) -> tuple[list[str], bool]:
    """The lines to show, and whether the ledger is whole.

    Raises:
        UserError: the site's file is wrong, or the ledger or the figure cannot be read or written.
    """
    from client.ledger import Ledger, ledger_path
    from client.policy import USUAL_DELTA, read_policy
    from shared.sitefile import read_site

    site, policy = read_site(file), read_policy(file)
    if plot is not None and plot.suffix != ".html":
        raise UserError(f"--plot {plot}: write the figure to a name that ends with .html")
    ledger = Ledger(ledger_path(file))
    try:
        entries = ledger.history()
        broken = ledger.verify(seal)
        policy = replace(policy, max_delta=policy.max_delta or max((e.delta for e in entries), default=USUAL_DELTA))
    except SiteRefusal as refusal:
        raise UserError(f"{refusal}; see docs/hospital.md") from None
    if verify or seal or broken:
        return _verified(ledger.path, entries, broken), not broken
    if plot is not None:
        _write_plot(plot, entries, policy, site.name)
    return [*_summary(site.name, entries, policy), *([f"figure: {plot}"] if plot else [])], True


def _verified(path: Path, entries: Sequence[Entry], broken: Sequence[str]) -> list[str]:
    if broken:
        advice = "put the last good copy of the file back; until then every round with privacy.dp is refused"
        return [f"BROKEN: {path}", *(f"  {line}" for line in broken), advice]
    if not entries:
        return [f"{path}: nothing was ever spent, there is no ledger yet"]
    return [
        f"whole: {len(entries)} entries, none changed or removed in between",
        f"seal {entries[-1].seal[:16]} of {entries[-1].time[:16]} UTC; noted elsewhere, `--seal` tells later whether "
        "the last entries are still there",
    ]


def _summary(name: str, entries: Sequence[Entry], policy: Policy) -> list[str]:
    from client.ledger import spent_in

    limit, delta, unit = policy.max_epsilon, policy.max_delta, policy.unit
    head = f"{name}: most epsilon over all time {limit:g}" if limit else f"{name}: no limit (privacy.max_epsilon = 0)"
    lines = [f"{head}, at delta {delta:g}, per {unit}"]
    if not entries:
        return [*lines, "spent: 0; no round with differential privacy was ever begun here"]
    accountant = entries[-1].accountant
    total = epsilon(spent_in(entries), delta, accountant)
    if limit:
        lines += [_bar(total / limit), f"spent: {total:.3f} of {limit:g}, left: {max(0.0, limit - total):.3f}"]
    else:
        lines.append(f"spent: {total:.3f}")
    lines += ["", *_runs(entries, delta, accountant)]
    if len({entry.run for entry in entries}) > 1:
        lines.append("All runs together cost what stands above, not the sum of these lines: they are composed.")
    if unit == "patient" and any(entry.unit == "image" for entry in entries):
        lines.append("Some rounds protected single images only: of a patient with several, more was spent than this.")
    if limit:
        lines += ["", _more(entries, policy)]
    return lines


def _bar(share: float) -> str:
    full = min(BAR, math.ceil(share * BAR - 1e-9))
    return f"[{'#' * full}{'.' * (BAR - full)}] {share:.0%}"


def _runs(entries: Sequence[Entry], delta: float, accountant: str) -> list[str]:
    """A line for each run, in the order they began."""
    from client.ledger import spent_in

    settled = {entry.reserve for entry in entries if entry.kind == "settle"}
    by_run: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.kind == "reserve":
            by_run.setdefault(entry.run, []).append(entry)
    lines = [f"{'run':<24} {'from':<10} {'to':<10} {'rounds':>7} {'steps':>8} {'epsilon':>8}"]
    for run, own in by_run.items():
        cost = epsilon(spent_in(own), delta, accountant)
        open_ = sum(entry.id not in settled for entry in own)
        lines.append(
            f"{run[:24]:<24} {own[0].time[:10]} {own[-1].time[:10]} {len(own):>7} {sum(e.steps for e in own):>8} "
            f"{cost:>8.3f}" + (f"  {open_} of them never ended, counted as spent" if open_ else "")
        )
    return lines


def _more(entries: Sequence[Entry], policy: Policy) -> str:
    """How many more rounds like the last one fit."""
    from client.ledger import spent_in

    last = [entry for entry in entries if entry.kind == "reserve"][-1]
    history = spent_in(entries)

    def fits(rounds: int) -> bool:
        further = Mechanism(last.noise_multiplier, last.sampling_rate, last.steps * rounds)
        return epsilon([*history, further], policy.max_delta, last.accountant) <= policy.max_epsilon

    kind = f"noise {last.noise_multiplier:g}, sampling rate {last.sampling_rate:g}, steps {last.steps}"
    fit = _largest(fits)
    if fit == 0:
        return f"No further round like the last one ({kind}) fits; one with more noise may."
    return f"About {fit}{' or more' if fit >= MOST_ROUNDS else ''} more rounds like the last one fit ({kind})."


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest number up to MOST_ROUNDS that fits, where fewer always do; 0 if not even one."""
    low, high = 0, 1
    while high <= MOST_ROUNDS and fits(high):
        low, high = high, high * 4
    high = min(high, MOST_ROUNDS + 1)
    while high - low > max(1, low // 50):  # to 2 %: about
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _write_plot(path: Path, entries: Sequence[Entry], policy: Policy, name: str) -> None:
    """Epsilon after each reservation against the limit, one colour a run, as one page that needs no network."""
    import os
    import tempfile

    from server.report_style import RED, SERIES, new_figure, plain

    reserved = [entry for entry in entries if entry.kind == "reserve"]
    alt = f"Epsilon of {plain(name)} over time: {len(reserved)} rounds."
    figure = new_figure(420, "Epsilon of all rounds so far, as each round reserved it.", alt)
    figure.update_layout(
        title=f"Privacy budget of {plain(name)}", margin={"t": 60}, paper_bgcolor="white", plot_bgcolor="white"
    )
    colours: dict[str, str] = {}
    for run, group in groupby(reserved, key=lambda entry: entry.run):
        own = list(group)
        first_time = run not in colours
        colour = colours.setdefault(run, SERIES[len(colours) % len(SERIES)])
        figure.add_scatter(
            x=[entry.time for entry in own],
            y=[entry.epsilon for entry in own],
            text=[f"round {entry.round}, noise {entry.noise_multiplier:g}" for entry in own],
            mode="lines+markers",
            line={"color": colour, "shape": "hv"},
            name=plain(f"run {run}"),
            legendgroup=run,
            showlegend=first_time,
        )
    if policy.max_epsilon:
        figure.add_hline(y=policy.max_epsilon, line={"color": RED, "dash": "dash"}, annotation_text="limit")
    figure.update_xaxes(title="time (UTC)")
    figure.update_yaxes(title=f"epsilon at delta {policy.max_delta:g}", rangemode="tozero")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, writing = tempfile.mkstemp(dir=path.parent, suffix=".writing")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(figure.to_html(include_plotlyjs=True))
        os.replace(writing, path)
    except OSError as error:
        raise UserError(f"--plot {path}: cannot be written: {error.strerror}") from None

"""The small pieces a report page is put together from: every text from a file is escaped here, and nowhere else."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

from server.record import Record, has, value_of
from server.wording import metric_name, number


class Markup(str):
    """Text that is HTML already. Whatever else goes into the page is escaped on its way."""


def esc(value: object) -> Markup:
    """The one gate through which text from files reaches the page."""
    return value if isinstance(value, Markup) else Markup(html.escape(str(value)))


def table(caption: str, head: Sequence[object], rows: Iterable[Sequence[object]]) -> Markup:
    """A table whose first column names its rows; on a narrow screen it scrolls sideways on its own."""
    top = "".join(f'<th scope="col">{esc(item)}</th>' for item in head)
    lines = ((esc(first), "".join(f"<td>{esc(item)}</td>" for item in rest)) for first, *rest in rows)
    body = "\n".join(f'<tr><th scope="row">{first}</th>{rest}</tr>' for first, rest in lines)
    return Markup(
        f'<div class="scroll" tabindex="0" role="region" aria-label="{esc(caption)}"><table>'
        f"<caption>{esc(caption)}</caption>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>\n"
    )


def heads(record: Record, metrics: Iterable[str], before: str = "") -> list[Markup]:
    """Column heads for metrics; one of which less is better says so."""
    less = Markup(' <span class="quiet">less is better</span>')
    return [
        Markup(esc(f"{before}{metric_name(metric, not before)}") + (less if record.direction(metric) < 0 else ""))
        for metric in metrics
    ]


def paragraph(text: object, kind: str) -> Markup:
    """Text in a tone: lead, note or good."""
    return Markup(f'<p class="{kind}">{esc(text)}</p>\n')


def folded(title: str, content: Markup, kind: str = "") -> Markup:
    """Content that shows when its title is clicked."""
    return Markup(f'<details class="{kind}"><summary>{esc(title)}</summary>\n{content}</details>\n')


def bullets(items: Iterable[Markup]) -> Markup:
    """A list of warnings."""
    lines = "\n".join(f"<li>{item}</li>" for item in items)
    return Markup(f'<ul class="warnings">\n{lines}\n</ul>\n')


def cell(scores: dict[str, Any], metric: str) -> Markup:
    """A value, in a quieter tone its interval, and of how many cases it is where these are not all."""
    if not has(scores, metric):
        return Markup("–")
    value, reach = number(scores[metric], metric), value_of(scores, metric)
    n = scores["n"][metric]
    more = [reach.removeprefix(value).strip(), "" if n == scores["images"] else f"n {n:,}"]
    return Markup(" ".join([value, *(f'<span class="quiet">{text}</span>' for text in more if text)]))

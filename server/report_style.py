"""How the report looks: colours and themes of its figures, and the frame, the style and the script of the page.

Style and script are text in a module, not files beside it: Flower carries only a few kinds of file to where it runs.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable
from typing import Any

import plotly.graph_objects as go

# Told apart by readers with any colour vision, and at least 3:1 on the light and on the dark page.
BLUE, RED, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#7A8793"
SERIES = (BLUE, RED, GREEN, "#BF5F98", "#7B68C8", "#97751B")
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "x", "triangle-down")
BAND = "rgba(0,114,178,.16)"


def theme(ink: str, muted: str, grid: str, low: str, high: str) -> dict[str, Any]:
    """What of a figure depends on the page being light or dark."""
    axis = {"gridcolor": grid, "linecolor": muted, "zerolinecolor": grid, "tickcolor": muted, "automargin": True}
    axis["title"] = {"font": {"size": 13}, "standoff": 10}
    return {
        "data": {"heatmap": [{"textfont": {"color": ink}}]},
        "layout": {
            "font": {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 13, "color": ink},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "xaxis": axis,
            "yaxis": axis,
            "coloraxis": {"colorscale": [[0, low], [1, high]]},
            "hoverlabel": {"bgcolor": low, "font": {"color": ink}, "bordercolor": muted, "namelength": -1},
        },
    }


THEMES = {
    "light": theme("#1b2430", "#5b6875", "#e1e6ea", "#f3f7fa", "#74b6e3"),
    "dark": theme("#e6eaee", "#a3afba", "#303a45", "#1d252e", "#2b6a99"),
}


def new_figure(height: int, caption: str, alt: str) -> go.Figure:
    """An empty figure; ``caption`` and ``alt`` travel with it to the page."""
    legend = {"orientation": "h", "x": 0, "y": 1.01, "yanchor": "bottom", "itemsizing": "trace"}
    margin = {"l": 10, "r": 12, "t": 10, "b": 10}
    meta = {"caption": caption, "alt": alt}
    return go.Figure(
        layout={"template": THEMES["light"], "height": height, "margin": margin, "legend": legend, "meta": meta}
    )


def fit(figure: go.Figure, values: Iterable[float | None], axis: str = "yaxis", measure: bool = False) -> None:
    """An axis just wide enough for the values; one of shares does not go beyond 0 and 1.

    ``measure``: the values are of any size, not shares; if they span more than one and a half decades the axis is
    logarithmic.
    """
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if not finite:
        return
    low, high = min(finite), max(finite)
    layout: dict[str, Any] = {}
    if measure and low > 0 and high > 30 * low:
        pad = 0.04 * math.log10(high / low)
        layout = {"type": "log", "range": [math.log10(low) - pad, math.log10(high) + pad], "dtick": 1}
    else:
        pad = 0.05 * (high - low) or 0.05 * abs(high) if measure else max(0.05 * (high - low), 0.01)
        share = not measure and low >= 0 and high <= 1
        span = [max(low - pad, 0) if low >= 0 else low - pad, min(high + pad, 1.005) if share else high + pad]
        layout = {"range": span}
    figure.update_layout({axis: layout | ({"exponentformat": "none", "separatethousands": True} if measure else {})})


def plain(name: str, length: int = 26) -> str:
    """A name from a file as a label: shortened, and nothing in it is markup to Plotly."""
    name = " ".join(str(name).split())
    return html.escape(name if len(name) <= length else name[: length - 1] + "…", quote=False)


# ---------------------------------------------------------------------- the page

_SHELL = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:">
<title>$title – Consilium</title>
<style>$style</style>
</head>
<body>
<main>
<header><p class="kicker">Consilium KICKER</p>
<h1>$title</h1>
$head</header>
<section><h2>Warnings</h2>
$warnings</section>
SECTIONS</main>
<script type="application/json" id="figures">$json</script>
<script>$plotly</script>
<script>$script</script>
</body>
</html>
"""


def shell(kicker: str, sections: str) -> str:
    """The template of a page that needs no network: its own head, warnings first, then ``sections``, themselves one.

    Left to be filled in are title, style, head, warnings, json (the figures), plotly and script.
    """
    return _SHELL.replace("KICKER", kicker).replace("SECTIONS", sections)


PAGE = shell(
    "run report",
    """<section><h2>Results</h2>
$results</section>
<section><h2>Sites</h2>
$sites</section>
<section><h2>Figures</h2>
<noscript><p class="note">The figures need JavaScript; the tables hold their main numbers.</p></noscript>
<div class="figures">
$figures</div></section>
$pictures<section><h2>Data</h2>
$data</section>
<section><h2>Job</h2>
$job</section>
<section><h2>Versions</h2>
$versions</section>
""",
)

STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b2430; --muted: #566270; --line: #d8dfe5; --soft: #f5f8fa;
  --accent: #0b5c8f; --warn: #fff6e8; --warn-line: #b35c00; --good: #eef7f1; --good-line: #1f7a4d; }
@media screen and (prefers-color-scheme: dark) { :root { --page: #12181f; --ink: #e6eaee; --muted: #a3afba;
  --line: #303a45; --soft: #1a222b; --accent: #79bfee; --warn: #2a2013; --warn-line: #e39a3b;
  --good: #14251c; --good-line: #5bbd8b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .75rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 2.75rem 0 .75rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 0 0 .5rem; }
.kicker { margin: 0; color: var(--accent); font-weight: 600; font-size: .9rem; }
.lead { font-size: 1.12rem; max-width: 60ch; margin: 0; overflow-wrap: anywhere; }
.note, figcaption, caption { color: var(--muted); font-size: .9rem; }
.note { margin: .5rem 0; overflow-wrap: anywhere; }
.quiet { color: var(--muted); }
.warnings { list-style: none; margin: 0; padding: 0; overflow-wrap: anywhere; }
.warnings li { background: var(--warn); border-left: 4px solid var(--warn-line);
  padding: .5rem .8rem; margin: 0 0 .4rem; }
.good { background: var(--good); border-left: 4px solid var(--good-line); padding: .5rem .8rem; margin: 0; }
code { font: .88em ui-monospace, Consolas, monospace; color: var(--muted); overflow-wrap: anywhere; }
.badge { border: 1px solid var(--warn-line); color: var(--warn-line); border-radius: 1em; padding: 0 .5em;
  font-size: .78rem; }
/* Where a table goes on beyond an edge, there is a shade on that edge. */
.scroll { overflow-x: auto; margin: 0 0 1.25rem; background:
  linear-gradient(to right, var(--page) 40%, transparent) left / 2.5rem 100% no-repeat local,
  linear-gradient(to left, var(--page) 40%, transparent) right / 2.5rem 100% no-repeat local,
  linear-gradient(to right, var(--muted), transparent) left / .8rem 100% no-repeat scroll,
  linear-gradient(to left, var(--muted), transparent) right / .8rem 100% no-repeat scroll; }
.scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)); gap: 1.25rem; }
.pictures img { max-width: 100%; height: auto; background: #000; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
caption { text-align: left; padding: 0 0 .4rem; max-width: calc(100vw - 2rem); }
th, td { padding: .4rem .9rem .4rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
thead th { vertical-align: bottom; font-weight: 600; border-bottom: 2px solid var(--line); min-width: 5.5rem; }
tbody th { font-weight: 600; overflow-wrap: break-word; min-width: 9rem; max-width: 20rem; }
td { white-space: nowrap; } details.prose td { white-space: normal; }
thead .quiet { display: block; font-weight: 400; }
td .quiet { display: block; font-size: .93em; }  /* under its value: eight columns fit the page */
summary { cursor: pointer; color: var(--accent); padding: .25rem 0; }
.figures { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 2rem 2.5rem; }
figure { margin: 0; min-width: 0; break-inside: avoid; } .whole { grid-column: 1 / -1; }
figcaption { margin-top: .4rem; max-width: 75ch; }
@media (max-width: 50rem) { .figures { grid-template-columns: minmax(0, 1fr); }
  main { padding: 1.25rem 1rem 3rem; } h1 { font-size: 1.6rem; } .lead { font-size: 1.05rem; } }
@media print { body { font-size: 11pt; } main { max-width: none; padding: 0; } .scroll { overflow: visible; }
  table { font-size: 8.5pt; }
  .figures { display: block; } figure { margin-bottom: 1.5rem; } h2, h3 { break-after: avoid; }
  tr { break-inside: avoid; }
  td { white-space: normal; }
  .warnings li { break-inside: avoid; } }
"""

SCRIPT = """
'use strict';
const held = JSON.parse(document.getElementById('figures').textContent);
const dark = matchMedia('(prefers-color-scheme: dark)');
function draw(printing) {
  for (const [id, figure] of Object.entries(held.figures)) {
    const place = document.getElementById(id), width = printing ? 680 : place.clientWidth;
    const theme = !printing && dark.matches ? held.themes.dark : held.themes.light;
    const layout = {...figure.layout, width, template: theme};
    layout.legend = {...layout.legend};
    if (width < 480) {  // legend entries stand one below the other: the figure grows by them; a finger scrolls the page
      layout.height += 20 * figure.data.filter(trace => trace.name && trace.showlegend !== false).length;
      layout.font = {size: 11};
      layout.dragmode = false;
    }
    Plotly.react(place, structuredClone(figure.data), structuredClone(layout), {displayModeBar: false});
  }
}
draw(false);
let waiting = 0;
addEventListener('resize', () => { clearTimeout(waiting); waiting = setTimeout(() => draw(false), 150); });
dark.addEventListener('change', () => draw(false));
addEventListener('beforeprint', () => {
  document.querySelectorAll('details').forEach(part => { part.open = true; });
  draw(true);
});
addEventListener('afterprint', () => draw(false));
"""

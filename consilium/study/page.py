"""study.html: what a study says, on one page that needs nothing but a browser, and no network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from string import Template

import plotly.graph_objects as go
from plotly.io.json import to_json_plotly
from plotly.offline import get_plotlyjs

from consilium.study.collect import ALONE, Found
from consilium.study.compare import spread
from consilium.study.figures import gains_figure, methods_figure, on_front, pareto_figure
from consilium.study.tables import budget_row, methods_of, result_row, title_of
from consilium.study.verdict import Verdict, difference, gains, with_sd
from server.record import count
from server.report_parts import Markup, bullets, esc, folded, paragraph, table
from server.report_style import SCRIPT, STYLE, THEMES, shell
from server.wording import metric_name
from shared import __version__

HEADINGS = {
    "methods": "Methods beside each other",
    "gains": "What each hospital gains",
    "pareto": "Metric, traffic and privacy",
}
SEEDS_NOTE = (
    "± is the standard deviation over seeds, brackets are 95 % intervals of the mean over seeds (Student’s t), "
    "differences are paired by seed; both are cut at what the metric can be. They tell how much training varies, not "
    "how other patients would fare: study.csv has the interval of each single run for its test images. A dash: there "
    "is no such figure; hospitals that train alone are several models, none of which is tested on all images."
)
PERSONAL_NOTE = (
    "Methods that leave each hospital a model of its own (FedBN, Ditto, fine-tuning) are judged by these, each on its "
    "hospital’s validation and test images. One AUROC over all hospitals mixes scores of different models, which have "
    "no common order: look at the hospitals. A fine-tuned model is kept where it is better by validation, so by "
    "that it never loses to its common model: whether it gained, the test images tell."
)
BUDGET_NOTE = (
    "Means over the seeds, over all sites together; bytes are the models sent both ways, for training and for the "
    "validations between. Pooled and single-site models (each) take as many gradient steps as the common model, with "
    "the same batch size, tuning and augmentation; models that hospitals have of their own took what is shown beyond. "
    "Rounds and bytes to target: until the validation figure first reached {target}. A dash: there is nothing to count."
)
FRONT_NOTE = (
    "Not beaten: no other method is as good in metric, bytes and epsilon and better in one of them; a dash: one is, or "
    "it is no method but what methods are held against."
)
_PAGE = shell(
    "study",
    """$sections<section><h2>The study</h2>
$study</section>
""",
)


def page(found: Found, verdicts: Sequence[Verdict], text: str) -> str:
    """The whole page; ``text`` is the study's file."""
    figures: dict[str, go.Figure] = {}
    sections = "".join(_section(found, verdicts, setting, figures) for setting in found.plan.settings)
    drawn = {name: figure.to_plotly_json() for name, figure in figures.items()}
    for figure in drawn.values():
        figure["layout"].pop("template")  # the page chooses it by its colour scheme
    content = to_json_plotly({"figures": drawn, "themes": THEMES})
    return Template(_PAGE).substitute(
        title=esc(found.plan.name),
        head=_head(found, verdicts),
        warnings=_warnings(found, verdicts),
        sections=sections,
        study=_study(found, text),
        json=content.replace("<", "\\u003c"),  # in a script element only "<" could end it
        plotly=get_plotlyjs(),
        style=STYLE,
        script=SCRIPT,
    )


def _head(found: Found, verdicts: Sequence[Verdict]) -> Markup:
    """The answer first: for every setting which method, and whether a hospital is worse off."""
    lines = []
    for one in verdicts:
        answer = " ".join([*one.lines[:1], *one.hospitals[:1]])
        lines.append(f"<p>{_whose(found, one, '.')}{esc(answer)}</p>")
    plan = found.plan
    parts = ((plan.methods, "method"), (plan.settings, "setting"), (plan.seeds, "seed"))
    many = ", ".join(count(len(items), what) for items, what in parts) + "."
    if plan.quick:
        lines = [str(paragraph(f"{plan.caution[0].upper()}{plan.caution[1:]}.", "lead"))]
    shown = "\n".join(lines) or paragraph("No cell has finished.", "lead")
    return Markup(shown + paragraph(many, "note"))


def _whose(found: Found, one: Verdict, end: str) -> Markup:
    """What a sentence is about: the setting where there are several, and the level of privacy."""
    parts = [] if found.plan.only else [one.setting]
    name = " ".join([*parts, *([f"({one.level})"] if one.level else [])])
    return Markup(f"<strong>{esc(name)}{end}</strong> " if name else "")


def _titled(found: Found, setting: str, text: str) -> str:
    return f"{text[0].upper()}{text[1:]}" if found.plan.only else f"{setting}: {text}"


def _warnings(found: Found, verdicts: Sequence[Verdict]) -> Markup:
    first = [Markup(f"<strong>{esc(found.plan.caution)}</strong>")] if found.plan.quick else []
    failed = [Markup(f"<strong>Failed: {esc(one.title)}:</strong> {esc(one.reason)}") for one in found.failures]
    told = [Markup(f"{_whose(found, one, ':')}{esc(text)}") for one in verdicts for text in one.warnings]
    if not first + failed + told:
        return paragraph("None: every cell of the study has finished.", "good")
    return bullets(first + failed + told)


def _section(found: Found, verdicts: Sequence[Verdict], setting: str, figures: dict[str, go.Figure]) -> Markup:
    names = methods_of(found, setting)
    if not names:
        return Markup(f"<section><h2>{esc(setting)}</h2>\n{paragraph('No cell has finished.', 'note')}</section>\n")
    metric = next(row.metric for row in found.rows if row.setting == setting)
    told = "".join(_told(one) for one in verdicts if one.setting == setting)
    front = on_front(found, setting)
    head = ["Method", f"{metric_name(metric, True)}, all test {found.cases[setting]}s", "Mean over sites", "Worst site",
            "Worst site, worst seed", "Least gain over alone", "Seeds"]  # fmt: skip
    rows = [[title_of(found, setting, name), *result_row(found, setting, name)] for name in names]
    body = told + table(_titled(found, setting, "what was reached"), head, rows) + paragraph(SEEDS_NOTE, "note")
    if any(row.personal for row in found.rows if row.setting == setting):
        body += paragraph(PERSONAL_NOTE, "note")
    head = ["Method", "Gradient steps", f"{found.cases[setting].capitalize()}s seen", "Rounds", "Sent",
            "Rounds to target", "Bytes to target", "Epsilon", *(["Not beaten"] if front else [])]  # fmt: skip
    rows = [[title_of(found, setting, name), *budget_row(found, setting, name),
             *(["yes" if name in front else "–"] if front else [])] for name in names]  # fmt: skip
    target = f"{found.plan.target:g}" if found.plan.target is not None else ".98 of the pooled model’s best"
    note = BUDGET_NOTE.format(target=target) + (f" {FRONT_NOTE}" if front else "")
    body += table(_titled(found, setting, "at what cost"), head, rows) + paragraph(note, "note")
    body += _sites(found, setting, metric)
    heading = "Results" if found.plan.only else setting
    return Markup(f"<section><h2>{esc(heading)}</h2>\n{body}{_figures(found, setting, figures)}</section>\n")


def _told(one: Verdict) -> str:
    level = Markup(f"<h3>{esc(one.level)}</h3>\n") if one.level else ""
    return level + "".join(f"<p>{esc(line)}</p>\n" for line in (*one.lines, *one.hospitals))


def _sites(found: Found, setting: str, metric: str) -> Markup:
    """Each site's own figure alone, and its gain by method."""
    methods = {name: gains(found, setting, name) for name in found.plan.methods if found.of(setting, name)}
    sites = list(dict.fromkeys(site for gained in methods.values() for site in gained))
    if not sites:
        return Markup("")
    alone = found.of(setting, found.baseline(setting, next(iter(methods)), ALONE))

    def cell(site: str, name: str) -> Markup:
        gain = methods[name].get(site)
        if gain is None or math.isnan(gain.mean):
            return Markup("–")
        text = difference(gain, metric)
        if gain.below and not found.plan.quick:
            return Markup(f'{esc(text)} <span class="badge">worse off</span>')
        return esc(text)

    def own(site: str) -> str:
        return with_sd(spread([row.sites[site] for row in alone.values() if site in row.sites]), metric)

    rows = [[site, own(site), *(cell(site, name) for name in methods)] for site in sites]
    title = _titled(found, setting, "each hospital alone, and what it gains")
    return table(title, ["Site", "Alone", *methods], rows)


def _figures(found: Found, setting: str, figures: dict[str, go.Figure]) -> str:
    made = {"methods": methods_figure(found, setting), "gains": gains_figure(found, setting)}
    made["pareto"] = pareto_figure(found, setting)
    shown = ""
    for name, figure in made.items():
        if figure is not None:
            place = f"figure-{len(figures)}"
            figures[place] = figure
            meta = figure.layout.meta
            shown += (
                f'<figure class="whole"><h3>{esc(HEADINGS[name])}</h3>\n<div class="plot" id="{place}" role="img" '
                f'aria-label="{esc(HEADINGS[name])}. {esc(meta["alt"])}"></div>\n'
                f"<figcaption>{esc(meta['caption'])}</figcaption></figure>\n"
            )
    return f'<div class="figures">\n{shown}</div>\n'


def _study(found: Found, text: str) -> Markup:
    lines: str = paragraph(f"Consilium {__version__}. Every cell is a run folder under cells/, with its job.", "note")
    jobs = {method: job for (_, method), job in found.jobs.items()}
    if len(jobs) > 1:
        flats = {name: job.flat() for name, job in jobs.items()}
        first = next(iter(flats.values()))
        differ = [key for key in first if key not in ("name", "seed") and len({f[key] for f in flats.values()}) > 1]
        rows = [[Markup(f"<code>{esc(key)}</code>"), *(flat[key] for flat in flats.values())] for key in differ]
        title = "Settings in which the methods differ, in the last setting"
        lines += table(title, ["Setting", *flats], rows) if rows else Markup("")
    return Markup(lines + folded("The study’s file", Markup(f"<pre><code>{esc(text)}</code></pre>\n")))

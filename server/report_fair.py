"""The parts of the report on what the figures mean for whom: the operating point, fairness at a glance, every model at
every site, and where the time went."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.coverage import few_words
from server.operating import FIGURES
from server.record import ONLY, Record, count, has, value_of
from server.report_parts import Markup, bullets, cell, esc, folded, paragraph, table
from server.timing import PARTS
from server.wording import metric_name, number, with_interval

NAMES = {
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "ppv": "Positive predictive value",
    "npv": "Negative predictive value",
    "prevalence": "Share that has it",
}
TIMES = {"train": "Training", "transfer": "Transfer and queues", "wait": "Waiting for others"}
MOST = 20  # models and sites of a matrix that is shown unfolded


def estimate(found: Mapping[str, Any]) -> str:
    """A share with its interval; a dash where there is none."""
    return with_interval(found["value"], found["low"], found["high"])


def operating_words(point: Mapping[str, Any]) -> str:
    """How the operating point was chosen, in one sentence."""
    return (
        f"The threshold was chosen on {count(point['images'], 'validation case')} of "
        f"{point.get('whose', 'the sites that told theirs')} ({point['words']}) and is only reported here, on the test "
        f"cases.{few_words(point['images'])}"
    )


def operating(record: Record) -> Markup:
    """Sensitivity, specificity and predictive values at the threshold that the validation images chose."""
    point = record.scores["federated"].get("operating_point")
    if not point:
        return Markup("")
    rows: list[list[object]] = []
    places: list[list[object]] = []
    for name, facts in point["classes"].items():
        if facts["threshold"] is None:
            rows.append([name, "none: the validation images have not both kinds of cases", *["–"] * len(FIGURES)])
            continue
        if "test" in facts:
            rows.append([name, number(facts["threshold"]), *(estimate(facts["test"][figure]) for figure in FIGURES)])
        for site, found in facts.get("sites", {}).items():
            places.append([site, name, *(estimate(found[figure]) for figure in FIGURES)])
    heads = [NAMES[figure] for figure in FIGURES]
    page: str = table(
        f"At the operating point, test cases of {record.whose('test')}", ["Class", "Yes from", *heads], rows
    )
    page += paragraph(operating_words(point) + " Predictive values hold for the share that has it.", "note")
    if places:
        caption = "The same threshold on each site’s own test cases"
        page += folded("The operating point at each site", table(caption, ["Site", "Class", *heads], places))
    return Markup(page)


def fairness(record: Record) -> Markup:
    """Worst site, spread over the sites, and subgroups as far as sites tell of them."""
    own, metric = record.scores["federated"], record.metric
    lines = [esc(line) for line in fairness_lines(record)]
    if not lines:
        return Markup("")
    page: str = Markup("<h3>Fairness at a glance</h3>\n") + bullets(lines)
    found = own.get("subgroups")
    if found and found["groups"]:
        page += table(
            f"Subgroups: the federated model on test {record.case}s of the sites that tell of them",
            ["Group", f"Test {record.case}s", "Sites", metric_name(metric, True), *_point_heads(found["groups"])],
            [
                [group_name(row), f"{row['images']:,}", len(row["told_by"]), cell(row, metric), *_point_cells(row)]
                for row in found["groups"].values()
            ],
        )
        page += paragraph(SUPPRESSED, "note")
    return Markup(page)


def group_name(row: Mapping[str, Any]) -> str:
    """A group of patients as people read it."""
    return f"{row['dimension']} {row['label']}"


OVERLAP = " The intervals of the lowest and the highest site overlap: such a spread may be chance."
SUPPRESSED = (
    "A site leaves out groups of fewer than five cases, or with fewer than five of a class, and more groups where one "
    "that is left out would follow from the rest. “other” holds those whose group is not known."
)


def _point_heads(groups: Mapping[str, Any]) -> list[str]:
    there = any("operating_point" in row for row in groups.values())
    return ["Sensitivity", "Specificity"] if there else []


def _point_cells(row: Mapping[str, Any]) -> list[str]:
    """Of several classes, the first's: the others stand in result.json."""
    point = next(iter(row.get("operating_point", {}).values()), None)
    return [] if point is None else [estimate(point["sensitivity"]), estimate(point["specificity"])]


def fairness_lines(record: Record) -> list[str]:
    """Fairness in a few sentences: worst site, spread, the widest gap between groups, who tells of none."""
    own, metric = record.scores["federated"], record.metric
    sites = {name: found for name, found in own.get("sites", {}).items() if has(found, metric)}
    lines = []
    if len(sites) > 1:
        values = [found[metric] for found in sites.values()]
        lines.append(f"Worst site: {record.worst}, {metric_name(metric)} {value_of(sites[record.worst], metric)}.")
        spread = f"Spread over {count(len(sites), 'site')}: {number(max(values) - min(values), metric)}."
        lines.append(spread + (OVERLAP if _overlap(sites, metric) else ""))
    if found := own.get("subgroups"):
        for dimension in found["asked"]:
            lines.append(_of_dimension(record, found["groups"], dimension))
        if found["silent"]:
            lines.append(
                f"No figures by group from {', '.join(found['silent'])}: the site’s rules do not name the groups, or "
                "they are too small there."
            )
    return lines


def _overlap(sites: Mapping[str, Any], metric: str) -> bool:
    """Whether the intervals of the lowest and of the highest site have a value in common."""
    ordered = sorted(sites.values(), key=lambda found: float(found[metric]))
    high, low = ordered[0]["intervals"][metric][1], ordered[-1]["intervals"][metric][0]
    return has({"end": high}, "end") and has({"end": low}, "end") and bool(low <= high)


def _of_dimension(record: Record, groups: Mapping[str, Any], dimension: str) -> str:
    metric = record.metric
    own = {row["label"]: row for row in groups.values() if row["dimension"] == dimension and has(row, metric)}
    if not own:
        return f"By {dimension}: no site tells figures."
    ordered = sorted(own, key=lambda label: record.sign * own[label][metric])
    told = [f"{label} {value_of(own[label], metric)}" for label in ordered]
    if len(own) == 1:
        return f"By {dimension}: only {told[0]} is told."
    gap = number(abs(own[ordered[-1]][metric] - own[ordered[0]][metric]), metric)
    return f"By {dimension}: from {told[0]} to {told[-1]}, a gap of {gap}."


def matrix(record: Record) -> Markup:
    """Each site's own model and the federated one on every site's test images."""
    found = record.scores.get("cross_site")
    if not found:
        return Markup("")
    metric, sites = found["metric"], found["sites"]

    def value(model: str, site: str) -> Markup:
        figure, low, high, n = found["models"][model].get(site, [None, None, None, 0])
        shown = with_interval(figure, low, high, metric)
        own = model == f"only {site}"
        text = Markup(f"<strong>{esc(shown)}</strong>") if own else esc(shown)
        return Markup(f'<span title="n {n:,}">{text}</span>')

    names = {model: model.replace("only ", ONLY).replace("federated", "Federated") for model in found["models"]}
    rows = [[names[model], *(value(model, site) for site in sites)] for model in found["models"]]
    title = f"Every model at every site: {metric_name(metric)} (bold: at home)"
    content = table(title, ["Trained on", *(f"Tested at {site}" for site in sites)], rows)
    return folded("Every model at every site", content) if len(sites) > MOST else content


def times(record: Record) -> Markup:
    """Where the rounds' time went."""
    found = record.scores["federated"].get("time") or {}
    if found.get("wait") is None:
        return Markup("")
    rows = [
        [TIMES[part], "not told by every site" if found[part] is None else f"{found[part]:.1f} s"] for part in PARTS
    ]
    note = "Mean over the sites, summed over the rounds. In a simulation a site also queues for a worker process."
    return Markup(table("Where the time of the rounds went", ["Part", "Seconds"], rows) + paragraph(note, "note"))

"""The model card on the operating point and on groups of patients."""

from __future__ import annotations

from typing import Any

from server.markdown import listed, plain, table
from server.operating import FIGURES
from server.record import Record, value_of
from server.report_fair import NAMES, SUPPRESSED, estimate, fairness_lines, group_name, operating_words
from server.wording import metric_name, number


def operating(own: dict[str, Any]) -> str:
    """The threshold of each class and what it does on the test cases; "" where there is none."""
    point = own.get("operating_point")
    if not point:
        return ""
    rows = [
        [plain(name), number(facts["threshold"]), *(estimate(facts["test"][figure]) for figure in FIGURES)]
        for name, facts in point["classes"].items()
        if "test" in facts
    ]
    if not rows:
        return "\n\nOperating point: none could be chosen on the validation images."
    text = table(["Class", "Yes from", *(NAMES[figure] for figure in FIGURES)], rows)
    return f"\n\nOperating point:\n\n{text}\n\n{operating_words(point)}"


def subgroups(record: Record) -> str:
    """Fairness at a glance, and the figures of each group that some site tells of."""
    found = record.scores["federated"].get("subgroups")
    text = "".join(f"\n\n{listed(plain(line) for line in lines)}" for lines in [fairness_lines(record)] if lines)
    if not found:
        return f"{text}\n\nFigures of subgroups (sex, age, scanner): the job did not ask for any."
    rows = [
        [plain(group_name(row)), f"{row['images']:,}", str(len(row["told_by"])), value_of(row, record.metric)]
        for row in found["groups"].values()
    ]
    if rows:
        head = ["Group", f"Test {record.case}s", "Sites that tell", metric_name(record.metric, True)]
        text += f"\n\nBy group:\n\n{table(head, rows)}\n\n{SUPPRESSED}"
    return text

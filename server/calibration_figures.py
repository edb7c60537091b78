"""The report's reliability curve: of the cases that the model gave some probability of a finding, what share has it."""

from __future__ import annotations

import plotly.graph_objects as go

from server.outcome_figures import classifier_parts
from server.record import Record
from server.report_style import GREY, SERIES, new_figure, plain
from server.wording import with_interval
from shared.tasks.classification.calibration import brier, calibration_error, reliability


def calibration(record: Record, prefix: str = "") -> go.Figure | None:
    """Observed share against predicted probability in ten groups, of each class; above the line the model is shy."""
    parts, mirrored = classifier_parts(record, prefix)
    shown = [(name, pos, neg, error) for name, pos, neg in parts if (error := calibration_error(pos, neg)).n]
    if not shown:
        return None
    words = [
        f"{name}: calibration error {with_interval(error.value, error.low, error.high)}, "
        f"Brier score {with_interval(score.value, score.low, score.high)}"
        for name, pos, neg, error in shown
        for score in [brier(pos, neg)]
    ]
    caption = f"Test {record.case}s of {record.whose('test')} in ten groups of predicted probability; "
    caption += "bars: 95 % intervals (Wilson). "
    caption += "A model whose probabilities mean what they say lies on the dotted line. Less is better of both figures."
    caption += f" Shown for {parts[0][0]}; the other class mirrors it." if mirrored else ""
    figure = new_figure(360 + 20 * len(shown), caption, "; ".join(words))
    line = {"color": GREY, "width": 1, "dash": "dot"}
    figure.add_scatter(x=[0, 1], y=[0, 1], mode="lines", line=line, hoverinfo="skip", showlegend=False)
    for place, ((name, pos, neg, _), text) in enumerate(zip(shown, words, strict=True)):
        groups, colour = reliability(pos, neg), SERIES[place % len(SERIES)]
        figure.add_scatter(
            x=[group.predicted for group in groups], y=[group.observed.value for group in groups],
            error_y={
                "array": [group.observed.high - group.observed.value for group in groups],
                "arrayminus": [group.observed.value - group.observed.low for group in groups],
                "thickness": 1, "width": 3,
            },
            mode="lines+markers", line={"color": colour, "width": 2}, marker={"size": 7},
            name=plain(name, 20) + text.removeprefix(name), customdata=[group.n for group in groups],
            hovertemplate="predicted %{x:.1%}, observed %{y:.1%} of %{customdata}",
        )  # fmt: skip
    figure.update_xaxes(title="predicted probability", range=[-0.01, 1.01], tickformat=".0%")
    figure.update_yaxes(title="share that has it", range=[-0.01, 1.02], tickformat=".0%")
    return figure

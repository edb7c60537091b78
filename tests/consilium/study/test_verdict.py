"""What is said of crafted results: the sentences follow from the figures, and claim no more than they show."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import replace
from typing import Any

import pytest

from consilium.study.collect import ALONE, POOLED, Found, Row, _best, _to_target
from consilium.study.figures import gains_figure, methods_figure, on_front, pareto_figure
from consilium.study.page import page
from consilium.study.plan import TRIVIAL, Plan
from consilium.study.tables import SITE_COLUMNS, budget_row, methods_of, result_row, sites_csv, size, study_csv
from consilium.study.verdict import Verdict, gains, harmed, verdicts
from shared.config import Job

SEEDS = (0, 1, 2, 3)
SETTING = "X-rays <b>"
Sites = dict[str, float]


def rows(method: str, by_seed: list[Sites], bump: float = 0.0, **more: Any) -> list[Row]:
    """Rows of a method: each site's figure by seed; the figure of all images is their mean."""
    return [
        Row(
            **({"setting": SETTING, "method": method, "seed": seed, "metric": "auroc", "sign": 1, "sites": sites,
                "value": sum(sites.values()) / len(sites), "validation": sum(sites.values()) / len(sites) + bump,
                "steps": 100, "examples": 3200, "rounds": 50, "bytes": 4_000_000} | more)
        )
        for seed, sites in enumerate(by_seed)
    ]  # fmt: skip


def wobble(a: float, b: float, seeds: int = 4) -> list[Sites]:
    """Two sites whose figures vary a little from seed to seed."""
    shifts = (0.001, -0.002, 0.002, -0.001)[:seeds]
    return [{"north": a + shift, "south": b - shift} for shift in shifts]


def found(*groups: list[Row], levels: dict[str, str] | None = None, about: str = "") -> Found:
    methods = tuple(dict.fromkeys(row.method for group in groups for row in group))
    methods = tuple(name for name in methods if name not in (POOLED, ALONE, TRIVIAL))
    given = {(SETTING, method): (levels or {}).get(method, "") for method in methods}
    plan = Plan("study", (SETTING,), methods, given, SEEDS, None, ())
    every = tuple(row for group in groups for row in group)
    return Found(plan, every, (), {SETTING: about} if about else {}, {SETTING: "image"}, {}, {})


def told(one: Verdict) -> str:
    return " ".join((*one.lines, *one.hospitals, *one.warnings))


def test_a_hospital_that_is_worse_off_is_named_and_so_is_the_method_that_spares_it() -> None:
    case = found(
        rows(ALONE, wobble(0.80, 0.95), value=math.nan),
        rows("common", wobble(0.95, 0.90), bump=0.01),
        rows("personal", wobble(0.90, 0.95)),
    )
    (one,) = verdicts(case)
    assert one.method == "common"
    assert harmed(gains(case, SETTING, "common")) == ["south"]
    assert one.hospitals[0].startswith("Worse off than with their own model, by more than the interval: south (−.050")
    assert "No hospital is so with personal." in one.hospitals
    assert "Better off: north (+.150" in told(one)


def test_the_choice_is_by_validation_even_if_the_test_says_otherwise_and_both_are_told() -> None:
    case = found(rows("first", wobble(0.90, 0.90), bump=0.05), rows("second", wobble(0.93, 0.93)))
    (one,) = verdicts(case)
    assert one.method == "first"
    assert "On the test images it is worse than second (−.030" in told(one)
    assert "which validation did not show" in told(one)
    assert "is not known: there is no single-site model" in told(one)


def test_sites_that_keep_parts_are_compared_within_each_since_their_scores_have_no_common_order() -> None:
    """One site sees nearly one class only: a model of its own that always says so looks skilful over all sites."""
    case = found(
        rows("common", wobble(0.95, 0.95), validation=0.97, at_sites=0.94),
        rows("own", wobble(0.80, 0.80), validation=0.999, at_sites=0.90),
    )
    assert [one.method for one in verdicts(case)] == ["own"]  # all methods end in one model: over all images
    jobs = {(SETTING, "common"): Job(), (SETTING, "own"): Job().replace(federation__local="norm")}
    (one,) = verdicts(replace(case, jobs=jobs))
    assert one.method == "common"
    assert "common is best (by validation within each hospital, 4 seeds)" in one.lines[0]


def test_models_of_their_own_must_be_shown_to_be_better_than_one_for_all() -> None:
    better = [{"north": 0.95, "south": 0.95}] * 4
    firmly, barely = (0.97, 0.98, 0.97, 0.98), (0.96, 0.94, 0.97, 0.94)

    def chosen(validation: tuple[float, ...], seeds: int = 4) -> Verdict:
        own = [replace(row, at_sites=value) for row, value in zip(rows("own", better), validation, strict=True)]
        case = found(
            rows("common", better, at_sites=0.95)[:seeds], rows("worse", better, at_sites=0.9)[:seeds], own[:seeds]
        )
        own_jobs = {(SETTING, "own"): Job().replace(federation__local="norm")}
        return verdicts(replace(case, jobs={(SETTING, "common"): Job(), (SETTING, "worse"): Job()} | own_jobs))[0]

    assert chosen(firmly).method == "own"
    one = chosen(barely)
    assert one.method == "common"
    words = (
        "common is best (one model for all; by validation within each hospital own is not shown to be better, 4 seeds)"
    )
    assert one.lines[0].startswith(words)
    assert chosen(barely, seeds=1).method == "own", "of one seed nothing is known but the figure"


def test_what_is_said_of_sites_own_models_is_of_each_on_its_own_images() -> None:
    """Over all images their scores, which have no common order, look poor; in every hospital they are the best."""
    case = found(
        rows(TRIVIAL, wobble(0.90, 0.90), value=0.93),
        rows(POOLED, wobble(0.95, 0.95), value=0.96),
        rows("common", wobble(0.94, 0.94), value=0.95, at_sites=0.94),
        rows("own", wobble(0.97, 0.98), value=0.80, at_sites=0.97, bytes=9_000_000),
        about="logistic regression",
    )
    assert case.compared(SETTING, "own")[0] == 0.80
    jobs = {(SETTING, "common"): Job(), (SETTING, "own"): Job().replace(federation__local="norm")}
    case = replace(case, jobs=jobs)
    (one,) = verdicts(case)
    assert one.method == "own"
    assert "AUROC .975 ± .000 on each hospital’s own test images, in the mean over the hospitals" in one.lines[0]
    assert "all data in one place .950 ± .000, of which it reaches 102.6%" in one.lines[0]
    assert "It is better, by more than chance, than common (+.035" in told(one)
    assert not one.warnings
    assert on_front(case, SETTING) == {"common", "own"}  # as one is better and the other cheaper
    figure = pareto_figure(case, SETTING)
    assert figure is not None
    assert figure.layout.yaxis.title.text == "AUROC, mean over sites (bars: sd over seeds)"


def test_validation_within_sites_is_of_the_best_round_and_counts_images() -> None:
    def event(number: int, whole: float, a: float | None, b: float | None, split: str = "val") -> dict[str, Any]:
        sites = {"a": {"auroc": {"value": a}}, "b": {"auroc": {"value": b}}}
        facts = {"event": "evaluation", "split": split, "round": number, "sites": sites}
        return facts | {"metrics": {"auroc": {"value": whole}}, "site_images": {"a": 30, "b": 10}}

    events = [event(0, 0.99, 0.1, 0.1), event(5, 0.8, 0.7, 0.9), event(10, 0.9, 0.6, 0.8), event(10, 1.0, 0, 0, "test")]
    assert _best(events, "auroc", 1) == pytest.approx({"validation": 0.9, "at_sites": (30 * 0.6 + 10 * 0.8) / 40})
    assert _best(events, "auroc", -1)["at_sites"] == pytest.approx((30 * 0.7 + 10 * 0.9) / 40)
    assert _best([event(5, 0.8, None, 0.9)], "auroc", 1)["at_sites"] == pytest.approx(0.9)  # one class only at a
    assert math.isnan(_best([event(5, 0.8, None, None)], "auroc", 1)["at_sites"])
    assert _best(events[:1], "auroc", 1) == {}


def test_what_cannot_be_told_is_not_claimed() -> None:
    noisy = [{"north": value, "south": value} for value in (0.80, 0.95, 0.85, 0.90)]
    other = [{"north": value, "south": value} for value in (0.90, 0.84, 0.92, 0.82)]
    (one,) = verdicts(found(rows(ALONE, other, value=math.nan), rows("a", noisy), rows("b", other)))
    assert "It cannot be told from b" in told(one)
    assert "It is better" not in told(one)
    assert one.hospitals[0] == (
        "No hospital is shown to be worse off than with its own model (intervals of the difference, paired by seed)."
    )


def test_no_interval_reaches_beyond_what_the_metric_can_be_and_the_chart_shows_all_of_it() -> None:
    """Two seeds: Student's t makes an interval thirteen times as wide as the standard error."""
    case = found(
        rows(ALONE, [{"north": 0.4}, {"north": 0.9}], value=math.nan),
        rows("a", [{"north": 0.78}, {"north": 0.94}]),
    )
    assert result_row(case, SETTING, "a")[0] == ".860 ± .113 [.000, 1.000]"
    assert "[−1.000, +1.000]" in result_row(case, SETTING, "a")[4]
    figure = methods_figure(case, SETTING)
    assert figure is not None
    (bar,) = [trace.error_x for trace in figure.data if trace.error_x.array]
    assert (0.86 - bar.arrayminus[0], 0.86 + bar.array[0]) == pytest.approx((0, 1))
    low, high = figure.layout.xaxis.range
    assert low <= 0
    assert high >= 1


def test_one_seed_says_nothing_about_chance() -> None:
    case = found(rows(ALONE, wobble(0.95, 0.80, 1), value=math.nan), rows("a", wobble(0.9, 0.9, 1)))
    (one,) = verdicts(case)
    assert "One seed: whether any difference is more than chance cannot be told." in one.warnings
    assert one.hospitals == ("Below their own single-site model: north; with one seed this may be chance.",)


def test_a_network_that_does_not_beat_the_trivial_model_is_warned_of() -> None:
    nothing = rows(TRIVIAL, [{"north": 0.93, "south": 0.93}] * 4)
    (one,) = verdicts(found(nothing, rows("a", wobble(0.90, 0.90)), about="Otsu’s threshold"))
    assert "a is not shown to be better than next to nothing: Otsu’s threshold reaches AUROC .930" in one.warnings[0]
    (fine,) = verdicts(found(nothing, rows("a", wobble(0.97, 0.97)), about="Otsu’s threshold"))
    assert not fine.warnings


def test_each_level_of_privacy_has_its_recommendation_and_its_price() -> None:
    case = found(
        rows("open", wobble(0.95, 0.95)),
        rows("hidden", wobble(0.90, 0.90), epsilon=8.0),
        rows("more hidden", wobble(0.80, 0.80), epsilon=8.0, bytes=9_000_000),
        levels={"hidden": "local, epsilon 8", "more hidden": "local, epsilon 8"},
    )
    plain, private = verdicts(case)
    assert (plain.level, plain.method) == ("", "open")
    assert private.method == "hidden"
    assert "Privacy (local, epsilon 8) costs: AUROC −.050" in told(private)
    assert on_front(case, SETTING) == {"open", "hidden"}


def test_where_less_is_better_the_signs_turn() -> None:
    less = {"metric": "mse", "sign": -1}
    case = found(
        rows(ALONE, wobble(0.3, 0.1), value=math.nan, **less),
        rows("good", wobble(0.2, 0.2), **less),
        rows("bad", wobble(0.4, 0.4), **less),
    )
    (one,) = verdicts(case)
    assert one.method == "good"
    assert "It is better, by more than chance, than bad (+0.200" in told(one) or "than bad (+.200" in told(one)
    assert harmed(gains(case, SETTING, "good")) == ["south"]
    assert case.of(SETTING, "bad")[0].worst == pytest.approx(0.401)
    assert on_front(case, SETTING) == {"good"}


def test_the_model_a_hospital_ends_up_with_is_the_one_that_counts() -> None:
    case = found(
        rows(ALONE, wobble(0.90, 0.90), value=math.nan),
        rows("own", wobble(0.80, 0.95), personal={"north": 0.93}),
    )
    assert case.of(SETTING, "own")[0].own == {"north": 0.93, "south": pytest.approx(0.949)}
    assert not harmed(gains(case, SETTING, "own"))


def test_rounds_and_bytes_are_counted_to_the_first_validation_that_is_good_enough() -> None:
    events: list[dict[str, Any]] = []
    for number, value in enumerate((0.5, 0.7, 0.9, 0.85, 0.95)):
        if number:
            events.append({"event": "round", "round": number, "bytes": {"a": [10, 5], "b": [10, 5]}})
        events.append({"event": "evaluation", "split": "val", "round": number, "metrics": {"auroc": {"value": value}}})
    assert _to_target(events, "auroc", 1, 0.9) == (2.0, 60.0)
    assert _to_target(events, "auroc", 1, 0.99) == (math.inf, math.inf)
    assert _to_target(events, "auroc", -1, 0.6) == (0.0, 0.0)
    assert all(map(math.isnan, _to_target(events, "auroc", 1, math.nan)))


def test_tables_hold_every_row_and_nothing_from_a_name_becomes_markup() -> None:
    case = found(
        rows(POOLED, wobble(0.96, 0.96)),
        rows(ALONE, wobble(0.80, 0.95), value=math.nan),
        rows("a", wobble(0.95, 0.90), to_target=(10.0, 800_000.0)),
        rows("b", wobble(0.95, 0.90), to_target=(math.inf, math.inf)),
    )
    assert methods_of(case, SETTING) == [ALONE, POOLED, "a", "b"]
    assert len(list(csv.DictReader(io.StringIO(study_csv(case))))) == 16
    sites = list(csv.DictReader(io.StringIO(sites_csv(case))))
    assert tuple(sites[0]) == SITE_COLUMNS
    assert {line["alone"] for line in sites if line["method"] == "a" and line["site"] == "north"} == {
        "0.801", "0.798", "0.802", "0.799",
    }  # fmt: skip
    assert budget_row(case, SETTING, "a")[3:6] == ["4 MB", "10 (4 of 4 seeds)", "800 kB"]
    assert budget_row(case, SETTING, "b")[4] == "never (0 of 4 seeds)"
    assert result_row(case, SETTING, "a")[-1] == "4 of 4"
    whole = page(case, verdicts(case), "name = '<script>'")
    assert "X-rays &lt;b&gt;" in whole
    assert "X-rays <b>" not in whole
    assert "&lt;script&gt;" in whole
    for make in (methods_figure, gains_figure, pareto_figure):
        figure = make(case, SETTING)
        assert figure is not None
        assert "a" in figure.layout.meta["alt"]


def test_bytes_are_told_in_the_unit_that_fits() -> None:
    assert [size(n) for n in (12, 1500, 12_340_000, 5.1e9)] == ["12 B", "1.5 kB", "12.3 MB", "5.1 GB"]


def test_of_a_method_of_which_too_little_is_known_it_is_not_said_that_it_spares_the_hospitals() -> None:
    case = found(
        rows(ALONE, wobble(0.80, 0.95), value=math.nan),
        rows("common", wobble(0.95, 0.90), bump=0.01),
        rows("once", wobble(0.90, 0.95, seeds=1)),
    )
    (one,) = verdicts(case)
    assert one.method == "common"
    assert one.hospitals[0].startswith("Worse off")
    assert not any("once" in line for line in one.hospitals)

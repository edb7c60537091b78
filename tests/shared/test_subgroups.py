"""Which groups a job asks for, and who belongs to which: everybody to exactly one of each kind."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.config import job_from_flat
from shared.errors import UserError
from shared.subgroups import OTHER, group_sums, groups_of, parse_subgroups, sums_of_groups


def test_the_usual_groups_need_no_values() -> None:
    sex, age = parse_subgroups("sex, age")
    assert sex.labels == ("F", "M")
    assert age.labels == ("<18", "18-39", "40-64", ">=65")


@pytest.mark.parametrize(
    ("text", "value", "label"),
    [
        ("sex", "female", "F"), ("sex", "M", "M"), ("sex", "männlich", "M"), ("sex", "O", OTHER), ("sex", "", OTHER),
        ("age", "17.9", "<18"), ("age", "18", "18-39"), ("age", "64", "40-64"), ("age", "65", ">=65"),
        ("age", "unknown", OTHER), ("age", "-3", OTHER), ("age", "999", OTHER), ("age", "nan", OTHER),
        ("age", "045Y", "40-64"), ("age", "006M", "<18"), ("age=50", "49.99", "<50"), ("age=50", "50", ">=50"),
        ("scanner=Siemens|GE Medical", "SIEMENS Healthineers Ysio", "Siemens"), ("scanner=Siemens|GE", "Agfa", OTHER),
        ("smoker=yes|no", "YES", "yes"), ("smoker=yes|no", "yes and no", OTHER),
    ],
)  # fmt: skip
def test_a_patient_is_in_the_group_that_the_value_says(text: str, value: str, label: str) -> None:
    assert parse_subgroups(text)[0].label_of(value) == label


@settings(deadline=None)
@given(st.lists(st.integers(1, 120), min_size=1, max_size=5, unique=True), st.floats(0, 149))
def test_bands_of_age_leave_no_gap_and_do_not_overlap(edges: list[int], age: float) -> None:
    [band] = parse_subgroups("age=" + "|".join(map(str, sorted(edges))))
    place = band.labels.index(band.label_of(repr(age)))
    bounds = [0, *sorted(edges), 150]
    assert bounds[place] <= age < bounds[place + 1]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("scanner", "name the values"), ("age=65|18", "rise"), ("age=0|5", "rise"), ("age=x", "rise"),
        ("9=a", "is no name"),
        ("sex, sex", "twice"), ("smoker=yes|Yes", "twice"), ("smoker=other", "cannot be"),
        ("smoker=a/b=c", "cannot be"),
    ],
)  # fmt: skip
def test_what_is_written_wrong_is_one_line(text: str, what: str) -> None:
    with pytest.raises(UserError, match=what):
        job_from_flat({"evaluation.subgroups": text})


def test_invented_images_have_no_groups() -> None:
    with pytest.raises(UserError, match="no patients"):
        job_from_flat({"task": "generation", "evaluation.subgroups": "sex"})


def test_sums_of_groups_go_flat_and_back() -> None:
    job = job_from_flat({"evaluation.subgroups": "sex, scanner=a/b|c"})
    parts = {name: {"n": k, "h": [k, 1]} for k, name in enumerate(groups_of(job))}
    assert list(parts) == ["sex=F", "sex=M", "sex=other", "scanner=a/b", "scanner=c", "scanner=other"]
    assert sums_of_groups(group_sums(parts), parts) == parts  # type: ignore[arg-type]

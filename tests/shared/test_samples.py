"""The table a partition writes: whatever a sample holds comes back from it."""

from __future__ import annotations

import math
import string
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.cases import SPLITS, Sample, SiteData
from shared.config import Job, job_from_flat
from shared.errors import SiteRefusal
from shared.samples import read_samples, write_cases
from shared.tasks import TASKS

# Names a file system allows and a table must not stumble over.
FILES = [
    "a.png",
    "b c.png",
    'quote".png',
    "komma,.png",
    "line\n.png",
    "Icon\r",
    "ß肺😀.png",
    "=1+1",
    "[1]",
    "deep/series",
]
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
NUMBERS = st.floats(allow_nan=False)
SAMPLES = st.builds(
    Sample,
    path=st.sampled_from(FILES),
    target=st.lists(st.integers(0, 9), max_size=3).map(tuple),
    patient=TEXT,
    split=st.sampled_from(SPLITS),
    frame=st.integers(0, 500) | st.just("middle"),
    box=st.none() | st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS),
    key=st.text(string.ascii_letters + "_,\"'", max_size=6),
    mask=TEXT,
    boxes=st.lists(st.tuples(st.integers(0, 9), NUMBERS, NUMBERS, NUMBERS, NUMBERS), max_size=3).map(tuple),
    paths=st.lists(TEXT, max_size=3).map(tuple),
    values=st.lists(st.floats(), max_size=3).map(tuple),
    size=st.none() | st.tuples(st.integers(1, 9), st.integers(1, 9)),
    fault=st.none() | st.tuples(st.just("unknown-class"), st.text(max_size=9)),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cases")
    for name in FILES:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).touch()
    return root


def read(folder: Path, text: str, job: Job) -> list[Sample]:
    (folder / "cases.csv").write_text(text, encoding="utf-8", newline="")
    return read_samples(SiteData("s", folder, "cases", "cases.csv"), job)


def same(one: Sample, other: Sample) -> bool:
    """Equal, where NaN equals NaN."""
    return repr(one) == repr(other)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(samples=st.lists(SAMPLES, min_size=1, max_size=4), task=st.sampled_from(sorted(TASKS)))
def test_samples_written_as_cases_are_read_back_by_every_task(folder: Path, samples: list[Sample], task: str) -> None:
    found = read(folder, write_cases(samples), job_from_flat({"task": task}))
    expected = sorted(samples, key=lambda sample: sample.id)
    assert len(found) == len(expected)
    assert all(same(one, other) for one, other in zip(found, expected, strict=True))


def test_a_missing_number_stays_missing(folder: Path) -> None:
    (found,) = read(folder, write_cases([Sample("a.png", (), "p", "train", values=(math.nan, 2.0))]), Job())
    assert math.isnan(found.values[0])
    assert found.values[1] == 2.0


def test_cases_are_capped_like_any_other_samples(folder: Path) -> None:
    samples = [Sample("a.png", (k % 2,), str(k), "train", frame=k) for k in range(10)]
    job = job_from_flat({"data.max_per_class": 2})
    found = read(folder, write_cases(samples), job)
    assert sorted(sample.target for sample in found) == [(0,), (0,), (1,), (1,)]
    assert set(found) < set(samples)


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ('"[1, 2]"', '"[1, 2"', "bad-table"),
        ('"[1, 2]"', "one", "bad-table"),
        ("a.png", "gone.png", "missing-files"),
        ('"path","split"', '"file","split"', "bad-table"),
        ('"values"', '"more"', "bad-table"),
    ],
)
def test_a_table_of_cases_that_was_changed_by_hand_is_refused_by_name(
    folder: Path, old: str, new: str, code: str
) -> None:
    text = write_cases([Sample("a.png", (1, 2), "p", "train")])
    assert old in text
    with pytest.raises(SiteRefusal, match=r"cases\.csv") as caught:
        read(folder, text.replace(old, new), Job())
    assert caught.value.code == code
    assert "\n" not in str(caught.value)

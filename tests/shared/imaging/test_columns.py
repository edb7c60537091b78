"""Columns and the cache they lie in: cases of differing size, several columns, and what makes a cache old."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import shared.imaging.dataset as module
from shared.cases import Sample, SiteData
from shared.config import Job, job_from_flat
from shared.imaging.dataset import Column, Dataset, concatenate, load_dataset, to_float, to_uint16
from shared.imaging.errors import UnreadableImage

SHAPES = hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=4)
DTYPES = st.sampled_from([np.uint8, np.uint16, np.int64, np.float32, np.float64])


@st.composite
def ragged(draw: st.DrawFn, min_size: int = 0) -> list[np.ndarray]:
    """Arrays of one dtype and any shapes, some of them without an element."""
    dtype = draw(DTYPES)
    generator = np.random.default_rng(draw(st.integers(0, 99)))
    shapes = draw(st.lists(SHAPES, min_size=min_size, max_size=6))
    return [generator.integers(0, 200, shape).astype(dtype) for shape in shapes]


def equal(found: np.ndarray, expected: np.ndarray) -> bool:
    return found.shape == expected.shape and found.dtype == expected.dtype and np.array_equal(found, expected)


# --- columns ----------------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(ragged())
def test_a_column_gives_back_what_was_put_in(arrays: list[np.ndarray]) -> None:
    column = Column.of(arrays)
    assert len(column) == len(arrays)
    assert all(equal(column[i], array) for i, array in enumerate(arrays))
    assert column.flat.size == sum(array.size for array in arrays)


@settings(max_examples=80, deadline=None)
@given(ragged(min_size=1), st.data())
def test_rows_of_rows_are_plain_indexing_and_copy_nothing(arrays: list[np.ndarray], draw: st.DataObject) -> None:
    column = Column.of(arrays)
    indices = draw.draw(st.lists(st.integers(0, len(arrays) - 1), max_size=8))
    part = column.rows(indices)
    assert len(part) == len(indices)
    assert part.flat is column.flat
    assert all(equal(part[k], arrays[i]) for k, i in enumerate(indices))
    if indices:
        again = draw.draw(st.lists(st.integers(0, len(indices) - 1), max_size=8))
        assert all(equal(part.rows(again)[k], arrays[indices[i]]) for k, i in enumerate(again))


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(DTYPES, hnp.array_shapes(min_dims=2, max_dims=4, max_side=4), elements=st.integers(0, 99)), st.data())
def test_take_stacks_arrays_of_one_shape_into_a_copy(array: np.ndarray, draw: st.DataObject) -> None:
    column = Column.of(array)
    indices = draw.draw(st.lists(st.integers(0, len(array) - 1), max_size=6))
    taken = column.take(indices)
    assert equal(taken, array[indices])
    assert not np.shares_memory(taken, column.flat)
    assert equal(column.take(range(len(array))), array)


def test_taking_arrays_of_differing_shape_is_refused() -> None:
    column = Column.of([np.zeros((2, 3)), np.zeros((3, 2)), np.zeros((2, 3))])
    assert column.take([0, 2]).shape == (2, 2, 3)
    with pytest.raises(ValueError):
        column.take([0, 1])


def test_a_case_of_a_column_is_a_view_of_it() -> None:
    column = Column.of([np.zeros((2, 2)), np.zeros(3)])
    assert np.shares_memory(column[1], column.flat)


@given(hnp.arrays(np.uint16, (3, 4)))
def test_sixteen_bits_and_back_is_the_identity_and_a_float_is_kept_to_half_a_step(raw: np.ndarray) -> None:
    assert np.array_equal(to_uint16(to_float(raw).numpy()), raw)
    picture = np.random.default_rng(int(raw.sum())).random((5, 5))
    assert np.abs(to_float(to_uint16(picture)).numpy() - picture).max() <= 0.5 / 65535 + 1e-7
    assert to_float(raw).dtype == torch.float32


# --- data sets --------------------------------------------------------------------------------------------------------


def samples_of(n: int) -> list[Sample]:
    return [Sample(f"{k}.png", (k % 2,), str(k), ("train", "val", "test")[k % 3]) for k in range(n)]


@settings(max_examples=60, deadline=None)
@given(ragged(), ragged())
def test_a_split_is_the_same_cases_of_every_column_and_knows_the_whole(
    images: list[np.ndarray], masks: list[np.ndarray]
) -> None:
    n = min(len(images), len(masks))
    data = Dataset.of(samples_of(n), image=images[:n], mask=masks[:n])
    assert data.whole is data
    for split in ("train", "val", "test"):
        keep = [k for k in range(n) if data.samples[k].split == split]
        part = data.subset(split)
        assert part.whole is data
        assert part.subset(split).whole is data
        assert data.subset(split) is part  # found once: every message of a run asks again
        assert [sample.path for sample in part.samples] == [f"{k}.png" for k in keep]
        for name, arrays in (("image", images), ("mask", masks)):
            assert all(equal(part.columns[name][i], arrays[k]) for i, k in enumerate(keep))


@settings(max_examples=40, deadline=None)
@given(st.lists(ragged(), min_size=1, max_size=4))
def test_concatenated_sets_of_ragged_cases_keep_their_order(parts: list[list[np.ndarray]]) -> None:
    parts = [[array.astype(np.float32) for array in part] for part in parts]
    sets = [Dataset.of(samples_of(len(part)), image=part) for part in parts]
    data = concatenate(sets)
    arrays = [array for part in parts for array in part]
    assert len(data) == len(data.columns["image"] if data.columns else []) == len(arrays)
    assert all(equal(data.columns["image"][k], array) for k, array in enumerate(arrays))
    assert data.samples == tuple(sample for part in sets for sample in part.samples)
    assert data.whole is data
    assert data.subset("val").whole is data


def test_a_split_without_cases_still_knows_the_whole() -> None:
    data = Dataset.of(samples_of(1), image=np.zeros((1, 2)))
    assert data.subset("test").whole is data
    nothing = Dataset.of(())
    assert nothing.subset("train").whole is nothing


# --- the cache --------------------------------------------------------------------------------------------------------


@pytest.fixture
def job() -> Job:
    return job_from_flat({"data.size": 12})


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A task of two columns, both as large as the case wants; gives the names of the cases it is asked to decode."""
    names: list[str] = []

    def decode(sample: Sample, site: SiteData, job: Job) -> dict[str, np.ndarray]:
        names.append(sample.path)
        number = int(Path(sample.path).stem)
        if (site.root / sample.path).suffix == ".bad":
            raise UnreadableImage("empty-file", "nothing")
        return arrays_of(number)

    task = SimpleNamespace(decode=decode, decoded_by=lambda job: f"{job.data.size}")
    monkeypatch.setattr(module, "load_task", lambda _: task)
    return names


def arrays_of(number: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(number)
    image = generator.integers(0, 65536, (1, 3 + number, 5), dtype=np.uint16)
    # Turned, as some decoders give their arrays: the cache must not keep them in the order of their memory.
    return {"image": image.transpose(0, 2, 1), "size": generator.random(number)}


def test_two_columns_of_differing_dtype_and_shape_come_back_from_the_cache(
    tmp_path: Path, job: Job, decoded: list[str]
) -> None:
    site = SiteData("s", tmp_path)
    first = load_dataset(samples_of(5), site, job)
    again = load_dataset(samples_of(5), site, job)
    assert len(decoded) == 5
    for data in (first, again):
        for number in range(5):
            for name, array in arrays_of(number).items():
                assert equal(data.columns[name][number], array)
    entry = next((tmp_path / ".consilium" / "cache").iterdir())
    assert {path.name for path in entry.iterdir()} == {"index.json", "image.raw", "size.raw"}
    assert isinstance(again.columns["size"].flat, np.memmap)


def test_a_case_that_cannot_be_read_leaves_no_gap_in_any_column(tmp_path: Path, job: Job, decoded: list[str]) -> None:
    samples = samples_of(5)
    samples[0] = dataclasses.replace(samples[0], path="0.bad")
    samples[3] = dataclasses.replace(samples[3], path="3.bad")
    data = load_dataset(samples, SiteData("s", tmp_path, max_unreadable=0.5), job)
    assert [sample.path for sample in data.samples] == ["1.png", "2.png", "4.png"]
    assert {skip.path for skip in data.skipped} == {"0.bad", "3.bad"}
    for row, number in enumerate((1, 2, 4)):
        for name, array in arrays_of(number).items():
            assert equal(data.columns[name][row], array)


SERIES = Sample("0.png", (0,), "p", "train", mask="masks/0.png", paths=("series", ""), values=(1.5,))
THERE = ("0.png", "masks/0.png", "masks/1.png", "series/1.dcm", "series/2.dcm", "series/deep/3.dcm")


@pytest.fixture
def case(tmp_path: Path, job: Job, decoded: list[str]) -> SiteData:
    """A site whose one case of several files is in the cache."""
    for name in THERE:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    for _ in range(2):
        load_dataset([SERIES], SiteData("s", tmp_path), job)
    assert len(decoded) == 1
    return SiteData("s", tmp_path)


@pytest.mark.parametrize("name", ["0.png", "masks/0.png", "series/2.dcm", "series/deep/3.dcm", "series/new.dcm"])
@pytest.mark.parametrize("change", ["content", "time", "gone"])
def test_a_change_of_any_file_a_case_is_read_from_makes_its_cache_old(
    case: SiteData, job: Job, decoded: list[str], name: str, change: str
) -> None:
    file = case.root / name
    if change == "content" or not file.exists():
        file.write_text("longer")
    elif change == "time":
        os.utime(file, (1, 1))
    else:
        file.unlink()
    load_dataset([SERIES], case, job)
    assert len(decoded) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"mask": "masks/1.png"},
        {"mask": ""},
        {"boxes": ((0, 1.0, 2.0, 3.0, 4.0),)},
        {"values": (1.5000001,)},
        {"paths": ("", "series")},
        {"paths": ("series", "", "")},
        {"frame": 0},
        {"key": "images"},
        {"box": (0.0, 0.0, 2.0, 2.0)},
    ],
    ids=str,
)
def test_a_case_of_other_parts_is_another_case_to_the_cache(
    case: SiteData, job: Job, decoded: list[str], change: dict[str, Any]
) -> None:
    load_dataset([dataclasses.replace(SERIES, **change)], case, job)
    assert len(decoded) == 2


def test_a_file_no_case_is_read_from_may_change(case: SiteData, job: Job, decoded: list[str]) -> None:
    (case.root / "masks" / "1.png").write_text("longer")
    load_dataset([SERIES], case, job)
    assert len(decoded) == 1


def test_who_a_case_belongs_to_and_what_the_task_does_not_name_leave_the_cache_as_it_is(
    tmp_path: Path, job: Job, decoded: list[str]
) -> None:
    site = SiteData("s", tmp_path)
    load_dataset([SERIES], site, job)
    other = dataclasses.replace(SERIES, patient="q", split="test", target=(1,))
    assert load_dataset([other], site, job.replace(seed=5, model__width=8)).samples == (other,)
    assert len(decoded) == 1
    load_dataset([SERIES], site, job.replace(data__size=16))
    assert len(decoded) == 2

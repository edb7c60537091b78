"""shared.imaging.signals: tables and arrays of several leads against numpy."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.imaging.errors import CODES, UnreadableImage
from shared.imaging.sequences import pick
from shared.imaging.signals import read_signal


def problem(path: Path, leads: int = 2, **options: Any) -> UnreadableImage:
    with pytest.raises(UnreadableImage) as caught:
        read_signal(path, leads, **options)
    assert caught.value.code in CODES
    return caught.value


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 30),
    st.integers(1, 5),
    st.sampled_from([",", ";", "\t", " "]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_a_table_is_what_numpy_wrote(
    steps: int, leads: int, separator: str, header: bool, clock: bool, seed: int
) -> None:
    values = np.random.default_rng(seed).normal(0, 1000, (steps, leads)).astype(np.float32)
    table, names = values.astype(np.float64), [f"lead{k}" for k in range(leads)]
    if clock and header:
        table, names = np.column_stack([np.arange(steps) / 500, table]), ["time", *names]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.csv"
        np.savetxt(path, table, "%.9g", separator, header=separator.join(names) if header else "", comments="")
        found = read_signal(path, leads)
    assert found.dtype == np.float32
    assert np.array_equal(found, values)


@pytest.mark.parametrize("head", ["time (s)", "Time_s", "t", "T [ms]", "seconds", "sample", "Index"])
def test_a_column_of_time_is_left_out(tmp_path: Path, head: str) -> None:
    path = written(tmp_path / "a.csv", f"{head},I,II\n0,1,2\n1,3,4\n")
    if head == "Time_s":  # one word: a name like any other
        assert problem(path).code == "wrong-leads"
    else:
        assert read_signal(path, 2).tolist() == [[1, 2], [3, 4]]


def test_tables_as_spreadsheets_write_them(tmp_path: Path) -> None:
    decimal_commas = written(tmp_path / "a.csv", "\ufeffI;II\r\n0,5;-1,25\r\n2;3\r\n\r\n")
    assert read_signal(decimal_commas, 2).tolist() == [[0.5, -1.25], [2, 3]]
    quoted = written(tmp_path / "b.csv", '"I","II"\n"1","2"\n')
    assert read_signal(quoted, 2).tolist() == [[1, 2]]
    exponent = written(tmp_path / "c.txt", "  1e-3   2E2\n-4   .5\n")
    assert read_signal(exponent, 2).tolist() == [[np.float32(1e-3), 200], [-4, 0.5]]


def test_arrays(tmp_path: Path) -> None:
    many = np.random.default_rng(0).normal(size=(4, 7, 2))
    np.save(tmp_path / "one.npy", many[0])
    np.savez(tmp_path / "one.npz", ecg=many[0])
    np.savez(tmp_path / "many.npz", train_images=many, train_labels=np.zeros(4))
    np.save(tmp_path / "lead.npy", np.arange(5, dtype=np.int16))
    assert np.array_equal(read_signal(tmp_path / "one.npy", 2), many[0].astype(np.float32))
    assert np.array_equal(read_signal(tmp_path / "one.npz", 2), many[0].astype(np.float32))
    assert np.array_equal(read_signal(tmp_path / "many.npz", 2, key="train_images", row=3), many[3].astype(np.float32))
    assert read_signal(tmp_path / "lead.npy", 1).tolist() == [[0], [1], [2], [3], [4]]
    assert np.array_equal(read_signal(tmp_path / "one.npy", 2, most=3), many[0][pick(7, 3)].astype(np.float32))


def test_signals_without_samples(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((0, 2)))
    written(tmp_path / "header.csv", "I,II\n")
    written(tmp_path / "blank.csv", "\n\n")
    written(tmp_path / "void.csv", "")
    for name, code in {"a.npy": "no-frames", "header.csv": "no-frames", "blank.csv": "no-frames"}.items():
        assert problem(tmp_path / name).code == code
        assert name in problem(tmp_path / name).detail
    assert problem(tmp_path / "void.csv").code == "empty-file"
    assert problem(tmp_path / "absent.csv").code == "not-found"


def test_a_wrong_number_of_leads_names_the_file(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((2, 500)))  # leads and samples the other way round
    written(tmp_path / "a.csv", "1,2\n3,4\n")
    written(tmp_path / "ragged.csv", "1,2\n3,4,5\n")
    assert problem(tmp_path / "a.npy").code == "wrong-leads"
    assert "(2, 500)" in problem(tmp_path / "a.npy").detail
    assert problem(tmp_path / "a.csv", 3).code == "wrong-leads"
    assert problem(tmp_path / "ragged.csv").code == "wrong-leads"
    assert "ragged.csv line 2" in problem(tmp_path / "ragged.csv").detail


def test_gaps_are_refused_and_named(tmp_path: Path) -> None:
    for number, cell in enumerate(["nan", "", "inf", "-", "1 2"]):
        path = written(tmp_path / f"{number}.csv", f"1,2\n3,{cell}\n5,6\n")
        assert problem(path).code == "not-finite", cell
        assert f"{number}.csv line 2" in problem(path).detail
    values = np.zeros((5, 2))
    values[3, 1] = np.nan
    np.save(tmp_path / "a.npy", values)
    assert problem(tmp_path / "a.npy").code == "not-finite"
    assert "sample 3" in problem(tmp_path / "a.npy").detail
    np.save(tmp_path / "large.npy", np.full((2, 2), 1e300))  # beyond single precision
    assert problem(tmp_path / "large.npy").code == "not-finite"


def test_what_is_no_signal(tmp_path: Path) -> None:
    np.save(tmp_path / "text.npy", np.array([["a", "b"]]))
    assert problem(tmp_path / "text.npy").code == "unsupported-format"
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00\x01" * 20)
    assert problem(tmp_path / "bytes.csv").code == "corrupt"
    np.savez(tmp_path / "many.npz", train_images=np.zeros((2, 3, 2)), b=np.zeros(2))
    assert problem(tmp_path / "many.npz").code == "no-such-array"
    assert problem(tmp_path / "many.npz", key="train_images", row=2).code == "frame-out-of-range"

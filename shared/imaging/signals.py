"""Signals of several leads (ECG, EEG, respiration): a CSV of one row per sample, or a NumPy array."""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from shared.imaging.errors import UnreadableImage, only_unreadable, require_bytes
from shared.imaging.grid import Array
from shared.imaging.sequences import load_array, pick

SUFFIXES: Final = frozenset({".csv", ".tsv", ".txt", ".npy", ".npz"})
_CLOCK = re.compile(r"(time|t|seconds?|milliseconds?|s|ms|samples?|index)\b", re.IGNORECASE)


@only_unreadable
def read_signal(
    path: str | os.PathLike[str], leads: int, most: int = 0, key: str = "", row: int | None = None
) -> npt.NDArray[np.float32]:
    """A signal as float32 (t, leads), in the file's own units.

    Args:
        path: a CSV (comma, semicolon, tab or space; with or without a header; a first column headed as time, t,
            seconds, ms, sample or index is left out), an .npy or .npz of (t, leads), or (t,) for one lead.
        leads: how many there must be.
        most: at most so many samples, evenly picked; 0 takes all.
        key: array of an .npz file; "" for its only one.
        row: the signal's place along the first axis of an array of signals (n, t, leads).

    Raises:
        UnreadableImage: "no-frames" for a signal without samples, "wrong-leads", "not-finite" for gaps, and what is
            wrong with the file; the detail names file and line.
    """
    path = Path(path)
    require_bytes(path)
    values = _from_array(path, key, row) if path.suffix.lower() in (".npy", ".npz") else _from_text(path)
    if not len(values):
        raise UnreadableImage("no-frames", str(path))
    if values.ndim != 2 or values.shape[1] != leads:
        raise UnreadableImage("wrong-leads", f"{path}: {values.shape} values, wanted (samples, {leads})")
    result = values[pick(len(values), most)].astype(np.float32)
    gaps = np.flatnonzero(~np.isfinite(result).all(1))
    if len(gaps):
        raise UnreadableImage("not-finite", f"{path}: sample {pick(len(values), most)[gaps[0]]}")
    return result


def _from_array(path: Path, key: str, row: int | None) -> Array:
    values = load_array(path, key)
    if row is not None:
        if not -1 < row < len(values):
            raise UnreadableImage("frame-out-of-range", f"{path}: row {row} of {len(values)}")
        values = values[row]
    if values.dtype.kind not in "buif":
        raise UnreadableImage("unsupported-format", f"{path}: numbers of type {values.dtype}")
    return values[:, None] if values.ndim == 1 else values


def _from_text(path: Path) -> Array:
    text = path.read_text(encoding="utf-8-sig")
    first = text[: text.find("\n")] if "\n" in text else text
    # The separator that stands most often in the first line: a comma within numbers stands less often than a semicolon.
    separator, seen = max(Counter({mark: first.count(mark) for mark in ";\t,"}).items(), key=lambda pair: pair[1])
    if not seen:
        rows = [line.split() for line in text.splitlines()]
    else:
        rows = list(csv.reader(text.splitlines(), delimiter=separator))
    lines = [(number, row) for number, row in enumerate(rows, start=1) if any(cell.strip() for cell in row)]
    if separator == ";" and seen and "." not in text:
        lines = [(number, [cell.replace(",", ".") for cell in row]) for number, row in lines]
    clock = 0
    if lines and not any(_is_number(cell) for cell in lines[0][1]):
        clock = int(bool(_CLOCK.match(lines[0][1][0].strip())))
        lines = lines[1:]
    width = len(lines[0][1]) if lines else 0
    values = np.empty((len(lines), max(width - clock, 0)))
    for place, (number, row) in enumerate(lines):
        if len(row) != width:
            raise UnreadableImage("wrong-leads", f"{path} line {number}: {len(row)} values, the others have {width}")
        for lead, cell in enumerate(row[clock:]):
            if not _is_number(cell):
                raise UnreadableImage("not-finite", f"{path} line {number}: {cell!r}")
            values[place, lead] = float(cell)
    return values


def _is_number(cell: str) -> bool:
    try:
        return bool(np.isfinite(float(cell)))
    except ValueError:
        return False

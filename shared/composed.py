"""Cases of several images and of numbers: the columns of the table that hold them, and what a case may lack.

With ``data.modalities = "pa,lateral"`` the table has a column ``path:pa`` and one ``path:lateral``; with
``data.tabular = "age,sex"`` it has these columns too. What a case lacks refuses the site, or is filled with zeros and
flagged, as ``data.missing`` says.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from shared.cases import Sample, SiteData
from shared.config import Job
from shared.errors import SiteRefusal, UserError
from shared.samples import Row, find_images, make_sample, read_rows, require_files
from shared.tasks import Sums

# Words that stand for numbers unless the site's label map says otherwise; DICOM writes sex as M and F.
_WORDS = {"m": 0.0, "male": 0.0, "f": 1.0, "female": 1.0, "no": 0.0, "false": 0.0, "yes": 1.0, "true": 1.0}
_AGE = re.compile(r"(\d{3})([YMWD])")  # DICOM PS3.5, value representation AS: 045Y, 003M
_YEARS = {"Y": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}
_NOTHING = ("", "na", "nan")


def composed(job: Job) -> bool:
    """Whether a case is more than one image."""
    return bool(job.modalities or job.tabular)


def flagged(job: Job) -> bool:
    """Whether a case may lack a part, which the network is then told."""
    return composed(job) and job.data.missing == "zero"


def image_columns(job: Job) -> list[str]:
    """The columns of the table that name the images of a case."""
    return [f"path:{name}" for name in job.modalities] or ["path"]


def stacked_channels(job: Job) -> int:
    """Channels that go into the network: of all images of a case, and a plane for each that may be missing."""
    count = len(job.modalities)
    if not count:
        return job.data.channels
    return count * job.data.channels + (count if flagged(job) else 0)


def require_parts(site: SiteData, table: Path, rows: Sequence[Row], job: Job) -> None:
    """Refuse the site if its table lacks a column, names a file that is not there, or a case lacks what it must have.

    Raises:
        SiteRefusal: missing-modality or missing-files; the text names the table, and the line where it is one.
    """
    images = image_columns(job)
    for column in [*images, *job.tabular]:
        there = bool(rows) and column in rows[0]
        empty = [line for line, row in enumerate(rows, start=2) if _is_empty(row, column)]
        if empty and job.data.missing == "refuse":
            where = f"{table} line {empty[0]}: {column} is empty" if there else f"{table}: has no column {column}"
            more = f" ({len(empty)} of {len(rows)} cases)" if there else ""
            raise SiteRefusal(
                "missing-modality",
                f"{where}{more}; complete the table, or ask for data.missing = 'zero' in the job",
            )
        if there and column in images:
            require_files(site, table, [row for row in rows if not _is_empty(row, column)], column)
    for line, row in enumerate(rows, start=2):
        if all(_is_empty(row, column) for column in images):
            raise SiteRefusal("missing-modality", f"{table} line {line}: the case has no image at all; remove the line")


def _is_empty(row: Row, column: str) -> bool:
    text = row.get(column) or ""
    names_file = column.partition(":")[0] == "path"
    return not text or (not names_file and text.strip().lower() in _NOTHING)


def parts_of(row: Row, where: str, site: SiteData, job: Job) -> dict[str, object]:
    """``path``, ``paths`` and ``values`` of the case in a row; ``path`` is its first image that is there."""
    names = ["" if _is_empty(row, column) else row[column] for column in image_columns(job)]
    found: dict[str, object] = {"path": next(filter(None, names))}
    if job.modalities:
        found["paths"] = tuple(names)
    if job.tabular:
        found["values"] = tuple(
            math.nan if _is_empty(row, column) else parse_number(row[column], f"{where}: {column}", site)
            for column in job.tabular
        )
    return found


def parse_number(text: str, where: str, site: SiteData) -> float:
    """A number as a site writes it: through its label map; an age as DICOM writes it, in years; M or F, yes or no.

    Raises:
        SiteRefusal: it is none of these, or not finite.
    """
    text = site.label_map.get(text.strip(), text.strip())
    age = _AGE.fullmatch(text)
    if age:
        return int(age[1]) * _YEARS[age[2]]
    try:
        number = _WORDS[text.lower()] if text.lower() in _WORDS else float(text)
    except ValueError:
        number = math.inf
    if not math.isfinite(number):
        raise SiteRefusal(
            "bad-table", f'{where} {text!r} is no number; write one, or map it under [label_map], as "{text}" = "1"'
        )
    return number


def find_cases(path: Path, job: Job) -> list[Sample]:
    """The unlabelled cases of a folder or file; composed ones of a table, or of the ``labels.csv`` of a folder.

    Raises:
        UserError: the job's cases are composed, and there is no table that says what belongs together.
        SiteRefusal: the table is not in order.
    """
    if not composed(job):
        return find_images(path, job)
    table = path / "labels.csv" if path.is_dir() else path
    if table.suffix.lower() != ".csv" or not table.is_file():
        columns = ", ".join([*image_columns(job), *job.tabular])
        raise UserError(f"{path}: cases of this model come in a table; give a .csv with the columns {columns}")
    site = SiteData("predict", table.parent, csv=table.name)
    _, rows = read_rows(site, [] if job.modalities else ["path"])
    require_parts(site, table, rows, job)
    found = []
    for line, row in enumerate(rows, start=2):
        more = parts_of(row, f"{table} line {line}", site, job)
        path_of_case = str(more.pop("path"))
        found.append(make_sample(job, path_of_case, (), row.get("patient") or path_of_case, "test", **more))
    return found


def count_missing(samples: Sequence[Sample], job: Job) -> list[int]:
    """How many cases lack each image and each number, in the order of the job."""
    images = [sum(not sample.paths[k] for sample in samples) for k in range(len(job.modalities))]
    return images + [sum(math.isnan(sample.values[k]) for sample in samples) for k in range(len(job.tabular))]


def missing_notices(sums: Sums, job: Job) -> list[str]:
    """Which images and numbers the cases behind ``sums`` lack, and how often, in words; see ``count_missing``."""
    missing: list[int] = sums.get("missing", [])  # type: ignore[assignment]
    names = (*job.modalities, *job.tabular)
    return [f"{count:,} of {sums['n']:,} lack {name}" for name, count in zip(names, missing, strict=False) if count]

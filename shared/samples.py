"""From a site's tables and folders to samples: what the readers of all tasks have in common.

A fault of the site's data is a ``SiteRefusal`` whose text names the file, for the site's own screen and log, and whose
short code may leave the site.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.cases import Sample, SiteData, split_of, split_word, unit_hash
from shared.config import Job, nearest
from shared.errors import SiteRefusal
from shared.imaging.read import is_image_name
from shared.tasks import TASKS, load_task

Row = dict[str, str]
CASES = "cases"  # the format of ``write_cases``


def read_samples(site: SiteData, job: Job) -> list[Sample]:
    """All cases of a site that are fit for the job's task, sorted, no pixel decoded yet.

    Raises:
        SiteRefusal: nothing there, an unknown label, a file the table names but the folder lacks, an unclear layout.
    """
    if not site.root.is_dir():
        raise SiteRefusal("no-data", f"{site.root}: no such folder; set [data] dir in site.toml")
    formats = TASKS[job.task].formats
    if site.format not in (*formats, CASES):
        hint = nearest(site.format, formats)
        raise SiteRefusal(
            "no-data",
            f"[data] format = {site.format!r}: {job.task} reads {', '.join(formats)}{hint}; set it in site.toml",
        )
    found = _read_cases(site) if site.format == CASES else load_task(job.task).read_samples(site, job)
    samples = sorted(found, key=lambda sample: sample.id)
    if not samples:
        raise SiteRefusal("no-data", f"{site.root}: no labelled image found (format {site.format!r})")
    return _capped(samples, job.data.max_per_class) if job.data.max_per_class else samples


def _capped(samples: Iterable[Sample], limit: int) -> list[Sample]:
    """At most ``limit`` samples per class for training, and for validation, picked by hash: new files change few."""
    groups: dict[tuple[str, tuple[int, ...]], list[Sample]] = defaultdict(list)
    kept = []
    for sample in samples:
        if sample.split != "test":
            groups[sample.split, sample.target].append(sample)
        else:
            kept.append(sample)
    for group in groups.values():
        kept += sorted(group, key=lambda sample: unit_hash(sample.id))[:limit]
    return sorted(kept, key=lambda sample: sample.id)


# --- what readers of tables share -------------------------------------------------------------------------------------


def read_rows(site: SiteData, needed: Iterable[str], default: str = "labels.csv") -> tuple[Path, list[Row]]:
    """The site's CSV and its rows; every row has a path that is there, if one is needed.

    Raises:
        SiteRefusal: no such table, not a CSV, a column that lacks, files that are not there.
    """
    table = site.root / (site.csv or default)
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        raise SiteRefusal("no-data", f"{table}: no such file; set [data] csv in site.toml") from None
    except OSError as error:
        raise SiteRefusal("bad-table", f"{table}: cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise SiteRefusal("bad-table", f"{table}: not a CSV in UTF-8: {error}") from None
    needed = list(needed)
    if rows and not set(needed) <= set(rows[0]):
        raise SiteRefusal(
            "bad-table", f"{table}: needs the columns {' and '.join(needed)}, has {', '.join(map(str, rows[0]))}"
        )
    if "path" in needed:
        require_files(site, table, rows, "path")
    if "target" not in needed:  # a table that people write, where a blank more would make two patients of one
        for row in rows:
            row["patient"] = (row.get("patient") or "").strip()
    return table, rows


def require_files(site: SiteData, table: Path, rows: Sequence[Row], column: str) -> None:
    """Refuse the site if ``column`` of its table is empty somewhere or names what is not there."""
    nameless = [line for line, row in enumerate(rows, start=2) if not row[column]]
    if nameless:
        raise SiteRefusal("bad-table", f"{table} line {nameless[0]}: the column {column} is empty")
    absent = [row[column] for row in rows if not exists(site.root / row[column])]
    if absent:
        names = ", ".join(name[:200] for name in absent[:3]) + (", …" if len(absent) > 3 else "")
        raise SiteRefusal("missing-files", f"{table}: names {len(absent)} files that are not there: {names}")


def exists(path: Path) -> bool:
    """Whether a file or folder is there; never raises."""
    try:
        return path.exists()
    except OSError:  # a name too long to be one: a quote in the table that is never closed
        return False


def patient_in(image: Mapping[str, Any]) -> str:
    """Whose an image of a COCO file is; "" where that is not said."""
    value = image.get("patient")
    return "" if value is None else str(value).strip()


def make_sample(
    job: Job, path: str, target: tuple[int, ...], patient: str, split: str | None = None, **more: object
) -> Sample:
    """A sample; where no split is given the patient's hash decides."""
    split = split or split_of(patient, job.data.val_fraction, job.data.test_fraction)
    return Sample(path, target, patient, split, **{"frame": 0 if job.data.frame == "first" else "middle"} | more)  # type: ignore[arg-type]


def class_index(word: str, where: str, site: SiteData, classes: Sequence[str]) -> int:
    """The index of a class as the site writes it, through the site's label map."""
    name = site.label_map.get(word, word)
    if name not in classes:
        raise SiteRefusal(
            "unknown-label",
            f"{where}: label {word!r} is not a class of the job ({', '.join(classes)}); "
            "map it under [label_map] in site.toml",
        )
    return classes.index(name)


def class_indices(text: str, where: str, site: SiteData, job: Job) -> tuple[int, ...]:
    """Class indices for a label as the site writes it; several written a|b where the job is multi-label."""
    words = [word.strip() for word in text.split("|")] if job.data.multilabel else [text.strip()]
    kept = filter(None, words) if job.data.multilabel else words
    return tuple(sorted({class_index(word, where, site, job.classes) for word in kept}))


def parse_frame(text: str, where: str) -> int | str:
    """A frame as a table names it."""
    if text.isascii() and text.isdigit():
        return int(text)
    if text != "middle":
        raise SiteRefusal("bad-table", f"{where}: frame {text!r}; write a number from 0, or middle")
    return text


def parse_box(parts: Iterable[object], where: str) -> tuple[float, float, float, float]:
    """Four finite numbers: x, y, width, height."""
    parts = list(parts)
    try:
        box = tuple(float(part) for part in parts)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        box = ()
    if len(box) != 4 or not all(map(math.isfinite, box)):
        raise SiteRefusal(
            "bad-table", f"{where}: box {' '.join(map(str, parts))!r}; write four numbers: x y width height"
        )
    return box


def parse_split(word: object, where: str) -> str | None:
    """The split a table names, None if it names none."""
    split = split_word(word) if isinstance(word, str) else None
    if word != "" and split is None:
        raise SiteRefusal("bad-table", f"{where}: split {word!r}; write train, val or test")
    return split


def patient_of(path: Path, fallback: str) -> str:
    """The DICOM PatientID, so that one patient's images stay together; else the file stands for itself."""
    from shared.imaging.dicom import patient_id

    return patient_id(path) or fallback


def find_images(path: Path, job: Job) -> list[Sample]:
    """Every image file below a folder, hidden ones passed over, or the one file, as cases without labels.

    Paths are relative to the folder, or to that of the file.
    """
    if not path.is_dir():
        names = [path.name]
    else:
        files = (file.relative_to(path) for file in sorted(path.rglob("*")) if file.is_file() and is_image_name(file))
        names = [file.as_posix() for file in files if not any(part.startswith(".") for part in file.parts)]
    return [make_sample(job, name, (), name, "test") for name in names]


# --- the table of a partition -----------------------------------------------------------------------------------------


def write_cases(samples: Iterable[Sample]) -> str:
    """Samples as CSV text that the format ``cases`` reads back: the record of a partition, the same for every task."""
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n", quoting=csv.QUOTE_ALL)  # a bare "\r" in a name would end the row
    rows.writerow(
        [
            "path",
            "split",
            "patient",
            "target",
            "frame",
            "key",
            "box",
            "mask",
            "boxes",
            "paths",
            "values",
            "size",
            "fault",
        ]
    )
    for sample in samples:
        values = [None if value != value else value for value in sample.values]
        more = map(json.dumps, (sample.boxes, sample.paths, values, sample.size, sample.fault))
        place = (sample.path, sample.split, sample.patient, json.dumps(sample.target), sample.frame, sample.key)
        rows.writerow([*place, json.dumps(sample.box), sample.mask, *more])
    return table.getvalue()


def _read_cases(site: SiteData) -> list[Sample]:
    table, rows = read_rows(site, ["path", "split", "patient", "target"])
    found = []
    for line, row in enumerate(rows, start=2):
        try:
            target, box, boxes, paths, values, size, fault = (
                json.loads(row[name]) for name in ("target", "box", "boxes", "paths", "values", "size", "fault")
            )
            sample = Sample(
                row["path"],
                tuple(target),
                row["patient"],
                row["split"],
                int(row["frame"]) if row["frame"].isdigit() else row["frame"],
                None if box is None else tuple(box),
                row["key"],
                row["mask"],
                tuple(map(tuple, boxes)),
                tuple(paths),
                tuple(math.nan if value is None else value for value in values),
                None if size is None else tuple(size),
                None if fault is None else tuple(fault),
            )
        except (KeyError, TypeError, ValueError):
            raise SiteRefusal("bad-table", f"{table} line {line}: not as a partition writes it") from None
        found.append(sample)
    return found

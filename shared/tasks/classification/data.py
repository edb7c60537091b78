"""Images with class labels: from a CSV, class folders, a MedMNIST-style npz, or the boxes of a COCO file.

Every reader gives the same list of ``Sample``. A fault of the site's data is a ``SiteRefusal`` whose text names the
file, for the site's own screen and log, and whose short code may leave the site.
"""

from __future__ import annotations

import csv
import json
import math
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from shared.cases import SPLITS, Sample, SiteData, split_of, split_word, unit_hash
from shared.config import Job
from shared.errors import SiteRefusal
from shared.imaging.dataset import Dataset, load_dataset
from shared.imaging.read import is_image_name


def read_samples(site: SiteData, job: Job) -> list[Sample]:
    """All labelled images of a site, sorted by path, no pixel decoded yet.

    Raises:
        SiteRefusal: nothing there, an unknown label, a file the CSV names but the folder lacks, an unclear layout.
    """
    if not site.root.is_dir():
        raise SiteRefusal("no-data", f"{site.root}: no such folder; set [data] dir in site.toml")
    form = site.format if site.format != "auto" else _guess_format(site)
    samples = sorted(_READERS[form](site, job), key=lambda sample: sample.id)
    if not samples:
        raise SiteRefusal("no-data", f"{site.root}: no labelled image found (format {form!r})")
    if job.data.max_per_class:
        samples = _capped(samples, job.data.max_per_class)
    return samples


def load(samples: list[Sample], site: SiteData, job: Job) -> Dataset:
    """Decode (or find in the site's cache) the images of ``samples``; see ``load_dataset``."""
    return load_dataset(samples, site, job)


def _guess_format(site: SiteData) -> str:
    if site.csv or (site.root / "labels.csv").is_file():
        return "csv"
    if (site.root / "annotations.json").is_file():
        return "coco-crops"
    if any(site.root.glob("*.npz")):
        return "npz"
    return "folder"


def _target(text: str, where: str, site: SiteData, job: Job) -> tuple[int, ...]:
    """Class indices for a label as the site writes it, through the site's label map."""
    words = [word.strip() for word in text.split("|")] if job.data.multilabel else [text.strip()]
    target = []
    for word in filter(None, words) if job.data.multilabel else words:
        name = site.label_map.get(word, word)
        if name not in job.classes:
            known = ", ".join(job.classes)
            raise SiteRefusal(
                "unknown-label",
                f"{where}: label {word!r} is not a class of the job ({known}); map it under [label_map] in site.toml",
            )
        target.append(job.classes.index(name))
    return tuple(sorted(set(target)))


def _sample(
    job: Job, path: str, target: tuple[int, ...], patient: str, split: str | None = None, **more: object
) -> Sample:
    split = split or split_of(patient, job.data.val_fraction, job.data.test_fraction)
    return Sample(path, target, patient, split, **{"frame": 0 if job.data.frame == "first" else "middle"} | more)  # type: ignore[arg-type]


def _from_csv(site: SiteData, job: Job) -> Iterator[Sample]:
    """Columns path, label; optional patient, split, frame, key, and box as ``x y w h``."""
    table = site.root / (site.csv or "labels.csv")
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        raise SiteRefusal("no-data", f"{table}: no such file; set [data] csv in site.toml") from None
    except OSError as error:
        raise SiteRefusal("bad-table", f"{table}: cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise SiteRefusal("bad-table", f"{table}: not a CSV in UTF-8: {error}") from None
    columns = set(rows[0]) if rows else set()
    if rows and not {"path", "label"} <= columns:
        raise SiteRefusal("bad-table", f"{table}: needs the columns path and label, has {', '.join(map(str, rows[0]))}")
    nameless = [line for line, row in enumerate(rows, start=2) if not row["path"]]
    if nameless:
        raise SiteRefusal("bad-table", f"{table} line {nameless[0]}: the column path is empty")
    absent = [row["path"] for row in rows if not _is_file(site.root / row["path"])]
    if absent:
        names = ", ".join(name[:200] for name in absent[:3]) + (", …" if len(absent) > 3 else "")
        raise SiteRefusal("missing-files", f"{table}: names {len(absent)} files that are not there: {names}")
    for line, row in enumerate(rows, start=2):
        where = f"{table} line {line}"
        more: dict[str, object] = {}
        if row.get("frame"):
            more["frame"] = _frame(row["frame"], where)
        if row.get("box"):
            more["box"] = _box(row["box"].split(), where)
        if row.get("key"):
            more["key"] = row["key"]
        split = _split(row.get("split") or "", where)
        patient = row.get("patient") or _patient(site.root / row["path"], row["path"])
        yield _sample(job, row["path"], _target(row["label"] or "", where, site, job), patient, split, **more)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long to be one: a quote in the table that is never closed
        return False


def _frame(text: str, where: str) -> int | str:
    if text.isascii() and text.isdigit():
        return int(text)
    if text != "middle":
        raise SiteRefusal("bad-table", f"{where}: frame {text!r}; write a number from 0, or middle")
    return text


def _box(parts: Iterable[object], where: str) -> tuple[float, ...]:
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


def _split(word: object, where: str) -> str | None:
    """The split a table names, None if it names none."""
    split = split_word(word) if isinstance(word, str) else None
    if word != "" and split is None:
        raise SiteRefusal("bad-table", f"{where}: split {word!r}; write train, val or test")
    return split


def _from_folders(site: SiteData, job: Job) -> Iterator[Sample]:
    """``class/image`` or ``split/class/image``."""
    tops = _folders(site.root)
    by_split = bool(tops) and all(split_word(top.name) for top in tops)
    for top in tops if by_split else [site.root]:
        for folder in _folders(top):
            target = _target(folder.name, str(folder), site, job)
            files = [path for path in sorted(folder.rglob("*")) if path.is_file() and is_image_name(path)]
            if not files:
                raise SiteRefusal("no-data", f"{folder}: the folder of class {folder.name!r} holds no image")
            for path in files:
                name = path.relative_to(site.root).as_posix()
                yield _sample(job, name, target, _patient(path, name), split_word(top.name) if by_split else None)


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _patient(path: Path, fallback: str) -> str:
    """The DICOM PatientID, so that one patient's images stay together; else the file stands for itself."""
    from shared.imaging.dicom import patient_id

    return patient_id(path) or fallback


def _from_npz(site: SiteData, job: Job) -> Iterator[Sample]:
    """``train_images``/``train_labels`` and so on (MedMNIST); label k is the job's k-th class unless mapped."""
    import numpy as np

    for path in sorted(site.root.glob("*.npz")):
        try:
            with np.load(path, allow_pickle=False) as arrays:
                labels = {split: arrays[f"{split}_labels"] for split in SPLITS if f"{split}_labels" in arrays}
        except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
            raise SiteRefusal("bad-table", f"{path}: not an npz of labelled images: {error}") from None
        for split, values in labels.items():
            table = np.asarray(values).reshape(len(values), -1)
            if not job.data.multilabel and table.shape[1] != 1:
                raise SiteRefusal(
                    "bad-table", f"{path}: {split}_labels has {table.shape[1]} columns; set data.multilabel"
                )
            for index, value in enumerate(table):
                where = f"{path.name} {split}_labels[{index}]"
                numbers = [i for i, on in enumerate(value) if on] if job.data.multilabel else [int(value[0])]
                target = _target("|".join(_class_name(number, site, job) for number in numbers), where, site, job)
                patient = f"{path.name}:{split}:{index}"
                yield _sample(job, path.name, target, patient, split, frame=index, key=f"{split}_images")


def _class_name(number: int, site: SiteData, job: Job) -> str:
    """The class with that number in the job's order, unless the site maps the number itself."""
    mapped = str(number) in site.label_map or not 0 <= number < len(job.classes)
    return str(number) if mapped else job.classes[number]


def _from_coco(site: SiteData, job: Job) -> Iterator[Sample]:
    """Every box of a COCO file as an image of its own; all boxes of an image stay on one side of the split."""
    path = site.root / "annotations.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        names = {item["id"]: item["name"] for item in content["categories"]}
        images = {item["id"]: item for item in content["images"]}
        for item in content["annotations"]:
            image = images[item["image_id"]]
            file = f"images/{image['file_name']}" if (site.root / "images").is_dir() else image["file_name"]
            target = _target(names[item["category_id"]], f"{path} annotation {item['id']}", site, job)
            patient = str(image.get("patient", file))
            where = f"{path} annotation {item['id']}"
            split, box = _split(image.get("split", ""), where), _box(item["bbox"], where)
            yield _sample(job, file, target, patient, split, box=box)
    except FileNotFoundError:
        raise SiteRefusal("no-data", f"{path}: no such file") from None
    except (KeyError, TypeError, ValueError) as error:
        raise SiteRefusal("bad-table", f"{path}: not a COCO file: {error!r}") from None


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


_READERS = {"csv": _from_csv, "folder": _from_folders, "npz": _from_npz, "coco-crops": _from_coco}

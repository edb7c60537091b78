"""Where a site keeps its images and their masks: two folders with equal names, or a table."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from shared.cases import Sample, SiteData, split_of
from shared.composed import composed, parts_of, require_parts
from shared.config import Job
from shared.errors import SiteRefusal
from shared.imaging.nifti import is_nifti_name
from shared.imaging.read import is_image_name
from shared.imaging.volumes import volume_patient
from shared.samples import Row, class_index, make_sample, parse_frame, parse_split, read_rows, require_files

IMAGES = "images"
MASKS = ("labels", "masks")
SPLITS = "splits.csv"  # beside the two folders: file,split[,patient][,label]
SITES = "sites.csv"  # in the folder above: site,split and file, path or image


def read_samples(site: SiteData, job: Job) -> Iterator[Sample]:
    """All images of a site that have a mask; see ``shared.samples.read_samples``."""
    form = "csv" if composed(job) else site.format
    if form == "auto":
        form = "csv" if site.csv or (site.root / "labels.csv").is_file() else "masks"
    return _READERS[form](site, job)


def _from_csv(site: SiteData, job: Job) -> Iterator[Sample]:
    """Columns path and mask; label if the job has labels of whole images; optional patient, split, frame.

    Of cases of several images ``path:NAME`` for each of them, all on the mask's grid.
    """
    needed = [] if job.modalities else ["path"]
    table, rows = read_rows(site, [*needed, "mask", *(["label"] if job.labels else [])])
    require_files(site, table, rows, "mask")
    if composed(job):
        require_parts(site, table, rows, job)
    for line, row in enumerate(rows, start=2):
        where = f"{table} line {line}"
        more: dict[str, object] = {"mask": row["mask"]} | parts_of(row, where, site, job)
        path = str(more.pop("path"))
        if row.get("frame"):
            more["frame"] = parse_frame(row["frame"], where)
        patient = row.get("patient") or volume_patient(site.root / path) or path
        split = parse_split(row.get("split") or "", where)
        yield make_sample(job, path, _target(row, where, site, job), patient, split, **more)


def _from_masks(site: SiteData, job: Job) -> Iterator[Sample]:
    """``images/`` and ``labels/`` (or ``masks/``) whose entries are named alike but for the suffix."""
    folder = next((name for name in MASKS if (site.root / name).is_dir()), None)
    if folder is None or not (site.root / IMAGES).is_dir():
        raise SiteRefusal("no-data", f"{site.root}: needs the folders images and labels (or masks), or a labels.csv")
    images, masks = _by_stem(site.root / IMAGES), _by_stem(site.root / folder)
    for here, there, missing in ((IMAGES, folder, images.keys() - masks), (folder, IMAGES, masks.keys() - images)):
        if missing:
            names = ", ".join(sorted(missing)[:3]) + (", …" if len(missing) > 3 else "")
            raise SiteRefusal(
                "missing-files",
                f"{site.root}: {len(missing)} entries of {here} have none of that name in {there}: {names}",
            )
    where, rows = _split_table(site)
    unlisted = sorted(images.keys() - rows) if rows else []
    if unlisted:
        raise SiteRefusal("bad-table", f"{where}: does not list {len(unlisted)} of the images, first {unlisted[0]}")
    held_out = {parse_split(row.get("split") or "", str(where)) for row in rows.values()}
    for name, path in sorted(images.items()):
        row = rows.get(name, {})
        patient = row.get("patient") or volume_patient(path) or name
        split = parse_split(row.get("split") or "", str(where))
        if split == "train" and "test" in held_out and "val" not in held_out:
            # Listed for training and testing only: part of the training images picks the best round.
            split = split_of(patient, job.data.val_fraction, 0.0)
        image, mask = (file.relative_to(site.root).as_posix() for file in (path, masks[name]))
        yield make_sample(job, image, _target(row, f"{where}: {name}", site, job), patient, split, mask=mask)


def _target(row: Row, where: str, site: SiteData, job: Job) -> tuple[int, ...]:
    """The class of the whole image, where the job asks for one."""
    if not job.labels:
        return ()
    if not row.get("label"):
        raise SiteRefusal("bad-table", f"{where}: no label; the job learns {job.data.labels} of each image")
    return (class_index(row["label"].strip(), where, site, job.labels),)


def _by_stem(folder: Path) -> dict[str, Path]:
    """Images and volumes in a folder (files, and folders of DICOM slices) by their names without suffix."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not (path.is_dir() or is_nifti_name(path) or is_image_name(path)):
            continue
        name = stem(path.name) if path.is_file() else path.name
        if name in found:
            raise SiteRefusal("bad-table", f"{folder}: {found[name].name} and {path.name} differ in suffix only")
        found[name] = path
    return found


def stem(name: str) -> str:
    """A file's name without the suffix, ``.nii.gz`` being one; a number at the end as in a UID belongs to the name."""
    name = name.removesuffix(".gz") if name.endswith(".nii.gz") else name
    head, dot, suffix = name.rpartition(".")
    return head if dot and head and not suffix.isdecimal() else name


def _split_table(site: SiteData) -> tuple[Path, dict[str, Row]]:
    """The table that says which images train and test, by their stems; no rows where there is none."""
    own, above = site.root / SPLITS, site.root.resolve().parent / SITES
    if own.is_file():
        return own, _rows(own, ("file",), lambda row: True)
    if above.is_file():
        name = site.root.resolve().name
        rows = _rows(above, ("file", "path", "image"), lambda row: row.get("site") == name)
        # A column label of this table names the mask, if anything: labels of images stand in a site's own table.
        return above, {key: {name: text for name, text in row.items() if name != "label"} for key, row in rows.items()}
    return own, {}


def _rows(table: Path, columns: tuple[str, ...], wanted: Callable[[Row], bool]) -> dict[str, Row]:
    """The wanted rows of a table by the stem of the file each names in the first of ``columns`` it has."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.DictReader(file) if wanted(row)]
    except OSError as error:
        raise SiteRefusal("bad-table", f"{table}: cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise SiteRefusal("bad-table", f"{table}: not a CSV in UTF-8: {error}") from None
    column = next((name for name in columns if rows and name in rows[0]), None)
    if rows and (column is None or "split" not in rows[0]):
        raise SiteRefusal(
            "bad-table",
            f"{table}: needs the columns split and {' or '.join(columns)}, has {', '.join(map(str, rows[0]))}",
        )
    found: dict[str, Row] = {}
    for row in rows:
        key = stem(PurePosixPath(row[column or ""] or "").name)
        if key in found and found[key] != row:
            raise SiteRefusal("bad-table", f"{table}: names {key} twice")
        found[key] = row
    return found


_READERS = {"csv": _from_csv, "masks": _from_masks}

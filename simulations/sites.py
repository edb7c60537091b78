"""From a folder of images to sites: finds the hospitals in it, or invents some, and writes a site.toml for each."""

from __future__ import annotations

import csv
import io
import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from server.store import write_text
from shared.cases import Sample, SiteData, split_word
from shared.config import Job, toml_scalar
from shared.errors import SiteRefusal, UserError
from shared.sitefile import read_site
from shared.tasks import load_task
from simulations.partition import partition


def find_sites(data: Path, job: Job, out: Path) -> list[Path]:
    """The site.toml of every site of a simulation over the folder ``data``.

    Folders that already have a site.toml are taken as they are. Otherwise ``data`` itself is one site if it holds a
    labels.csv, an annotations.json, an npz or the class folders; else each of its folders is a site. With
    ``data.partition`` other than ``site`` all images are dealt out to invented sites. New files go to ``out``/sites.

    Raises:
        UserError: no site there, a site that cannot be read, two sites of one name.
    """
    if not data.is_dir():
        raise UserError(f"--data {data}: no such folder")
    files = _own_files(data) or [
        _describe(folder, number, job, out) for number, folder in enumerate(_site_folders(data, job), start=1)
    ]
    if not files:
        raise UserError(f"--data {data}: no images found; see docs/researcher.md for the layouts that are read")
    sites = [read_site(file) for file in files]
    names = [site.name for site in sites]
    for name in names:
        if names.count(name) > 1:
            where = ", ".join(str(file) for file, other in zip(files, names, strict=True) if other == name)
            raise UserError(f"two sites are named {name!r} ({where}); give each site.toml a name of its own")
    samples = [_samples(site, job) for site in sites]
    return files if job.data.partition == "site" else _deal_out(data, sites, samples, job, out)


def _samples(site: SiteData, job: Job) -> list[Sample]:
    try:
        found: list[Sample] = load_task(job.task).read_samples(site, job)
    except SiteRefusal as refusal:
        raise UserError(f"site {site.name}: {refusal}") from None
    return found


def _own_files(data: Path) -> list[Path]:
    own = data / "site.toml"
    return [own] if own.is_file() else sorted(data.glob("*/site.toml"))


def _site_folders(data: Path, job: Job) -> list[Path]:
    single = any((data / name).exists() for name in ("labels.csv", "annotations.json")) or any(data.glob("*.npz"))
    folders = sorted(path for path in data.iterdir() if path.is_dir() and not path.name.startswith("."))
    if single or any(split_word(folder.name) or folder.name in job.classes for folder in folders):
        return [data]
    return folders


def _describe(folder: Path, number: int, job: Job, out: Path) -> Path:
    """Write a site.toml for a folder, named as the folder as far as a site's name may be."""
    plain = unicodedata.normalize("NFKD", folder.resolve().name).encode("ascii", "ignore").decode()
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip("._-")[:60] or f"site-{number}"
    if (out / "sites" / name).exists():  # Zürich and Zurich
        name = f"{name}-{number}"
    place = toml_scalar(str(folder.resolve()))
    content = f'name = "{name}"\n\n[data]\ndir = {place}\nformat = "{job.data.format}"\n'
    file = out / "sites" / name / "site.toml"
    write_text(file, content)
    return file


def _deal_out(
    data: Path, sites: Sequence[SiteData], samples: Sequence[list[Sample]], job: Job, out: Path
) -> list[Path]:
    """Write invented sites as a site.toml and a CSV each; the CSV is the record of the draw."""
    root = data.resolve()
    pool = [
        (os.path.relpath((site.root / sample.path).resolve(), root), f"{site.name}:{sample.patient}", sample)
        for site, own in zip(sites, samples, strict=True)
        for sample in own
    ]
    named = [
        Sample(sample.path, sample.target, patient, sample.split, sample.frame, sample.box, sample.key)
        for _, patient, sample in pool
    ]
    files = []
    for number, members in enumerate(partition(named, job), start=1):
        name = f"site-{number}"
        table = io.StringIO()
        rows = csv.writer(table, lineterminator="\n")
        rows.writerow(["path", "label", "patient", "split", "frame", "box", "key"])
        for index in members:
            path, patient, sample = pool[index]
            label = "|".join(job.classes[k] for k in sample.target)
            box = " ".join(repr(value) for value in sample.box) if sample.box else ""
            rows.writerow([path, label, patient, sample.split, sample.frame, box, sample.key])
        folder = out / "sites" / name
        write_text(folder / "labels.csv", table.getvalue())
        places = toml_scalar(str(root)), toml_scalar(str((folder / "labels.csv").resolve()))
        write_text(
            folder / "site.toml", f'name = "{name}"\n\n[data]\ndir = {places[0]}\nformat = "csv"\ncsv = {places[1]}\n'
        )
        files.append(folder / "site.toml")
    return files

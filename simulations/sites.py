"""From a folder of images to sites: finds the hospitals in it, or invents some, and writes a site.toml for each."""

from __future__ import annotations

import dataclasses
import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from shared.cases import Sample, SiteData, split_word
from shared.config import Job, Scalar, toml_scalar
from shared.errors import SiteRefusal, UserError
from shared.files import write_text
from shared.samples import CASES, read_samples, write_cases
from shared.sitefile import read_site
from simulations.partition import partition

# A folder that holds one of these is one site.
_SINGLE = ("labels.csv", "annotations.json", "images", "labels", "masks", "Annotations", "JPEGImages")


def find_sites(data: Path, job: Job, out: Path, cache: Path | None = None) -> list[Path]:
    """The site.toml of every site of a simulation over the folder ``data``.

    Folders that already have a site.toml are taken as they are. Otherwise ``data`` itself is one site if it holds a
    labels.csv, an annotations.json, an npz, a folder of images or masks, or the class folders; else each of its folders
    is a site. With ``data.partition`` other than ``site`` all images are dealt out to invented sites. New files go to
    ``out``/sites; sites described by them keep decoded images in ``cache``, if it is given.

    Raises:
        UserError: no site there, a site that cannot be read, two sites of one name.
    """
    require_folder(data)
    files = _own_files(data) or [
        _describe(folder, number, job, out, cache) for number, folder in enumerate(_site_folders(data, job), start=1)
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
    return files if job.data.partition == "site" else _deal_out(data, sites, samples, job, out, cache)


def require_folder(data: Path) -> None:
    """Raise UserError where the folder of images is not there."""
    if not data.is_dir():
        raise UserError(f"--data {data}: no such folder")


def _samples(site: SiteData, job: Job) -> list[Sample]:
    try:
        return read_samples(site, job)
    except SiteRefusal as refusal:
        raise UserError(f"site {site.name}: {refusal}") from None


def _own_files(data: Path) -> list[Path]:
    own = data / "site.toml"
    return [own] if own.is_file() else sorted(data.glob("*/site.toml"))


def _site_folders(data: Path, job: Job) -> list[Path]:
    single = any((data / name).exists() for name in _SINGLE) or any(data.glob("*.npz"))
    folders = sorted(path for path in data.iterdir() if path.is_dir() and not path.name.startswith("."))
    if single or any(split_word(folder.name) or folder.name in job.classes for folder in folders):
        return [data]
    return folders


def _describe(folder: Path, number: int, job: Job, out: Path, cache: Path | None) -> Path:
    """Write a site.toml for a folder, named as the folder as far as a site's name may be."""
    plain = unicodedata.normalize("NFKD", folder.resolve().name).encode("ascii", "ignore").decode()
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip("._-")[:60] or f"site-{number}"
    if (out / "sites" / name).exists():  # Zürich and Zurich
        name = f"{name}-{number}"
    place = toml_scalar(str(folder.resolve()))
    content = f'name = "{name}"\n\n[data]\ndir = {place}\nformat = "{job.data.format}"\n' + _cache(cache, name)
    file = out / "sites" / name / "site.toml"
    write_text(file, content)
    return file


def _cache(folder: Path | None, name: str) -> str:
    """The table of a site.toml that keeps decoded images in ``folder``."""
    return f"\n[cache]\ndir = {toml_scalar(str((folder / name).resolve()))}\n" if folder else ""


def _deal_out(
    data: Path, sites: Sequence[SiteData], samples: Sequence[list[Sample]], job: Job, out: Path, cache: Path | None
) -> list[Path]:
    """Write invented sites as a site.toml and a table each; the table is the record of the draw."""
    root = data.resolve()
    pool = [_moved(sample, site, root) for site, own in zip(sites, samples, strict=True) for sample in own]
    words = {word: name for site in sites for word, name in site.label_map.items()}  # masks name classes themselves
    label_map = "".join(f"{toml_scalar(word)} = {toml_scalar(name)}\n" for word, name in words.items())
    files = []
    for number, members in enumerate(partition(pool, job), start=1):
        name = f"site-{number}"
        folder = out / "sites" / name
        write_text(folder / "cases.csv", write_cases(pool[index] for index in members))
        places = toml_scalar(str(root)), toml_scalar(str((folder / "cases.csv").resolve()))
        text = f'name = "{name}"\n\n[data]\ndir = {places[0]}\nformat = "{CASES}"\ncsv = {places[1]}\n'
        text += _cache(cache, name)
        write_text(folder / "site.toml", text + (f"\n[label_map]\n{label_map}" if label_map else ""))
        files.append(folder / "site.toml")
    return files


def _moved(sample: Sample, site: SiteData, root: Path) -> Sample:
    """The sample as seen from ``root``; patients of different sites are different patients."""

    def seen(name: str) -> str:
        return os.path.relpath((site.root / name).resolve(), root) if name else ""

    return dataclasses.replace(
        sample,
        path=seen(sample.path),
        mask=seen(sample.mask),
        paths=tuple(map(seen, sample.paths)),
        patient=f"{site.name}:{sample.patient}",
    )


def node_of(homes: Path, file: Path, name: str = "", more: Sequence[Path] = ()) -> dict[str, Scalar]:
    """A node that plays the site of ``file``, or pools it with ``more``; its own files go to ``homes``."""
    name = name or read_site(file).name
    return {
        "site": "\n".join(str(path.resolve()) for path in (file, *more)),
        "home": str((homes / name).resolve()),
        "name": name,
    }

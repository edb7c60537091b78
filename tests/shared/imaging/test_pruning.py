"""The cache within its limit: what was used last stays, what others use stays readable, nothing foreign is touched."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shared.cases import Sample, SiteData
from shared.config import Job, job_from_flat
from shared.errors import UserError
from shared.imaging import dataset
from shared.imaging.dataset import Dataset, load_dataset
from shared.imaging.pruning import INDEX, prune
from shared.sitefile import read_site

SAMPLES = [Sample(f"{number}.png", (0,), str(number), "train") for number in range(4)]


@pytest.fixture
def site(tmp_path: Path) -> SiteData:
    generator = np.random.default_rng(0)
    for sample in SAMPLES:
        Image.fromarray(generator.integers(0, 256, (20, 20), dtype=np.uint8)).save(tmp_path / sample.path)
    return SiteData("s", tmp_path)


def load(site: SiteData, size: int, gb: float = 100.0) -> Dataset:
    job: Job = job_from_flat({"data.size": size})
    return load_dataset(SAMPLES, dataclasses.replace(site, cache_gb=gb), job)


def there(site: SiteData) -> set[int]:
    """The sizes of the images in the cache."""
    found = (site.root / ".consilium" / "cache").glob("*/image.raw")
    return {round((path.stat().st_size / 2 / len(SAMPLES)) ** 0.5) for path in found}


def used(site: SiteData, size: int, ago: float) -> None:
    """An entry as if it was used so many seconds ago."""
    for path in (site.root / ".consilium" / "cache").glob("*/image.raw"):
        if path.stat().st_size == 2 * len(SAMPLES) * size * size:
            os.utime(path.parent / INDEX, (time.time() - ago,) * 2)


def test_what_was_used_last_stays(site: SiteData) -> None:
    for size, ago in ((16, 300), (17, 200), (18, 100)):
        load(site, size)
        used(site, size, ago)
    load(site, 16)  # again, which counts
    load(site, 19, gb=(2 * 4 * (16 * 16 + 19 * 19) + 2000) / 1e9)  # room for these two, and for what is beside pixels
    assert there(site) == {16, 19}


def test_one_that_is_too_large_by_itself_is_kept_while_it_is_needed(site: SiteData) -> None:
    assert len(load(site, 16, gb=1e-9)) == 4
    assert there(site) == {16}
    assert len(load(site, 17, gb=1e-9)) == 4
    assert there(site) == {17}


def test_who_has_it_open_reads_on(site: SiteData) -> None:
    held = load(site, 16)
    before = np.array(held.columns["image"].take(range(4)))
    load(site, 17, gb=1e-9)
    assert there(site) == {17}
    assert (held.columns["image"].take(range(4)) == before).all()
    assert (load(site, 16).columns["image"].take(range(4)) == before).all()


def test_an_entry_that_another_process_removes_meanwhile_is_decoded_anew(
    site: SiteData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index was read; now the pixels are gone, and the index with them."""
    before = np.array(load(site, 16).columns["image"].take(range(4)))
    real, removed = dataset._open, list[Path]()

    def late(path: Path, **facts: Any) -> dataset.Column:
        if not removed:
            removed.append(path.parent)
            prune(path.parents[1], 0.0, path.parents[1] / "none")
        return real(path, **facts)

    monkeypatch.setattr(dataset, "_open", late)
    assert (load(site, 16).columns["image"].take(range(4)) == before).all()
    assert len(removed) == 1


def test_nothing_else_in_the_folder_is_touched(site: SiteData) -> None:
    cache = site.root / ".consilium" / "cache"
    load(site, 16)
    for name in ("images", "0123", "f" * 31 + "g"):
        (cache / name).mkdir()
        (cache / name / INDEX).write_text("{}")
    (cache / ("a" * 32)).write_text("a file")
    for name, age in {".writing-new": 60, ".writing-old": 90_000}.items():
        (cache / name).mkdir()
        os.utime(cache / name, (time.time() - age,) * 2)
    load(site, 17, gb=1e-9)
    left = {path.name for path in cache.iterdir()}
    assert {"images", "0123", "f" * 31 + "g", "a" * 32, ".writing-new"} < left
    assert len(left) == 6  # and the one entry
    assert (cache / "images" / INDEX).read_text() == "{}"


@given(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=12), limit=st.integers(0, 300), data=st.data())
def test_as_little_as_need_be_goes_oldest_first(
    sizes: list[int], limit: int, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    names = [f"{number:032x}" for number in range(len(sizes))]
    for number, (name, size) in enumerate(zip(names, sizes, strict=True)):
        (folder / name).mkdir()
        (folder / name / INDEX).write_bytes(b"")
        (folder / name / "image.raw").write_bytes(bytes(size))
        os.utime(folder / name / INDEX, (1000 + number,) * 2)
    kept = data.draw(st.integers(0, len(sizes) - 1))
    prune(folder, limit, folder / names[kept])
    expected, total = set(range(len(sizes))), sum(sizes)
    for number, size in enumerate(sizes):
        if total > limit and number != kept:
            expected.remove(number)
            total -= size
    assert {path.name for path in folder.iterdir()} == {names[number] for number in expected}


def test_a_limit_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "site.toml"
    file.write_text('name = "a"\n[cache]\nmax_gb = 5\n')
    assert read_site(file).cache_gb == 5.0
    file.write_text('name = "a"\n')
    assert read_site(file).cache_gb == 100.0
    file.write_text('name = "a"\n[cache]\nmax_gb = 0\n')
    with pytest.raises(UserError, match=r"cache\.max_gb = 0: must be above 0"):
        read_site(file)

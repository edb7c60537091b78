"""The cache of decoded images: right pixels, decoded once, never half written."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import shared.tasks.classification.data as module
from shared.cases import Sample, SiteData
from shared.config import Job, job_from_flat
from shared.errors import SiteRefusal
from shared.imaging.dataset import Dataset, concatenate, load_dataset, to_float
from shared.imaging.read import fit, read_image


@pytest.fixture
def job() -> Job:
    return job_from_flat({"data.size": 12})


@pytest.fixture
def site(tmp_path: Path) -> SiteData:
    """Six pictures of different shapes, grey and colour, of 8 and 16 bits."""
    generator = np.random.default_rng(0)
    for number, shape in enumerate([(20, 30), (30, 20), (5, 5), (12, 12, 3), (40, 9, 3)]):
        Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / f"{number}.png")
    Image.fromarray(generator.integers(0, 65536, (15, 17), dtype=np.uint16)).save(tmp_path / "5.png")
    return SiteData("s", tmp_path)


def samples_of(numbers: Any = range(6), **more: Any) -> list[Sample]:
    return [Sample(f"{k}.png", (k % 2,), str(k), ("train", "val", "test")[k % 3], **more) for k in numbers]


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are decoded from here on."""
    names: list[str] = []

    def observed(path: Path, *args: Any, **kwargs: Any) -> Any:
        names.append(Path(path).name)
        return read_image(path, *args, **kwargs)

    monkeypatch.setattr(module, "read_image", observed)
    return names


def pixels(data: Dataset) -> np.ndarray:
    return data.columns["image"].take(range(len(data)))


@pytest.mark.parametrize("channels", [1, 3])
def test_decoded_pixels_are_those_of_read_and_fit(site: SiteData, channels: int) -> None:
    job = job_from_flat({"data.size": 12, "data.channels": channels})
    data = load_dataset(samples_of(), site, job)
    images = to_float(pixels(data))
    assert images.shape == (6, channels, 12, 12)
    for number, image in enumerate(images.numpy()):
        expected = fit(read_image(site.root / f"{number}.png"), 12, 12, channels)
        assert np.abs(image - expected).max() <= 1 / 65535
    batch = module.batch(data, range(6), job, torch.device("cpu"), train=False)
    assert torch.equal(batch.images, (images - 0.5) / 0.25)
    assert batch.targets == [(k % 2,) for k in range(6)]
    assert data.samples == tuple(samples_of())
    assert not data.skipped


def test_a_second_load_decodes_nothing_and_gives_the_same(site: SiteData, job: Job, decoded: list[str]) -> None:
    first = load_dataset(samples_of(), site, job)
    assert decoded == [f"{k}.png" for k in range(6)]
    second = load_dataset(samples_of(), site, job)
    assert len(decoded) == 6
    assert (pixels(first) == pixels(second)).all()
    assert first.samples == second.samples


def test_progress_is_told_for_every_image_while_decoding_only(site: SiteData, job: Job) -> None:
    steps: list[tuple[int, int]] = []
    for _ in range(2):
        load_dataset(samples_of(), site, job, lambda done, of: steps.append((done, of)))
    assert steps == [(k, 6) for k in range(1, 7)]


@pytest.mark.parametrize("change", ["pixels", "time", "size of the job", "channels", "samples", "gone"])
def test_what_has_changed_is_decoded_anew(site: SiteData, job: Job, decoded: list[str], change: str) -> None:
    load_dataset(samples_of(), site, job)
    decoded.clear()
    file, samples = site.root / "2.png", samples_of()
    match change:
        case "pixels":
            Image.fromarray(np.full((5, 6), 255, np.uint8)).save(file)
        case "time":
            os.utime(file, (1, 1))
        case "size of the job":
            job = job.replace(data__size=16)
        case "channels":
            job = job.replace(data__channels=3)
        case "samples":
            samples = samples[:5]
        case "gone":
            file.unlink()
            site = SiteData("s", site.root, max_unreadable=1.0)
    data = load_dataset(samples, site, job)
    assert set(decoded) >= {"2.png"}
    assert len(data) + len(data.skipped) == len(samples)
    if change == "pixels":
        assert pixels(data)[2].max() == 65535


def test_what_does_not_touch_the_pixels_is_not_decoded_anew(site: SiteData, job: Job, decoded: list[str]) -> None:
    load_dataset(samples_of(), site, job)
    decoded.clear()
    other = [Sample(sample.path, (0,), "other", "train") for sample in samples_of()]
    data = load_dataset(other, site, job.replace(seed=4, train__local_steps=9, data__normalise="image"))
    assert not decoded
    assert data.samples == tuple(other)


def test_an_interrupted_decoding_leaves_no_half_cache(
    site: SiteData, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 0

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return read_image(*args, **kwargs)

    monkeypatch.setattr(module, "read_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_dataset(samples_of(), site, job)
    assert not list((site.root / ".consilium" / "cache").iterdir())
    data = load_dataset(samples_of(), site, job)
    assert len(data) == 6


def test_a_process_that_was_killed_while_decoding_spoils_nothing(site: SiteData, job: Job, root: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; import shared.imaging.dataset as d; from shared.cases import *\n"
        "from shared.config import job_from_flat\n"
        "site = SiteData('s', Path(sys.argv[1]))\n"
        "samples = [Sample(f'{k}.png', (0,), '', 'train') for k in range(6)]\n"
        "d.load_dataset(samples, site, job_from_flat({'data.size': 12}), lambda done, of: done == 3 and os._exit(9))"
    )
    env = {**os.environ, "PYTHONPATH": str(root)}
    assert subprocess.run([sys.executable, "-c", code, str(site.root)], env=env, check=False).returncode == 9
    expected = [fit(read_image(site.root / f"{k}.png"), 12, 12, 1) for k in range(6)]
    assert np.abs(pixels(load_dataset(samples_of(), site, job)) / 65535 - expected).max() <= 1 / 65535


def test_two_processes_that_decode_at_once_both_get_it_right(site: SiteData, job: Job, root: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; import shared.imaging.dataset as d; from shared.cases import *\n"
        "from shared.config import job_from_flat\n"
        "site, here = SiteData('s', Path(sys.argv[1])), Path(sys.argv[2])\n"
        "samples = [Sample(f'{k}.png', (0,), '', 'train') for k in range(6)]\n"
        "def meet(done, of):\n"  # both are in the middle of their decoding before either goes on
        "    if done == 3:\n"
        "        here.touch(); deadline = time.monotonic() + 60\n"
        "        while len(list(here.parent.glob('*.there'))) < 2 and time.monotonic() < deadline: time.sleep(.01)\n"
        "data = d.load_dataset(samples, site, job_from_flat({'data.size': 12}), meet)\n"
        "print(data.columns['image'].take(range(6)).astype(int).sum((1, 2, 3)).tolist())"
    )
    (site.root / "meet").mkdir()
    env = {**os.environ, "PYTHONPATH": str(root)}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(site.root), str(site.root / "meet" / f"{name}.there")],
            env=env,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in "ab"
    ]
    answers = [process.communicate(timeout=120)[0].strip() for process in both]
    data = load_dataset(samples_of(), site, job)
    assert answers == [str(pixels(data).astype(int).sum((1, 2, 3)).tolist())] * 2
    assert [path.name[0] != "." for path in (site.root / ".consilium" / "cache").iterdir()] == [True]


def test_a_file_put_back_with_its_old_time_is_decoded_anew(site: SiteData, job: Job) -> None:
    """As ``cp -p`` and ``rsync -t`` do: the same name, the same size, the same time of change."""
    data, path = load_dataset(samples_of(), site, job), site.root / "new.png"
    before = (site.root / "5.png").stat()
    grey = np.asarray(Image.open(site.root / "5.png"))
    Image.fromarray(grey[::-1].copy()).save(path)
    path.write_bytes(path.read_bytes().ljust(before.st_size, b"\0")[: before.st_size])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(path, site.root / "5.png")
    after = (site.root / "5.png").stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert not np.array_equal(pixels(load_dataset(samples_of(), site, job)), pixels(data))


@pytest.mark.parametrize("how", ["no index", "half an index", "another index", "no pixels", "fewer pixels"])
def test_an_entry_that_a_power_cut_left_in_part_is_made_anew(site: SiteData, job: Job, how: str) -> None:
    expected = pixels(load_dataset(samples_of(), site, job)).copy()
    (entry,) = (site.root / ".consilium" / "cache").iterdir()
    index, raw = entry / "index.json", entry / "image.raw"
    if how == "another index":
        index.write_text("[]")
    elif "index" in how:
        index.write_text(index.read_text()[: 0 if how == "no index" else 40])
    else:
        raw.write_bytes(raw.read_bytes()[: 0 if how == "no pixels" else -288])
    assert np.array_equal(pixels(load_dataset(samples_of(), site, job)), expected)
    assert np.array_equal(pixels(load_dataset(samples_of(), site, job)), expected)


def test_a_disk_without_room_is_said_and_leaves_nothing(site: SiteData, job: Job) -> None:
    """No file may grow beyond 600 bytes; the images' take 1,728."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, hard))
    try:
        with pytest.raises(SiteRefusal, match="cannot write the image cache: File too large") as caught:
            load_dataset(samples_of(), site, job)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.code == "no-cache"
    assert not list((site.root / ".consilium" / "cache").iterdir())
    assert len(load_dataset(samples_of(), site, job)) == 6


def test_unreadable_images_are_left_out_and_listed(site: SiteData, job: Job) -> None:
    (site.root / "1.png").write_bytes(b"no picture")
    (site.root / "3.png").unlink()
    data = load_dataset(samples_of(), SiteData("s", site.root, max_unreadable=0.5), job)
    assert [sample.path for sample in data.samples] == ["0.png", "2.png", "4.png", "5.png"]
    assert [(skip.path, skip.code) for skip in data.skipped] == [
        ("1.png", "unsupported-format"),
        ("3.png", "not-found"),
    ]
    assert len(data.columns["image"]) == len(data) == 4
    for image, sample in zip(pixels(data), data.samples, strict=True):
        expected = fit(read_image(site.root / sample.path), 12, 12, 1)
        assert np.abs(image / 65535 - expected).max() <= 1 / 65535


@pytest.mark.parametrize(("limit", "fits"), [(0.0, False), (0.33, False), (0.34, True), (1.0, True)])
def test_more_unreadable_images_than_the_site_allows_are_refused(
    site: SiteData, job: Job, limit: float, fits: bool
) -> None:
    for number in (1, 3):
        (site.root / f"{number}.png").write_bytes(b"")
    site = SiteData("s", site.root, max_unreadable=limit)
    for _ in range(2):  # from the files, then from the cache
        if fits:
            assert len(load_dataset(samples_of(), site, job)) == 4
        else:
            with pytest.raises(SiteRefusal, match=r"2 of 6 images.*1\.png \(empty-file\)") as caught:
                load_dataset(samples_of(), site, job)
            assert caught.value.code == "too-many-unreadable"


def test_the_limit_itself_is_still_allowed(tmp_path: Path, job: Job) -> None:
    """29 of 50 at a limit of 0.58, whose product with 50 is a little below 29 as a float."""
    samples = [Sample(f"{k}.png", (0,), str(k), "train") for k in range(50)]
    for k in range(29, 50):
        Image.new("L", (2, 2)).save(tmp_path / f"{k}.png")
    assert len(load_dataset(samples, SiteData("s", tmp_path, max_unreadable=0.58), job)) == 21


def test_a_site_of_unreadable_images_only_is_an_empty_set(site: SiteData, job: Job) -> None:
    data = load_dataset(samples_of(range(7, 9)), SiteData("s", site.root, max_unreadable=1.0), job)
    assert len(data) == len(data.subset("train")) == 0
    assert not any(map(len, data.columns.values()))


def test_a_cache_that_cannot_be_written_is_refused_by_name(site: SiteData, job: Job) -> None:
    (site.root / "file").touch()
    with pytest.raises(SiteRefusal, match="file") as caught:
        load_dataset(samples_of(), SiteData("s", site.root, cache=site.root / "file" / "cache"), job)
    assert caught.value.code == "no-cache"


BOXES = [(2.0, 3.0, 10.0, 5.0), (-4.0, -4.0, 10.0, 9.0), (25.0, 15.0, 99.0, 99.0), (0.0, 0.0, 0.6, 0.6)]


@pytest.mark.parametrize("box", [*BOXES, (0.5, 0.5, 2.0, 2.0), (2.5, 1.5, 6.0, 6.0), (3.2, 4.7, 5.5, 5.1)])
def test_boxes_are_cut_as_the_reader_cuts_them(site: SiteData, job: Job, box: tuple[float, ...]) -> None:
    data = load_dataset(samples_of([0], box=box), site, job)
    expected = fit(read_image(site.root / "0.png", box=box), 12, 12, 1)  # type: ignore[arg-type]
    assert np.abs(pixels(data)[0] / 65535 - expected).max() <= 1 / 65535


def test_boxes_of_one_file_share_one_decoding_and_one_outside_is_left_out(
    site: SiteData, job: Job, decoded: list[str]
) -> None:
    boxes = [*BOXES[:3], (100.0, 0.0, 5.0, 5.0), (0.0, 0.0, 0.0, 5.0)]
    samples = [sample for box in boxes for sample in samples_of([0], box=box)]
    data = load_dataset(samples, SiteData("s", site.root, max_unreadable=0.5), job)
    assert decoded == ["0.png"]
    assert [sample.box for sample in data.samples] == boxes[:3]
    assert {skip.code for skip in data.skipped} == {"bad-crop"}
    picture = read_image(site.root / "0.png")
    expected = [picture[3:8, 2:12], picture[0:5, 0:6], picture[15:20, 25:30]]
    for image, part in zip(pixels(data), expected, strict=True):
        assert np.abs(image / 65535 - fit(part, 12, 12, 1)).max() <= 1 / 65535


def test_frames_and_keys_name_the_picture_of_an_array(tmp_path: Path, job: Job) -> None:
    arrays = {key: np.random.default_rng(k).integers(0, 256, (3, 12, 12), dtype=np.uint8) for k, key in enumerate("ab")}
    np.savez(tmp_path / "x.npz", **arrays)
    samples = [Sample("x.npz", (0,), "", "train", frame=k, key=key) for key in "ba" for k in (2, 0)]
    found = pixels(load_dataset(samples, SiteData("s", tmp_path), job))[:, 0]
    expected = [arrays[key][k] / 255 for key in "ba" for k in (2, 0)]
    assert np.abs(found / 65535 - expected).max() <= 1 / 65535


# --- subset, batch, concatenate ---------------------------------------------------------------------------------------


def invented(n: int, seed: int = 0) -> Dataset:
    images = np.random.default_rng(seed).integers(0, 65536, (n, 1, 3, 3), dtype=np.uint16)
    return Dataset.of(samples_of(range(n)), image=images)


def images_of(data: Dataset) -> np.ndarray:
    return pixels(data) if len(data) else np.zeros((0, 1, 3, 3), np.uint16)


def same(data: Dataset, images: np.ndarray, samples: list[Sample]) -> bool:
    return data.samples == tuple(samples) and np.array_equal(images_of(data), images)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 20), st.data())
def test_subsets_and_batches_are_plain_indexing(n: int, draw: st.DataObject) -> None:
    data, job = invented(n), job_from_flat({"data.size": 8})
    whole = images_of(data)
    assert same(data, whole, list(data.samples))
    for split in ("train", "val", "test"):
        keep = [k for k in range(n) if data.samples[k].split == split]
        part = data.subset(split)
        assert same(part, whole[keep], [data.samples[k] for k in keep])
        assert same(part.subset(split), whole[keep], [data.samples[k] for k in keep])
        assert len(part.subset("other")) == 0
        assert part.whole is part.subset(split).whole is data.whole is data
        if keep:
            chosen = draw.draw(st.lists(st.integers(0, len(keep) - 1), min_size=1, max_size=8))
            batch = module.batch(part, chosen, job, torch.device("cpu"), train=False)
            expected = whole[[keep[k] for k in chosen]].astype(np.float32) / 65535
            assert np.allclose(batch.images.numpy() * 0.25 + 0.5, expected, atol=1e-7)
            assert batch.images.dtype.is_floating_point
            assert batch.targets == [data.samples[keep[k]].target for k in chosen]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4))
def test_concatenated_sets_are_their_images_one_after_another(sizes: list[int]) -> None:
    parts = [invented(n, seed) for seed, n in enumerate(sizes)]
    data = concatenate(parts)
    expected = np.concatenate([images_of(part) for part in parts])
    assert same(data, expected, [s for part in parts for s in part.samples])


def test_concatenating_takes_parts_of_sets_and_leaves_out_what_could_not_be_read(site: SiteData, job: Job) -> None:
    (site.root / "0.png").write_bytes(b"")
    loaded = load_dataset(samples_of(), SiteData("s", site.root, max_unreadable=0.5), job)
    data = concatenate([loaded, loaded.subset("val"), loaded])
    rows = [0, 1, 2, 3, 4, 0, 3, 0, 1, 2, 3, 4]
    assert (pixels(data) == pixels(loaded)[rows]).all()
    assert data.samples == tuple(loaded.samples[k] for k in rows)
    assert len(data.skipped) == 3


def test_a_set_in_the_cache_is_mapped_and_not_read_into_memory(site: SiteData, job: Job) -> None:
    data = load_dataset(samples_of(), site, job)
    whole, part = data.columns["image"].flat, data.subset("train").columns["image"].flat
    assert isinstance(whole, np.memmap)
    assert part is whole
    assert np.shares_memory(data.columns["image"][0], whole)

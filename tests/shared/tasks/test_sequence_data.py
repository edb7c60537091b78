"""Sequence cases: layouts, decoding, batches, and bad input that is named."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from shared.cases import Sample, SiteData
from shared.config import Job, job_from_flat
from shared.errors import SiteRefusal
from shared.imaging.dataset import Dataset, load_dataset, to_float
from shared.imaging.sequences import pick
from shared.samples import read_samples
from shared.tasks.sequence import batch, decode, decoded_by, find
from simulations.cohorts import perfusion

CPU = torch.device("cpu")


def job(name: str = "cnn_gru", **more: Any) -> Job:
    small = {"task": "sequence", "model.name": name, "data.size": 8, "data.classes": "calm,wild"}
    return job_from_flat(small | {key.replace("__", "."): value for key, value in more.items()})


def signals(**more: Any) -> Job:
    return job("gru", data__channels=2, **more)


def film(folder: Path, steps: int = 3, size: int = 8, seed: int = 0) -> np.ndarray:
    frames = np.random.default_rng(seed).integers(0, 256, (steps, size, size)).astype(np.uint8)
    folder.mkdir(parents=True)
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"{number}.png")
    return frames


def table(root: Path, rows: Sequence[Sequence[object]], head: Sequence[str] = ("path", "label")) -> SiteData:
    with (root / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([head, *rows])
    return SiteData("a", root)


def refusal(site: SiteData, made: Job) -> SiteRefusal:
    with pytest.raises(SiteRefusal) as caught:
        read_samples(site, made)
    return caught.value


# --- layouts ----------------------------------------------------------------------------------------------------------


def test_a_table_of_films(tmp_path: Path) -> None:
    frames = film(tmp_path / "scans/one")
    np.savez(tmp_path / "many.npz", a=np.stack([frames, frames[::-1]]), b=frames)
    rows = [
        ["scans/one", "calm", "p1", "train", "", ""],
        ["many.npz", "wild", "p2", "val", "a", "1"],
        ["many.npz", "calm", "p3", "test", "b", ""],
    ]
    site = table(tmp_path, rows, ["path", "label", "patient", "split", "key", "frame"])
    samples = {sample.patient: sample for sample in read_samples(site, job())}
    assert {name: (s.split, s.target, s.frame, s.key) for name, s in samples.items()} == {
        "p1": ("train", (0,), "middle", ""),
        "p2": ("val", (1,), 1, "a"),
        "p3": ("test", (0,), "middle", "b"),
    }
    found = {name: decode(sample, site, job())["frames"][:, 0] for name, sample in samples.items()}
    assert np.array_equal(found["p1"], frames * np.uint16(257))
    assert np.array_equal(found["p2"], found["p1"][::-1])
    assert np.array_equal(found["p3"], found["p1"])


@pytest.mark.parametrize("split", ["", "train/", "testing/"])
def test_folders_of_classes(tmp_path: Path, split: str) -> None:
    film(tmp_path / f"{split}calm/one")
    film(tmp_path / f"{split}wild/deeper/two")
    np.save(tmp_path / f"{split}wild/three.npy", np.zeros((4, 8, 8), np.uint8))
    (tmp_path / f"{split}wild/.cache").mkdir()
    samples = read_samples(SiteData("a", tmp_path), job())
    assert {(sample.path, sample.target) for sample in samples} == {
        (f"{split}calm/one", (0,)),
        (f"{split}wild/deeper/two", (1,)),
        (f"{split}wild/three.npy", (1,)),
    }
    if split:
        assert {sample.split for sample in samples} == {"train" if split == "train/" else "test"}


def test_folders_of_signals(tmp_path: Path) -> None:
    for name in ("calm/one.csv", "wild/deep/two.txt"):
        (tmp_path / name).parent.mkdir(parents=True)
        np.savetxt(tmp_path / name, np.ones((3, 2)))
    np.save(tmp_path / "wild/three.npy", np.ones((4, 2)))
    (tmp_path / "wild/readme.md").write_text("no signal")
    site = SiteData("a", tmp_path)
    samples = read_samples(site, signals())
    assert [sample.path for sample in samples] == ["calm/one.csv", "wild/deep/two.txt", "wild/three.npy"]
    assert [decode(sample, site, signals())["signal"].shape for sample in samples] == [(3, 2), (3, 2), (4, 2)]


def test_an_archive_of_many_cases(tmp_path: Path) -> None:
    films = np.random.default_rng(0).integers(0, 256, (4, 3, 8, 8)).astype(np.uint8)
    np.savez(tmp_path / "set.npz", train_images=films, train_labels=[[0], [1], [1], [0]], test_images=films[:1],
             test_labels=[1])  # fmt: skip
    site = SiteData("a", tmp_path)
    samples = read_samples(site, job())
    assert [(s.split, s.target[0]) for s in samples] == [
        ("test", 1),
        ("train", 0),
        ("train", 1),
        ("train", 1),
        ("train", 0),
    ]
    found = [decode(sample, site, job())["frames"][:, 0] for sample in samples if sample.split == "train"]
    assert np.array_equal(np.stack(found), films * np.uint16(257))
    leads = np.random.default_rng(1).normal(size=(3, 5, 2))
    (tmp_path / "b").mkdir()
    np.savez(tmp_path / "b" / "set.npz", val_images=leads, val_labels=[0, 0, 1])
    site = SiteData("b", tmp_path / "b")
    found = [decode(sample, site, signals())["signal"] for sample in read_samples(site, signals())]
    assert np.array_equal(np.stack(found), leads.astype(np.float32))


def test_the_patient_of_a_series_keeps_its_films_together(tmp_path: Path) -> None:
    """Real files: the third site of the generated cohort holds a folder of DICOM files per scan."""
    source = perfusion.make(tmp_path / "cohort", sites=3, patients=4)[2]
    (tmp_path / "site/calm").mkdir(parents=True)
    for number in (1, 2):
        shutil.copytree(source / "scans/P3-train-0001", tmp_path / f"site/calm/{number}")
    samples = read_samples(SiteData("a", tmp_path / "site"), job())
    assert [sample.patient for sample in samples] == ["P3-train-0001"] * 2


def test_layouts_that_hold_no_case(tmp_path: Path) -> None:
    (tmp_path / "calm").mkdir()
    assert refusal(SiteData("a", tmp_path), job()).code == "no-data"
    assert "holds no film" in str(refusal(SiteData("a", tmp_path), job()))
    assert "holds no signal" in str(refusal(SiteData("a", tmp_path), signals()))
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "calm/1.png")
    assert "a folder of their own" in str(refusal(SiteData("a", tmp_path), job()))
    film(tmp_path / "odd/one")
    (tmp_path / "calm/1.png").unlink()
    film(tmp_path / "calm/one")
    assert refusal(SiteData("a", tmp_path), job()).code == "unknown-label"
    assert refusal(table(tmp_path, [["gone", "calm"]]), job()).code == "missing-files"
    assert refusal(table(tmp_path, [["odd/one", "purple"]]), job()).code == "unknown-label"
    assert refusal(SiteData("a", tmp_path, format="coco"), job()).code == "no-data"


def test_unlabelled_cases_are_found(tmp_path: Path) -> None:
    film(tmp_path / "p1/scan")
    film(tmp_path / "p2/scan")
    np.save(tmp_path / "p2/other.npy", np.zeros((4, 8, 8), np.uint8))
    np.savetxt(tmp_path / "ecg.csv", np.ones((3, 2)))
    assert [sample.path for sample in find(tmp_path, job())] == ["p1/scan", "p2/other.npy", "p2/scan"]
    assert [sample.path for sample in find(tmp_path / "p1/scan", job())] == ["."]
    assert [sample.path for sample in find(tmp_path / "p2/other.npy", job())] == ["other.npy"]
    assert [sample.path for sample in find(tmp_path, signals())] == ["ecg.csv", "p2/other.npy"]
    alone = find(tmp_path / "p1/scan", job())[0]
    assert decode(alone, SiteData("predict", tmp_path / "p1/scan"), job())["frames"].shape == (3, 1, 8, 8)


# --- decoding ---------------------------------------------------------------------------------------------------------


def test_frames_are_capped_fitted_and_coloured(tmp_path: Path) -> None:
    frames = film(tmp_path / "one", steps=7, size=16)
    site, sample = SiteData("a", tmp_path), Sample("one", (0,), "p", "train")
    some = decode(sample, site, job(data__size=16, data__frames=3))["frames"]
    assert np.array_equal(some[:, 0], frames[pick(7, 3)] * np.uint16(257))
    colour = decode(sample, site, job(data__channels=3))["frames"]
    assert colour.shape == (7, 3, 8, 8)
    assert colour.dtype == np.uint16
    assert len(decode(sample, site, job(data__frames=1))["frames"]) == 1


def test_the_cache_knows_what_decoding_depends_on(tmp_path: Path) -> None:
    base = decoded_by(job())
    for changed in ({"data__size": 9}, {"data__channels": 3}, {"data__frames": 5}, {"data__window": "0 9"}):
        assert decoded_by(job(**changed)) != base
    assert decoded_by(job(model__width=30)) == base == decoded_by(job("cnn_lstm"))
    assert decoded_by(signals()) != decoded_by(signals(data__frames=2))


def test_a_site_with_one_bad_case_goes_on_without_it_and_with_many_stops(tmp_path: Path) -> None:
    rows = []
    for number in range(20):
        film(tmp_path / f"{number}")
        rows.append([f"{number}", "calm"])
    Image.fromarray(np.zeros((5, 8), np.uint8)).save(tmp_path / "7/1.png")
    site = table(tmp_path, rows)
    data = load_dataset(read_samples(site, job()), site, job())
    assert [(item.path, item.code) for item in data.skipped] == [("7", "uneven-frames")]
    assert len(data) == 19
    for file in (tmp_path / "8").iterdir():
        file.unlink()
    with pytest.raises(SiteRefusal, match=r"8 \(no-frames\)"):
        load_dataset(read_samples(site, job()), site, job())


# --- batches ----------------------------------------------------------------------------------------------------------


def films(lengths: Sequence[int], channels: int = 1, size: int = 8) -> Dataset:
    generator = np.random.default_rng(0)
    arrays = [generator.integers(0, 65536, (n, channels, size, size)).astype(np.uint16) for n in lengths]
    return Dataset.of([Sample(str(k), (k % 2,), "p", "train") for k in range(len(lengths))], frames=arrays)


def test_a_batch_is_padded_to_its_longest_with_zeros() -> None:
    data = films([2, 5, 3])
    series, lengths, targets = batch(data, [2, 0], job(), CPU, train=False)
    assert series.shape == (2, 3, 1, 8, 8)
    assert lengths.tolist() == [3, 2]
    assert targets == [(0,), (0,)]
    assert torch.equal(series[1, 2], torch.zeros(1, 8, 8))
    expected = (to_float(data.columns["frames"][2]) - 0.5) / 0.25
    torch.testing.assert_close(series[0], expected)


def test_all_frames_of_a_film_are_changed_alike() -> None:
    """Every frame the same picture: after a random change still every frame the same, and films differ."""
    still = np.repeat(np.random.default_rng(0).integers(0, 65536, (1, 3, 16, 16)).astype(np.uint16), 4, 0)
    data = Dataset.of([Sample(str(k), (0,), "p", "train") for k in range(6)], frames=[still] * 6)
    changes = {
        "augment.flip": "both",
        "augment.rotate": 20.0,
        "augment.shift": 0.2,
        "augment.zoom": 0.2,
        "augment.intensity": 0.4,
        "augment.colour": 0.4,
    }
    made = job_from_flat(job(data__channels=3, data__size=16).flat() | changes)
    torch.manual_seed(0)
    series = batch(data, range(6), made, CPU, train=True).series
    for one in series:
        assert torch.equal(one, one[:1].expand_as(one))
    assert len({tuple(one.flatten().tolist()) for one in series}) == 6
    quiet = batch(data, range(6), made, CPU, train=False).series
    assert torch.equal(quiet, quiet[:1].expand_as(quiet))


def test_a_random_change_of_a_film_is_torchvisions_of_a_video() -> None:
    data, made = films([4]), job(augment__rotate=30.0)
    torch.manual_seed(5)
    found = batch(data, [0], made, CPU, train=True).series[0]
    torch.manual_seed(5)
    turned = v2.RandomAffine(30, (0, 0), (1, 1), interpolation=v2.InterpolationMode.BILINEAR)(
        to_float(data.columns["frames"][0])
    )
    torch.testing.assert_close(found, (turned - 0.5) / 0.25)


def test_a_film_is_normalised_as_a_whole() -> None:
    data = films([3, 5], channels=3)
    series = batch(data, [0, 1], job(data__channels=3, data__normalise="image"), CPU, train=False).series
    for one, length in zip(series, (3, 5), strict=True):
        assert one[:length].mean().abs() < 1e-5
        assert one[:length].std() == pytest.approx(1, abs=5e-3)  # 1e-3 is added to the deviation
        assert one[:length].mean((1, 2, 3)).abs().max() > 1e-3  # not each frame on its own


def test_signals_are_taken_as_they_are_or_each_lead_to_its_own_scale() -> None:
    values = [np.random.default_rng(k).normal(5, 3, (4 + k, 2)).astype(np.float32) for k in range(2)]
    data = Dataset.of([Sample(str(k), (0,), "p", "train") for k in range(2)], signal=values)
    series, _, _ = batch(data, [0, 1], signals(), CPU, train=False)
    assert np.array_equal(series[1], values[1])
    assert np.array_equal(series[0, :4], values[0])
    assert not series[0, 4].any()
    scaled = batch(data, [1], signals(data__normalise="image"), CPU, train=False).series[0].numpy()
    assert np.allclose(scaled, (values[1] - values[1].mean(0)) / values[1].std(0), atol=1e-4)
    constant = Dataset.of([Sample("0", (0,), "p", "train")], signal=[np.full((3, 2), 7, np.float32)])
    assert not batch(constant, [0], signals(data__normalise="image"), CPU, train=False).series.any()


def test_a_signal_grows_louder_or_softer_as_a_whole() -> None:
    values = [np.random.default_rng(k).normal(0, 1, (4, 2)).astype(np.float32) for k in range(8)]
    data = Dataset.of([Sample(str(k), (0,), "p", "train") for k in range(8)], signal=values)
    torch.manual_seed(0)
    series = batch(data, range(8), signals(augment__intensity=0.3), CPU, train=True).series.numpy()
    gains = series / np.stack(values)
    assert np.allclose(gains, gains[:, :1, :1], atol=1e-4)
    assert gains.min() >= 0.7 - 1e-4
    assert gains.max() <= 1.3 + 1e-4
    assert np.ptp(gains[:, 0, 0]) > 0.1
    calm = batch(data, range(8), signals(augment__intensity=0.3), CPU, train=False).series.numpy()
    assert np.array_equal(calm, np.stack(values))

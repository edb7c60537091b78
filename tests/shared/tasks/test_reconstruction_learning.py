"""From a site's files to an anomaly score: what is learnt from, what is kept for judging, what is written."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shared.cases import Sample, SiteData
from shared.config import Job, job_from_flat
from shared.imaging.dataset import Dataset, load_dataset
from shared.imaging.errors import UnreadableImage
from shared.samples import read_samples
from shared.sitefile import read_site
from shared.tasks import load_task
from shared.tasks.reconstruction.data import square
from shared.training import train

CPU = torch.device("cpu")
TASK = load_task("reconstruction")


@pytest.fixture
def examples() -> ModuleType:
    path = Path(__file__).parent / "examples_reconstruction.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small(examples: ModuleType, name: str = "autoencoder", **more: Any) -> Job:
    return job_from_flat(examples.JOBS[name] | {key.replace("__", "."): value for key, value in more.items()})


def test_no_anomaly_is_ever_trained_on_and_all_others_are_judged(examples: ModuleType, tmp_path: Path) -> None:
    job = small(examples)
    site = read_site(examples.site(tmp_path / "a", job, "a", 48))
    samples = read_samples(site, job)
    with (tmp_path / "a" / "labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    expected = {row["path"] for row in rows if row["label"] == "plain" or row["split"] != "train"}
    assert {sample.path for sample in samples} == expected
    assert len(expected) < len(rows)
    data = load_dataset(samples, site, job)
    assert TASK.count_classes(data.subset("train"), job) == [0, 16, 0]
    for split in ("val", "test"):
        assert {sample.target for sample in data.subset(split).samples} == {(0,), (1,), (2,)}


@pytest.mark.parametrize("normal", ["", "stripes"])
def test_the_normal_class_is_the_one_named_else_the_first(normal: str, examples: ModuleType, tmp_path: Path) -> None:
    job = small(examples, data__normal=normal)
    site = read_site(examples.site(tmp_path / "a", job, "a", 24))
    trained = {sample.target for sample in read_samples(site, job) if sample.split == "train"}
    assert trained == {(job.classes.index(normal or "spot"),)}


@pytest.mark.parametrize("name", ["autoencoder", "vae"])
def test_after_training_on_normal_images_anomalies_stand_out(name: str, examples: ModuleType) -> None:
    """Far more than without training: an error that only measures contrast would do that too."""
    job = small(examples, name, federation__rounds=150)
    data = examples.make(job, 240)
    model = TASK.build_model(job)
    before = TASK.summarise(TASK.collect(model, data.subset("test"), job, CPU), job)
    train(model, TASK, data.subset("train"), job, site="a", first_step=0, steps=150, class_weights=[1.0])
    after = TASK.summarise(TASK.collect(model, data.subset("test"), job, CPU), job)
    assert after["mse"].value < before["mse"].value / 4
    assert after["auroc"].value > 0.97
    assert after["psnr"].value > before["psnr"].value + 6
    assert after["ssim"].value > before["ssim"].value


def test_augmentation_changes_training_images_only(examples: ModuleType) -> None:
    job = small(examples, augment__intensity=0.5, augment__flip="both")
    data = examples.make(job, 6)
    plain, again = (TASK.batch(data, range(6), job, CPU, train=False) for _ in range(2))
    assert torch.equal(plain.images, again.images)
    stored = torch.from_numpy(data.columns["image"].take(range(6)).astype(np.float32)) / 65535
    assert torch.allclose(plain.pixels(plain.images), stored, atol=1e-6)
    torch.manual_seed(0)
    changed = TASK.batch(data, range(6), job, CPU, train=True)
    assert not torch.allclose(changed.images, plain.images)


# --- crops ------------------------------------------------------------------------------------------------------------

BOXES = st.tuples(st.floats(-20, 110), st.floats(-20, 90), st.floats(0.5, 80), st.floats(0.5, 80))


@given(BOXES)
def test_a_box_becomes_a_square_inside_the_picture_that_holds_it(box: tuple[float, float, float, float]) -> None:
    height, width = 80, 100
    x, y, w, h = box
    left, top, right, bottom = square(box, height, width)
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        assert (left, top, right, bottom) == box
        return
    assert right == bottom == max(w, h)
    assert left >= 0
    assert top >= 0
    assert left + right <= width + 1e-9
    assert top + bottom <= height + 1e-9
    assert left <= max(x, 0) + 1e-9
    assert left + right >= min(x + w, width) - 1e-9
    assert top <= max(y, 0) + 1e-9
    assert top + bottom >= min(y + h, height) - 1e-9


def test_a_square_larger_than_the_picture_is_cut_to_it() -> None:
    assert square((10, 2, 70, 30), 40, 100) == (25, 0, 40, 40)


def test_crops_have_no_black_bars_and_boxes_outside_are_unreadable(examples: ModuleType, tmp_path: Path) -> None:
    job = small(examples)
    Image.fromarray(np.full((40, 60), 200, np.uint8)).save(tmp_path / "field.png")
    site = SiteData("a", tmp_path)
    for box in ((5.0, 5.0, 30.0, 10.0), (-4.0, 30.0, 9.0, 14.0), (50.0, 0.0, 10.0, 40.0)):
        decoded = TASK.decode(Sample("field.png", (1,), "", "test", box=box), site, job)
        assert (decoded["image"] == round(200 / 255 * 65535)).all()
    for outside in ((100.0, 5.0, 3.0, 3.0), (3.0, 3.0, 0.0, 5.0)):
        with pytest.raises(UnreadableImage):
            TASK.decode(Sample("field.png", (1,), "", "test", box=outside), site, job)


def test_polarity_is_harmonised_before_the_crop(examples: ModuleType, tmp_path: Path) -> None:
    """Dark cells on a bright ground come out bright on dark, also where the crop is all cell."""
    job = small(examples, data__harmonise="polarity")
    pixels = np.full((60, 60), 230, np.uint8)
    pixels[10:26, 10:26] = 40
    Image.fromarray(pixels).save(tmp_path / "bright.png")
    Image.fromarray(255 - pixels).save(tmp_path / "dark.png")
    bright, dark = (
        TASK.decode(Sample(name, (1,), "", "test", box=(10, 10, 16, 16)), SiteData("a", tmp_path), job)["image"]
        for name in ("bright.png", "dark.png")
    )
    assert np.array_equal(bright, dark)
    assert bright.min() > 50_000
    assert TASK.decoded_by(job) != TASK.decoded_by(job.replace(data__harmonise="none"))


# --- predictions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_predictions_tell_the_scores_and_show_the_reconstructions(
    channels: int, examples: ModuleType, tmp_path: Path
) -> None:
    job = small(examples, data__channels=channels, federation__rounds=60, evaluation__batch_size=5)
    data = examples.make(job, 48)
    model = TASK.build_model(job)
    train(model, TASK, data.subset("train"), job, site="a", first_step=0, steps=60, class_weights=[1.0])
    bare = Dataset(data.columns, tuple(Sample(sample.path, (), "", "") for sample in data.samples))
    found = list(TASK.predict(model, bare, job, CPU))
    errors = np.array([prediction.score for prediction in found])
    normal = np.array([sample.target == (1,) for sample in data.samples])
    sums = TASK.collect(model, data, job, CPU)
    assert errors[normal].sum() == pytest.approx(sums["mse"], rel=1e-6)
    assert sum(p.psnr for p, mine in zip(found, normal, strict=True) if mine) == pytest.approx(sums["psnr"], rel=1e-6)
    for number, prediction in enumerate(found):
        assert np.abs(prediction.image - data.columns["image"][number] / 65535).max() < 1e-6
        assert prediction.score == pytest.approx(((prediction.image - prediction.rebuilt) ** 2).mean(), rel=1e-4)
    files = TASK.write(zip(bare.samples, found, strict=True), SiteData("a", tmp_path), job, tmp_path / "out")
    with files[0].open() as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [sample.path for sample in data.samples]
    assert [float(row["score"]) for row in rows] == pytest.approx(errors.tolist(), rel=1e-5)
    assert [files[0].parent / row["picture"] for row in rows] == files[1:]
    with Image.open(files[1]) as picture:
        assert picture.mode == ("L" if channels == 1 else "RGB")
        shown = np.asarray(picture).reshape(16, 32, channels) / 255
    both = np.moveaxis(np.concatenate([found[0].image, found[0].rebuilt], 2), 0, -1)
    assert np.abs(shown - both).max() <= 0.5 / 255 + 1e-6


def test_red_cells_of_real_smears_train_and_white_cells_only_judge(
    shared_data: Callable[[str], Path], tmp_path: Path, root: Path
) -> None:
    from shared.config import load_job

    job = load_job(root / "simulations" / "jobs" / "anomaly.toml", ["data.max_per_class=5"])
    folder = shared_data("bloodcell_det_multisite") / "site_bccd"
    site = SiteData("bccd", folder, "coco-crops", cache=tmp_path)
    samples = read_samples(site, job)
    assert {sample.target for sample in samples if sample.split == "train"} == {(1,)}
    counts = {k: sum(sample.target == (k,) for sample in samples if sample.split == "val") for k in range(3)}
    assert counts == {0: 5, 1: 5, 2: 5}
    chosen = [sample for sample in samples if sample.split == "val"]
    data = load_dataset(chosen, site, job)
    assert len(data) == 15
    # white cells lie in the bright ground of the smear: no crop has a black bar
    assert data.columns["image"].take(range(15)).max((1, 2)).min() > 20_000

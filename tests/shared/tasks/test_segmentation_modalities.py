"""Segmentation of cases of several images: T1 and T2, stacked as channels of one network."""

from __future__ import annotations

import csv
import importlib
import re
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

from consilium.explain import explain
from consilium.predict import predict
from shared.cases import SiteData
from shared.config import Job, job_from_flat
from shared.errors import SiteRefusal, UserError
from shared.imaging.dataset import Dataset, load_dataset, to_float
from shared.imaging.errors import UnreadableImage
from shared.samples import read_samples
from shared.sitefile import read_site
from shared.tasks import load_task
from shared.tasks.segmentation.data import decode, whole_image
from shared.tasks.segmentation.patches import change
from simulations.simulate import run

CPU = torch.device("cpu")
BOTH = {"t1": True, "t2": True}
AS_IT_LIES = np.diag([-1.0, -1, 1, 1])  # rows to the back, columns to the left: as volumes are held


def job(name: str = "unet", **more: object) -> Job:
    flat = {
        "task": "segmentation",
        "model.name": name,
        "model.width": 8,
        "model.depth": 3,
        "data.size": 16,
        "data.depth": 8,
        "data.classes": "lesion",
        "data.modalities": "t1,t2",
        "train.batch_size": 8,
    }
    return job_from_flat(flat | {key.replace("__", "."): value for key, value in more.items()})


def case(number: int, volume: bool = False) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Both images, uint8, and the mask: the lesion is what is bright in T1 and dark in T2; one alone misleads."""
    generator = np.random.default_rng(number)
    size = (6, 20, 22) if volume else (20, 22)
    bright, dark = np.zeros(size, bool), np.zeros(size, bool)
    for place, corners in ((bright, ((2, 3), (11, 12))), (dark, ((2, 12), (11, 12)))):
        for y, x in corners:
            y, x = y + generator.integers(0, 3), x + generator.integers(0, 3)
            place[..., y : y + 6, x : x + 6] = True
    images = {
        "t1": generator.normal(80 + 100 * bright, 8, size).clip(0, 255).astype(np.uint8),
        "t2": generator.normal(180 - 120 * dark, 8, size).clip(0, 255).astype(np.uint8),
    }
    return images, (bright & dark).astype(np.uint8)


def write(path: Path, values: np.ndarray, affine: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if values.ndim == 3:
        nibabel.save(nibabel.Nifti1Image(values.transpose(2, 1, 0), AS_IT_LIES if affine is None else affine), path)
    else:
        Image.fromarray(values).save(path)


def make_site(folder: Path, cases: int = 8, there: dict[str, bool] = BOTH, volume: bool = False) -> SiteData:
    """A site with a table; images for which ``there`` is false are left out."""
    end = "nii.gz" if volume else "png"
    rows = [["path:t1", "path:t2", "mask", "patient", "split"]]
    for number in range(cases):
        images, mask = case(number, volume)
        names = []
        for name, values in images.items():
            names.append(f"images/{number}_{name}.{end}" if there[name] else "")
            if there[name]:
                write(folder / names[-1], values)
        write(folder / f"masks/{number}.{end}", mask)
        split = ("train", "train", "val", "test")[number % 4]
        rows.append([*names, f"masks/{number}.{end}", f"P{number}", split])
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    (folder / "site.toml").write_text(f'name = "{folder.name}"\n[data]\nformat = "csv"\n')
    return read_site(folder / "site.toml")


def loaded(site: SiteData, of: Job) -> Dataset:
    return load_dataset(read_samples(site, of), site, of)


@pytest.mark.parametrize("volume", [False, True])
def test_images_are_stacked_in_the_order_of_the_job(tmp_path: Path, volume: bool) -> None:
    site, name = make_site(tmp_path / "a", 4, volume=volume), "unet3d" if volume else "unet"
    together = loaded(site, job(name))
    swapped = loaded(site, job(name, data__modalities="t2,t1"))
    for index in range(4):
        images, mask = case(index, volume)
        found = to_float(together.columns["image"][index]).numpy()
        assert found.shape == (2, *mask.shape)
        scaled = [values.astype(np.float64) for values in images.values()]
        if volume:  # a NIfTI has no window: least to greatest is black to white
            scaled = [(values - values.min()) / (values.max() - values.min()) * 255 for values in scaled]
        np.testing.assert_allclose(found, np.stack(scaled) / 255, atol=1e-4)
        assert np.array_equal(together.columns["mask"][index], mask)
        assert np.array_equal(to_float(swapped.columns["image"][index]).numpy(), found[::-1])


def test_each_image_is_normalised_by_itself_and_what_is_missing_is_zero_and_flagged(tmp_path: Path) -> None:
    of = job(data__normalise="image", data__missing="zero")
    full, half = (
        loaded(make_site(tmp_path / "a", 4), of),
        loaded(make_site(tmp_path / "b", 4, {"t1": False, "t2": True}), of),
    )
    seen, lacks = whole_image(full, 0, of), whole_image(half, 0, of)
    for k, values in enumerate(case(0)[0].values()):
        share = values / 255
        np.testing.assert_allclose(seen[k], (share - share.mean()) / (share.std() + 1e-3), atol=1e-3)
    assert not seen[2:].any()
    assert not lacks[0].any()
    assert torch.equal(lacks[1], seen[1])
    assert torch.equal(lacks[2], torch.ones_like(lacks[2]))
    assert not lacks[3].any()
    task = load_task("segmentation")
    sums = task.collect(task.build_model(of), half.subset("test"), of, CPU)
    assert sums["missing"] == [sums["n"], 0]
    assert task.consistent(sums, of)
    assert not task.consistent(sums | {"missing": [sums["n"] + 1, 0]}, of)
    assert task.notices(sums, of) == ["1 of 1 lack t1"]


def test_a_site_without_one_of_the_images_is_refused_unless_the_job_says_zero(tmp_path: Path) -> None:
    site = make_site(tmp_path / "b", 4, {"t1": True, "t2": False})
    with pytest.raises(SiteRefusal, match="path:t2 is empty") as refusal:
        read_samples(site, job())
    assert refusal.value.code == "missing-modality"
    assert len(read_samples(site, job(data__missing="zero"))) == 4


def test_images_that_do_not_fit_each_other_are_named(tmp_path: Path) -> None:
    site = make_site(tmp_path / "a", 4)
    write(tmp_path / "a/images/1_t2.png", np.zeros((20, 21), np.uint8))
    found = read_samples(site, job())
    with pytest.raises(UnreadableImage, match="images-differ") as problem:
        decode(found[1], site, job())
    assert re.search(r"1_t1.png and .*1_t2.png: 20x22 and 20x21", problem.value.detail)
    decode(found[0], site, job())
    deep = make_site(tmp_path / "v", 4, volume=True)
    moved = AS_IT_LIES.copy()
    moved[0, 3] = 5
    write(tmp_path / "v/images/2_t2.nii.gz", case(2, volume=True)[0]["t2"], moved)
    with pytest.raises(UnreadableImage, match="images-differ") as problem:
        decode(read_samples(deep, job("unet3d"))[2], deep, job("unet3d"))
    assert re.search(r"2_t1.nii.gz and .*2_t2.nii.gz lie elsewhere in space", problem.value.detail)


@pytest.mark.parametrize("name", ["unet", "unet3d"])
def test_images_of_a_case_change_alike(name: str) -> None:
    changes: dict[str, object] = {"augment__flip": "both", "augment__intensity": 0.4}
    if name == "unet":
        changes |= {"augment__rotate": 20, "augment__zoom": 0.2}
    of, alone = job(name, **changes), job(name, data__modalities="", **changes)
    size = (16, 16) if name == "unet" else (4, 16, 16)
    image = torch.rand(1, *size, generator=torch.Generator().manual_seed(0))
    mask = (image[0] > 0.5).long()
    for seed in range(5):
        torch.manual_seed(seed)
        both, its_mask = change(torch.cat([image, image]), mask, of)
        torch.manual_seed(seed)
        single, single_mask = change(image, mask, alone)
        assert torch.equal(both[:1], both[1:])
        assert torch.equal(both[:1], single)
        assert torch.equal(its_mask, single_mask)
        assert not torch.equal(single, image)


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"data__tabular": "age"}, "images only"),
        ({"model__fusion": "late"}, "write early"),
        ({"data__format": "masks"}, "come in a table"),
        ({"model__name": "unet3d", "augment__rotate": 5}, "augment.rotate: volumes"),
        ({"model__name": "fcn_resnet50", "model__weights": "DEFAULT"}, "published weights take one image"),
    ],
)
def test_what_does_not_go_together_is_refused(more: dict[str, object], word: str) -> None:
    with pytest.raises(UserError, match=word):
        load_task("segmentation").check(job(**more))


@pytest.mark.slow
def test_a_federation_learns_from_both_images_although_one_site_has_one_only(tmp_path: Path) -> None:
    """What T1 shows alone is right half the time: Dice of a model that sees it only is bounded by that."""
    for number, there in enumerate((BOTH, BOTH, {"t1": True, "t2": False})):
        make_site(tmp_path / "data" / "abc"[number], 24, there)
    of = job(
        data__missing="zero",
        federation__rounds=60,
        evaluation__every=20,
        train__batch_size=8,
        train__learning_rate=0.01,
    )
    result = run(of, tmp_path / "data", tmp_path / "run", workers=2).scores["federated"]
    assert result["dropped"] == []
    assert min(result["sites"][name]["dice"] for name in "ab") > 0.9
    assert result["sites"]["c"]["dice"] < 0.85
    assert "6 of 6 lack t2" in (tmp_path / "run" / "report.html").read_text()
    done = predict(tmp_path / "run", tmp_path / "data/a/labels.csv", tmp_path / "out")
    assert (done.cases, done.unreadable) == (24, [])
    found = np.asarray(Image.open(tmp_path / "out/images/3_t1.png")) > 0
    truth = case(3)[1] > 0
    assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.85
    for site, names in (("a", ("t1", "t2")), ("c", ("t1", "t2 (missing)"))):
        module = importlib.import_module("shared.tasks.segmentation.explain")
        data = loaded(read_site(tmp_path / "data" / site / "site.toml"), of)
        explained = module.explainable(load_task("segmentation").build_model(of), data, of, CPU)
        assert explained.names == names
        assert explained.pictures.shape == (2, 20, 22)
        assert explained.planes(torch.ones_like(explained.inputs)).shape == (2, 20, 22)
    one = tmp_path / "data/a/one.csv"
    one.write_text("".join((tmp_path / "data/a/labels.csv").read_text().splitlines(keepends=True)[:2]))
    for method in ("gradcam", "integrated-gradients", "occlusion"):
        drawn = explain(tmp_path / "run", one, tmp_path / "why.png", method=method)
        assert Image.open(drawn.file).size[0] > 300

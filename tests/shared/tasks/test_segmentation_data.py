"""Segmentation data: layouts, decoding of image and mask to one grid, patches, changes at random, bad input."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from shared.cases import Sample, SiteData
from shared.config import Job, job_from_flat
from shared.errors import SiteRefusal
from shared.imaging.dataset import Dataset, load_dataset, to_float
from shared.imaging.errors import UnreadableImage
from shared.samples import read_samples
from shared.tasks import load_task
from shared.tasks.segmentation.data import assemble, batch, decode, resample, whole_image
from shared.tasks.segmentation.layouts import stem
from shared.tasks.segmentation.patches import change, cut, margin, middle_start, random_start

CPU = torch.device("cpu")


def job(name: str = "unet", **more: object) -> Job:
    flat = {"task": "segmentation", "model.name": name, "model.width": 4, "model.depth": 3, "data.size": 16}
    flat |= {"data.classes": "organ,lesion", "data.depth": 8}
    return job_from_flat(flat | {key.replace("__", "."): value for key, value in more.items()})


def picture(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size).astype(np.uint8)


def folders(root: Path, names: tuple[str, ...] = ("a", "b", "c"), masks: str = "labels", size: int = 12) -> SiteData:
    """A site of PNG files in images/ and ``masks``/, each mask with both classes."""
    for number, name in enumerate(names):
        mask = np.zeros((size, size + 2), np.uint8)
        mask[2:5, 2:6], mask[7:9, 3:8] = 1, 2
        for folder, values in (("images", picture(mask.shape, number)), (masks, mask)):
            (root / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(root / folder / f"{name}.png")
    return SiteData("s", root)


def table(path: Path, *rows: str) -> None:
    path.write_text("\n".join(rows) + "\n")


def loaded(site: SiteData, of: Job) -> Dataset:
    return load_dataset(read_samples(site, of), site, of)


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masks", ["labels", "masks"])
def test_images_and_masks_of_equal_names_are_paired(tmp_path: Path, masks: str) -> None:
    site = folders(tmp_path, masks=masks)
    found = read_samples(site, job())
    assert [(s.path, s.mask) for s in found] == [(f"images/{n}.png", f"{masks}/{n}.png") for n in "abc"]
    assert all(s.target == () for s in found)


def test_suffixes_may_differ_and_other_files_are_passed_over(tmp_path: Path) -> None:
    site = folders(tmp_path, ("a",))
    Image.fromarray(picture((12, 14))).save(tmp_path / "images" / "b.v2.tif")
    Image.fromarray(np.zeros((12, 14), np.uint8)).save(tmp_path / "labels" / "b.v2.png")
    (tmp_path / "labels" / "boxes.json").write_text("{}")
    (tmp_path / "images" / ".DS_Store").write_text("")
    assert [s.mask for s in read_samples(site, job())] == ["labels/a.png", "labels/b.v2.png"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.png", "a"),
        ("a.b.nii.gz", "a.b"),
        ("a.nii", "a"),
        ("1.2.840.7", "1.2.840.7"),
        ("plain", "plain"),
        (".x", ".x"),
    ],
)
def test_the_stem_of_a_name(name: str, expected: str) -> None:
    assert stem(name) == expected


def test_splits_csv_says_which_images_train_and_what_the_whole_image_is(tmp_path: Path) -> None:
    site = folders(tmp_path)
    table(
        tmp_path / "splits.csv",
        "file,split,patient,label",
        "a.png,train,p1,sick",
        "images/b.png,val,p2,well",
        "c,test,,sick",
    )
    found = read_samples(site, job(data__labels="well,sick"))
    assert [(s.split, s.patient, s.target) for s in found] == [
        ("train", "p1", (1,)),
        ("val", "p2", (0,)),
        ("test", "c", (1,)),
    ]


def test_sites_csv_of_the_folder_above_gives_the_split_of_this_site_only(tmp_path: Path) -> None:
    site = folders(tmp_path / "north")
    rows = ["site,image,label,split"] + [f"{place},{place}/images/{n}.png,{place}/labels/{n}.png,{split}"
            for place, split in (("north", "train"), ("south", "test")) for n in "abc"]  # fmt: skip
    (tmp_path / "sites.csv").write_bytes("\r\n".join(rows).encode())  # as Windows writes it
    assert {s.split for s in read_samples(site, job())} == {"train"}


def test_a_table_of_training_and_test_images_only_leaves_some_for_validation(tmp_path: Path) -> None:
    names = tuple(f"n{k}" for k in range(60))
    site = folders(tmp_path, names)
    table(
        tmp_path / "splits.csv",
        "file,split",
        *(f"{n},{'test' if k % 4 == 0 else 'train'}" for k, n in enumerate(names)),
    )
    splits = {s.path: s.split for s in read_samples(site, job(data__val_fraction=0.2))}
    assert {path for path, split in splits.items() if split == "test"} == {f"images/n{k}.png" for k in range(0, 60, 4)}
    assert 3 <= sum(split == "val" for split in splits.values()) <= 16
    table(
        tmp_path / "splits.csv", "file,split", *(f"{n},{('test', 'train', 'val')[k % 3]}" for k, n in enumerate(names))
    )
    counted = [s.split for s in read_samples(site, job(data__val_fraction=0.2))]
    assert sorted(counted) == sorted(("test", "train", "val")[k % 3] for k in range(60))


def test_a_csv_names_images_and_masks(tmp_path: Path) -> None:
    site = folders(tmp_path)
    table(
        tmp_path / "labels.csv",
        "path,mask,split,patient",
        "images/a.png,labels/b.png,test,p",
        "images/b.png,labels/a.png,,",
    )
    found = read_samples(site, job())
    assert [(s.path, s.mask, s.patient) for s in found] == [
        ("images/a.png", "labels/b.png", "p"),
        ("images/b.png", "labels/a.png", "images/b.png"),
    ]
    assert found[0].split == "test"


@pytest.mark.parametrize(
    ("spoil", "code", "word"),
    [
        (lambda root: (root / "labels" / "b.png").unlink(), "missing-files", "b"),
        (lambda root: (root / "images" / "c.png").unlink(), "missing-files", "c"),
        (lambda root: (root / "labels").rename(root / "other"), "no-data", "labels"),
        (lambda root: table(root / "splits.csv", "file,split", "a,train", "b,test"), "bad-table", "c"),
        (lambda root: table(root / "splits.csv", "name,split", "a,train"), "bad-table", "file"),
        (lambda root: table(root / "splits.csv", "file,split", "a,train", "b,some", "c,test"), "bad-table", "some"),
        (lambda root: table(root / "splits.csv", "file,split", "a,train", "a,test"), "bad-table", "twice"),
        (lambda root: (root / "splits.csv").write_bytes(b"file,split\n\xff\xfe,train\n"), "bad-table", "UTF-8"),
        (lambda root: table(root / "labels.csv", "path,label", "images/a.png,x"), "bad-table", "mask"),
        (lambda root: table(root / "labels.csv", "path,mask", "images/a.png,labels/z.png"), "missing-files", "z.png"),
        (lambda root: table(root / "labels.csv", "path,mask", "images/a.png,"), "bad-table", "mask"),
        (lambda root: Image.new("L", (14, 12)).save(root / "images" / "a.tif"), "bad-table", "a.tif"),
    ],
)
def test_a_layout_that_is_not_clear_is_refused_in_one_line(
    tmp_path: Path, spoil: Callable[[Path], object], code: str, word: str
) -> None:
    site = folders(tmp_path)
    spoil(tmp_path)
    with pytest.raises(SiteRefusal, match=word) as refusal:
        read_samples(site, job())
    assert refusal.value.code == code
    assert "\n" not in str(refusal.value)


def test_a_label_of_the_image_that_lacks_or_is_unknown_is_refused(tmp_path: Path) -> None:
    site = folders(tmp_path)
    of = job(data__labels="well,sick")
    with pytest.raises(SiteRefusal, match="label") as refusal:
        read_samples(site, of)
    assert refusal.value.code == "bad-table"
    table(tmp_path / "splits.csv", "file,split,label", "a,train,ill", "b,train,well", "c,train,well")
    with pytest.raises(SiteRefusal, match="ill") as refusal:
        read_samples(site, of)
    assert refusal.value.code == "unknown-label"


# --- decoding ---------------------------------------------------------------------------------------------------------


def test_an_image_and_its_mask_are_decoded_as_they_lie(tmp_path: Path) -> None:
    site = folders(tmp_path)
    row = decode(read_samples(site, job())[0], site, job())
    mask = np.asarray(Image.open(tmp_path / "labels" / "a.png"))
    assert np.array_equal(row["mask"], mask)
    assert row["mask"].dtype == np.uint8
    stored = np.asarray(Image.open(tmp_path / "images" / "a.png")) / 255
    assert to_float(row["image"])[0].numpy() == pytest.approx(stored, abs=1e-5)
    assert row["pixels"].tolist() == np.bincount(mask.ravel(), minlength=3).tolist()
    assert all(mask[y, x] == k for k, y, x in row["places"])
    assert set(row["places"][:, 0]) == {1, 2}
    assert row["statistics"] == pytest.approx([stored.mean(), stored.std()], rel=1e-4)
    assert row["spacing"].tolist() == [0, 0]
    assert row["size"].tolist() == [12, 14]


def test_without_a_mask_the_same_columns_come(tmp_path: Path) -> None:
    site = folders(tmp_path)
    given, bare = (
        decode(Sample("images/a.png", (), "p", "test", mask=mask), site, job()) for mask in ("labels/a.png", "")
    )
    assert {name: value.dtype for name, value in bare.items()} == {name: value.dtype for name, value in given.items()}
    assert not bare["mask"].any()
    assert len(bare["places"]) == 0


def test_a_mask_of_another_size_skips_the_image_and_says_so(tmp_path: Path) -> None:
    site = folders(tmp_path, tuple("abcdefghijklmnopqrstuvwxyz"))
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(tmp_path / "labels" / "a.png")
    data = loaded(site, job())
    assert len(data) == 25
    assert [(item.path, item.code) for item in data.skipped] == [("images/a.png", "mask-size")]


def test_a_value_that_is_no_class_skips_the_image(tmp_path: Path) -> None:
    site = folders(tmp_path)
    Image.fromarray(np.full((12, 14), 3, np.uint8)).save(tmp_path / "labels" / "a.png")
    with pytest.raises(UnreadableImage) as error:
        decode(read_samples(site, job())[0], site, job())
    assert error.value.code == "unknown-class"
    assert "a.png" in error.value.detail


def test_object_numbers_of_16_bits_are_kept_apart(tmp_path: Path) -> None:
    site = folders(tmp_path, ("a",))
    ids = np.zeros((12, 14), np.uint16)
    ids[1:3, 1:3], ids[1:3, 5:8], ids[6:9, 2:4] = 300, 7, 40000
    Image.fromarray(ids).save(tmp_path / "labels" / "a.png")
    of = job(data__masks="instances", data__classes="cell")
    row = decode(read_samples(site, of)[0], site, of)
    assert row["mask"].dtype == np.int32
    assert np.array_equal(row["mask"] > 0, ids > 0)
    assert {int(row["mask"][ids == value][0]) for value in (7, 300, 40000)} == {1, 2, 3}
    assert row["pixels"].tolist() == [int((ids == 0).sum()), int((ids > 0).sum())]
    data = loaded(site, of)
    assert set(batch(data, [0], of, CPU, train=False).masks.unique().tolist()) == {0, 1}


def test_colour_becomes_grey_or_stays(tmp_path: Path) -> None:
    site = folders(tmp_path, ("a",))
    colour = np.random.default_rng(0).integers(0, 256, (12, 14, 3)).astype(np.uint8)
    Image.fromarray(colour).save(tmp_path / "images" / "a.png")
    sample = read_samples(site, job())[0]
    assert to_float(decode(sample, site, job(data__channels=3))["image"]).numpy() == pytest.approx(
        colour.transpose(2, 0, 1) / 255, abs=1e-5
    )
    expected = np.asarray(Image.open(tmp_path / "images" / "a.png").convert("L"), float) / 255  # also BT.601
    assert to_float(decode(sample, site, job())["image"])[0].numpy() == pytest.approx(expected, abs=3e-3)


def nifti_site(root: Path, spacing: tuple[float, float, float] = (1.0, 1.5, 2.0)) -> SiteData:
    """One volume (10, 14, 12) of (d, h, w) and its mask, in RAS+ order on disk."""
    mask = np.zeros((12, 14, 10), np.uint8)
    mask[3:9, 4:10, 2:8], mask[5:7, 5:7, 4:6] = 1, 2
    image = np.random.default_rng(0).normal(0, 20, mask.shape) + 100 * mask
    for folder, values in (("images", image.astype(np.float32)), ("labels", mask)):
        (root / folder).mkdir(parents=True)
        nibabel.save(nibabel.Nifti1Image(values, np.diag([*spacing, 1.0])), root / folder / "v.nii.gz")
    return SiteData("s", root)


def test_a_volume_is_windowed_and_knows_its_spacing(tmp_path: Path) -> None:
    site = nifti_site(tmp_path)
    of = job("unet3d", data__window="-50 250")
    row = decode(read_samples(site, of)[0], site, of)
    assert row["image"].shape == (1, 10, 14, 12)
    assert row["mask"].shape == (10, 14, 12)
    assert row["spacing"].tolist() == [2.0, 1.5, 1.0]
    assert row["pixels"].tolist()[1:] == [6 * 6 * 6 - 8, 8]
    values = to_float(row["image"])[0].numpy()
    assert values[row["mask"] == 0].mean() == pytest.approx(50 / 300, abs=0.01)
    assert values[row["mask"] == 2].mean() == pytest.approx(250 / 300, abs=0.03)


def test_a_volume_is_resampled_to_the_asked_spacing(tmp_path: Path) -> None:
    site = nifti_site(tmp_path)
    of = job("unet3d", data__spacing=1.0)
    row = decode(read_samples(site, of)[0], site, of)
    assert row["mask"].shape == (20, 21, 12)
    assert row["spacing"] == pytest.approx([1.0, 1.0, 1.0])
    assert row["size"].tolist() == [10, 14, 12]
    assert row["pixels"][2] == pytest.approx(8 * 2 * 1.5, rel=0.4)


def test_resampling_needs_a_known_spacing(tmp_path: Path) -> None:
    site = folders(tmp_path)
    with pytest.raises(UnreadableImage) as error:
        decode(read_samples(site, job())[0], site, job(data__spacing=0.5))
    assert error.value.code == "no-spacing"


@given(st.integers(3, 30), st.integers(3, 30), st.floats(0.4, 2.5))
def test_resampling_keeps_image_and_mask_on_one_grid(height: int, width: int, factor: float) -> None:
    """A bright half is where its mask is, at any scale; what the mask held before it holds after, and nothing else."""
    mask = np.zeros((height, width), np.int32)
    mask[:, : width // 2] = 70_001
    image = (mask > 0).astype(np.float32)[None]
    new, new_mask, spacing = resample(image, mask, np.array([1.0, 1.0]), factor)
    assert new.shape[1:] == new_mask.shape
    assert set(np.unique(new_mask)) <= {0, 70_001}
    assert np.asarray(new_mask.shape) * spacing == pytest.approx([height, width])
    inner = np.abs(new[0] - 0.5) > 0.45
    assert np.array_equal(new[0][inner] > 0.5, new_mask[inner] > 0)


def test_enlarging_is_what_scipy_does() -> None:
    image = np.random.default_rng(0).random((1, 8, 6)).astype(np.float32)
    new, _, _ = resample(image, np.zeros((8, 6), np.uint8), np.array([1.0, 1.0]), 0.5)
    expected = ndimage.zoom(image[0], 2, order=1, mode="nearest", grid_mode=True)
    assert new[0] == pytest.approx(expected, abs=1e-5)


# --- patches ----------------------------------------------------------------------------------------------------------


@given(st.integers(-25, 25), st.integers(1, 30), st.integers(1, 9))
def test_a_patch_beyond_the_edge_is_the_mirror_image(first: int, side: int, length: int) -> None:
    row = np.arange(length)
    padded = np.pad(row, 60, mode="symmetric")
    assert cut(row, [first], [side]).tolist() == padded[60 + first : 60 + first + side].tolist()


@pytest.mark.parametrize("size", [(40, 30), (10, 40), (8, 9)])
def test_random_patches_lie_inside_and_reach_every_place(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    none = np.zeros((0, 3), np.int32)
    starts = np.array([random_start(size, (16, 16), none) for _ in range(1500)])
    for axis, length in enumerate(size):
        assert set(starts[:, axis]) == set(range(min(0, length - 16), max(0, length - 16) + 1))


def test_half_of_the_patches_are_sure_to_hold_foreground_and_rare_classes_come_as_often() -> None:
    torch.manual_seed(0)
    mask = np.zeros((400, 400), np.uint8)
    mask[200:300, 200:300], mask[3, 5] = 1, 2
    row = assemble(np.zeros((1, 400, 400), np.float32), mask, np.zeros(2), mask.shape, job())
    seen = [np.unique(cut(mask, random_start(mask.shape, (16, 16), row["places"]), (16, 16))) for _ in range(2000)]
    share = {k: np.mean([k in found for found in seen]) for k in (1, 2)}
    assert share[2] == pytest.approx(0.25, abs=0.04)
    assert share[1] == pytest.approx(0.25 + 0.5 * 115 * 115 / 385**2, abs=0.04)


def dataset(of: Job, sizes: tuple[tuple[int, ...], ...] = ((40, 33), (9, 50)), seed: int = 0) -> Dataset:
    """Images whose values are their mask's: what is done to one must be done to the other."""
    rows = []
    for number, size in enumerate(sizes):
        noise = ndimage.gaussian_filter(
            np.random.default_rng([seed, number]).normal(size=(3, *size)), (0, *[2] * len(size))
        )
        mask = noise.argmax(0).astype(np.uint8)
        rows.append(assemble(mask[None] / np.float32(2), mask, np.zeros(len(size)), size, of))
    samples = [Sample(str(k), (), str(k), "train") for k in range(len(sizes))]
    return Dataset.of(samples, **{name: [row[name] for row in rows] for name in rows[0]})


@pytest.mark.parametrize(
    "augment",
    [
        {},
        {"augment__flip": "both"},
        {"augment__rotate": 30.0, "augment__zoom": 0.3, "augment__shift": 0.2, "augment__flip": "both"},
    ],
)
@pytest.mark.parametrize("name", ["unet", "unet3d"])
def test_image_and_mask_change_alike(name: str, augment: dict[str, object]) -> None:
    """Where the mask says k the image is k/2, but for the borders that interpolation blurs."""
    torch.manual_seed(0)
    of = job(name, **augment)
    sizes = ((40, 33), (9, 50)) if name == "unet" else ((12, 40, 33), (5, 9, 50))
    patch = (16, 16) if name == "unet" else (8, 16, 16)
    for _ in range(5):
        images, masks, _ = batch(dataset(of, sizes), [0, 1], of, CPU, train=True)
        assert images.shape == (2, 1, *patch)
        assert masks.shape == (2, *patch)
        values = images[:, 0] * 0.25 + 0.5
        apart = (values * 2 - masks).abs() < 0.02
        assert apart.float().mean() > (0.999 if "augment__rotate" not in augment or name == "unet3d" else 0.5)
        assert masks.max() <= 2


def test_turned_patches_bring_in_no_black_corners() -> None:
    torch.manual_seed(0)
    of = job(augment__rotate=45.0, augment__zoom=0.2, augment__shift=0.1)
    row = assemble(np.full((1, 30, 30), 0.8, np.float32), np.ones((30, 30), np.uint8), np.zeros(2), (30, 30), of)
    data = Dataset.of([Sample("0", (), "0", "train")], **{name: [value] for name, value in row.items()})
    for _ in range(20):
        images, masks, _ = batch(data, [0], of, CPU, train=True)
        assert (masks == 1).all()
        assert images * 0.25 + 0.5 == pytest.approx(torch.full_like(images, 0.8), abs=1e-3)
    assert margin(job(), (16, 16)) == [0, 0]


def test_intensity_changes_the_image_only() -> None:
    torch.manual_seed(0)
    for of in (job(augment__intensity=0.4), job("unet3d", augment__intensity=0.4)):
        size = (8, 16, 16)[-2 if of.model.name == "unet" else -3 :]
        image, mask = torch.rand(1, *size), torch.randint(0, 3, size)
        changed, same = change(image, mask, of)
        assert torch.equal(same, mask)
        assert not torch.allclose(changed, image, atol=0.01)
        assert 0 <= changed.min() <= changed.max() <= 1


def test_batches_repeat_with_the_seed_and_differ_without() -> None:
    of = job(augment__flip="both", augment__rotate=20.0, augment__intensity=0.2)
    data = dataset(of)

    def drawn(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return batch(data, [0, 1], of, CPU, train=True).images

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    assert torch.equal(batch(data, [0], of, CPU, train=False).images, batch(data, [0], of, CPU, train=False).images)


def test_patches_are_normalised_by_the_whole_image() -> None:
    of = job(data__normalise="image")
    data = dataset(of)
    whole = whole_image(data, 0, of)
    assert float(whole.mean()) == pytest.approx(0, abs=1e-4)
    assert float(whole.std()) == pytest.approx(1, abs=0.01)
    start = middle_start(whole.shape[1:], (16, 16))
    part = whole[0, start[0] : start[0] + 16, start[1] : start[1] + 16]
    assert torch.equal(batch(data, [0], of, CPU, train=False).images[0, 0], part)


def test_targets_of_whole_images_come_with_the_batch() -> None:
    of = job(data__labels="well,sick")
    data = dataset(of)
    data = Dataset(data.columns, tuple(Sample(str(k), (1 - k,), str(k), "train") for k in range(2)))
    assert batch(data, [1, 0], of, CPU, train=True).targets == [(0,), (1,)]
    assert load_task("segmentation").count_classes(data, of) == [2, 2, 1, 1]


def test_the_real_nuclei_are_found_as_they_lie(shared_data: Callable[[str], Path], root: Path) -> None:
    folder = shared_data("nuclei_dsb2018")
    of = job(data__classes="nucleus", data__masks="instances", data__val_fraction=0.1)
    with (folder / "sites.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["site"] == "lab_F_fluo_tissue"]
    found = read_samples(SiteData("F", folder / "lab_F_fluo_tissue"), of)
    assert {f"lab_F_fluo_tissue/{s.path}" for s in found} == {row["image"] for row in rows}
    listed = {row["image"]: row["split"] for row in rows}
    for sample in found:
        split = listed[f"lab_F_fluo_tissue/{sample.path}"]
        assert sample.split == split or (split, sample.split) == ("train", "val")
    row = decode(found[0], SiteData("F", folder / "lab_F_fluo_tissue"), of)
    count = next(r["n_nuclei"] for r in rows if r["image"].endswith(Path(found[0].path).name))
    assert row["mask"].max() == int(count)

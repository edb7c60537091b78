"""Masks of new images in files that other programs read: PNG, NIfTI, DICOM SEG, on the grid of the image."""

from __future__ import annotations

import csv
import shutil
import subprocess
import warnings
from pathlib import Path

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import torch
from PIL import Image
from torch import nn

from shared.cases import SiteData
from shared.config import Job, job_from_flat
from shared.imaging.dataset import Dataset, load_dataset
from shared.imaging.masks import read_mask, write_segmentation
from shared.imaging.volumes import read_volume
from shared.tasks.segmentation import find, predict, write

CPU = torch.device("cpu")


def job(name: str = "unet", **more: object) -> Job:
    flat = {"task": "segmentation", "model.name": name, "model.depth": 3, "data.size": 16, "data.depth": 8}
    flat |= {"data.classes": "liver,lesion"}
    return job_from_flat(flat | {key.replace("__", "."): value for key, value in more.items()})


class Levels(nn.Module):
    """A network whose classes are grey levels: below a third, to two thirds, above."""

    def __init__(self, labels: bool = False) -> None:
        super().__init__()
        self.labels = labels

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        grey = x * 0.25 + 0.5
        logits = torch.cat([-40 * (grey - level).square() for level in (0.0, 0.5, 1.0)], 1)
        if not self.labels:
            return logits
        mean = grey.flatten(1).mean(1)
        return logits, torch.stack([0.5 - mean, mean - 0.5], 1) * 10


def grey_levels(size: tuple[int, ...]) -> np.ndarray:
    """Classes 0, 1, 2 in blocks without any symmetry."""
    mask = np.zeros(size, np.uint8)
    mask[..., 3:12, 2:9] = 1
    mask[..., 5:8, 4:7] = 2
    if len(size) == 3:
        mask[: size[0] // 3] = 0
        mask[-1, 1, -2] = 2
    return mask


def predicted(folder: Path, of: Job, model: nn.Module, out: Path) -> list[Path]:
    """What ``consilium predict`` does with a folder."""
    site = SiteData("predict", folder if folder.is_dir() else folder.parent, cache=out.parent / "cache")
    data: Dataset = load_dataset(find(folder, of), site, of)
    assert data.skipped == ()
    out.mkdir(exist_ok=True)
    return write(zip(data.samples, predict(model, data, of, CPU), strict=True), site, of, out)


def test_pictures_give_png_of_classes_under_their_own_path(tmp_path: Path) -> None:
    mask = grey_levels((20, 33))
    for name in ("a.png", "sub/b.bmp", "sub/b.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask * 127).save(tmp_path / "in" / name)
    files = predicted(tmp_path / "in", job(), Levels(), tmp_path / "out")
    assert sorted(str(file.relative_to(tmp_path / "out")) for file in files) == ["a.png", "sub/b.png", "sub/b.png.png"]
    for file in files:
        assert np.array_equal(np.asarray(Image.open(file)), mask)


def test_one_file_may_be_named(tmp_path: Path) -> None:
    Image.fromarray(grey_levels((20, 33)) * 127).save(tmp_path / "a.png")
    Image.fromarray(grey_levels((20, 33)) * 127).save(tmp_path / "b.png")
    assert predicted(tmp_path / "a.png", job(), Levels(), tmp_path / "out") == [tmp_path / "out" / "a.png"]


def test_objects_are_numbered_beyond_255(tmp_path: Path) -> None:
    dots = np.zeros((60, 60), np.uint8)
    dots[1::3, 1::3] = 255
    (tmp_path / "in").mkdir()
    Image.fromarray(dots).save(tmp_path / "in" / "a.png")
    of = job(data__classes="cell", data__masks="instances")
    model = nn.Sequential(nn.Conv2d(1, 2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1))
        model[0].bias.zero_()
    (file,) = predicted(tmp_path / "in", of, model, tmp_path / "out")
    found = np.asarray(Image.open(file))
    assert found.dtype == np.uint16
    assert np.array_equal(found > 0, dots > 0)
    assert sorted(np.unique(found)) == list(range(401))


@pytest.mark.parametrize("order", ["RAS", "LPS", "PIR"])
def test_nifti_gives_nifti_voxel_on_voxel(tmp_path: Path, order: str) -> None:
    """Whatever order the axes of the file have; the header's affine comes back."""
    from nibabel import orientations

    values = grey_levels((9, 20, 14)).transpose(2, 1, 0)
    turn = orientations.ornt_transform(orientations.axcodes2ornt("RAS"), orientations.axcodes2ornt(order))
    turned = orientations.apply_orientation(values, turn)
    affine = np.array([[0.8, 0.1, 0, -30], [-0.1, 0.8, 0, 12], [0, 0, 2.5, 7], [0, 0, 0, 1]])
    affine = affine @ orientations.inv_ornt_aff(turn, values.shape)
    (tmp_path / "in").mkdir()
    nibabel.save(nibabel.Nifti1Image(turned.astype(np.int16) * 100, affine), tmp_path / "in" / "v.nii.gz")
    (file,) = predicted(tmp_path / "in", job("unet3d"), Levels(), tmp_path / "out")
    assert file == tmp_path / "out" / "v.nii.gz"
    image = nibabel.load(file)
    assert np.array_equal(np.asarray(image.dataobj), turned)
    assert np.allclose(image.affine, affine)


def test_a_job_that_resamples_answers_on_the_file_s_own_grid(tmp_path: Path) -> None:
    values = np.kron(grey_levels((8, 12, 12)), np.ones((1, 2, 2), np.uint8)).transpose(2, 1, 0)
    (tmp_path / "in").mkdir()
    nibabel.save(nibabel.Nifti1Image(values.astype(np.int16), np.diag([0.5, 0.5, 1.0, 1.0])), tmp_path / "in" / "v.nii")
    (file,) = predicted(tmp_path / "in", job("unet3d", data__spacing=1.0), Levels(), tmp_path / "out")
    found = np.asarray(nibabel.load(file).dataobj)
    assert found.shape == values.shape
    for k in (1, 2):
        assert 2 * ((found == k) & (values == k)).sum() / ((found == k).sum() + (values == k).sum()) > 0.7


def write_picture(path: Path, mask: np.ndarray) -> None:
    """A DICOM file by ITK (GDCM), which writes no window: grey values from the least to the largest."""
    sitk.WriteImage(sitk.GetImageFromArray(mask.astype(np.int16)[None] * 500), str(path))


def write_series(folder: Path, mask: np.ndarray) -> None:
    """A CT series by ITK (GDCM), its file names in no order."""
    folder.mkdir(parents=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    series, study, frame = (pydicom.uid.generate_uid() for _ in range(3))
    for index, plane in enumerate(mask):
        image = sitk.GetImageFromArray(plane.astype(np.int16)[None] * 500)
        tags = {
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2", "0008|0018": pydicom.uid.generate_uid(), "0008|0060": "CT",
            "0010|0020": "P-7", "0020|000d": study, "0020|000e": series, "0020|0052": frame,
            "0020|0032": f"-10\\-20\\{30 + 2.5 * index}", "0020|0037": "1\\0\\0\\0\\1\\0", "0028|0030": "0.7\\0.7",
            "0018|0050": "2.5", "0020|0013": str(index + 1),
        }  # fmt: skip
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{(index * 7) % len(mask):03d}.dcm"))
        writer.Execute(image)


def segments(file: Path) -> dict[str, np.ndarray]:
    """Each segment of a SEG by highdicom, on the grid of its source images in their own order of position."""
    seg = highdicom.seg.segread(file)
    volume = seg.get_volume(combine_segments=True)
    names = {number: seg.get_segment_description(number).segment_label for number in seg.segment_numbers}
    return {name: volume.array == number for number, name in names.items()}


def test_a_dicom_picture_gives_a_seg_that_points_at_it(tmp_path: Path) -> None:
    mask = grey_levels((20, 33))
    (tmp_path / "in").mkdir()
    write_picture(tmp_path / "in" / "a.dcm", mask)
    (file,) = predicted(tmp_path / "in", job(), Levels(), tmp_path / "out")
    seg, source = highdicom.seg.segread(file), pydicom.dcmread(tmp_path / "in" / "a.dcm")
    assert (seg.Modality, seg.StudyInstanceUID) == ("SEG", source.StudyInstanceUID)
    found = seg.get_pixels_by_source_instance([source.SOPInstanceUID], combine_segments=True)[0]
    assert np.array_equal(found, mask)
    again = read_mask(file, mask.shape, ("liver", "lesion"), {}, image=tmp_path / "in" / "a.dcm")
    assert np.array_equal(again, mask)
    dcmtk_reads(file)


def test_a_dicom_series_gives_one_seg_whose_frames_lie_where_the_slices_do(tmp_path: Path) -> None:
    mask = grey_levels((10, 20, 16))
    write_series(tmp_path / "in" / "case", mask)
    (file,) = predicted(tmp_path / "in", job("unet3d"), Levels(), tmp_path / "out")
    assert file == tmp_path / "out" / "case.dcm"
    volume = read_volume(tmp_path / "in" / "case")
    assert np.array_equal(read_mask(file, volume.values.shape, ("liver", "lesion"), {}, like=volume), mask)
    seg = highdicom.seg.segread(file)
    assert seg.PatientID == "P-7"
    assert [seg.get_segment_description(k).segment_label for k in (1, 2)] == ["liver", "lesion"]
    by_slice = {}
    for path in (tmp_path / "in" / "case").iterdir():
        source = pydicom.dcmread(path, stop_before_pixels=True)
        pixels = seg.get_pixels_by_source_instance(
            [source.SOPInstanceUID], combine_segments=True, assert_missing_frames_are_empty=True
        )[0]
        by_slice[float(source.ImagePositionPatient[2])] = pixels
    assert np.array_equal(np.stack([by_slice[place] for place in sorted(by_slice)]), mask)
    dcmtk_reads(file)


def dcmtk_reads(file: Path) -> None:
    """dcmtk parses the file to its end and finds a segmentation."""
    if not shutil.which("dcmdump"):
        pytest.skip("dcmtk is not installed")
    done = subprocess.run(["dcmdump", "+P", "0008,0016", "+P", "0062,0002", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "SegmentationStorage" in done.stdout
    assert "W:" not in done.stderr


def test_a_header_that_lacks_what_a_seg_must_repeat_gives_a_plain_file(tmp_path: Path) -> None:
    """And nothing of the header, a name above all, is printed."""
    picture, volume = grey_levels((20, 33)), grey_levels((10, 20, 16))
    (tmp_path / "in").mkdir()
    write_picture(tmp_path / "in" / "a.dcm", picture)
    write_series(tmp_path / "series" / "case", volume)
    for file in [tmp_path / "in" / "a.dcm", *(tmp_path / "series" / "case").iterdir()]:
        header = pydicom.dcmread(file)
        del header.StudyInstanceUID
        header.PatientName = "Surname"
        header.save_as(file)
    with warnings.catch_warnings(record=True) as said:
        (flat,) = predicted(tmp_path / "in", job(), Levels(), tmp_path / "out")
        (deep,) = predicted(tmp_path / "series", job("unet3d"), Levels(), tmp_path / "out3")
    assert not any("Surname" in str(item.message) for item in said)
    assert (flat.name, deep.name) == ("a.png", "case.nii.gz")
    assert np.array_equal(np.asarray(Image.open(flat)), picture)
    like = read_volume(tmp_path / "series" / "case")
    assert np.array_equal(read_mask(deep, volume.shape, ("liver", "lesion"), {}, like=like), volume)


def test_a_folder_given_as_such_may_itself_be_the_series(tmp_path: Path) -> None:
    write_series(tmp_path / "case", grey_levels((10, 20, 16)))
    assert [file.name for file in predicted(tmp_path / "case", job("unet3d"), Levels(), tmp_path / "out")] == [
        "case.dcm"
    ]


def test_volumes_are_found_at_any_depth_and_pictures_are_not_taken_for_them(tmp_path: Path) -> None:
    write_series(tmp_path / "in" / "p1" / "ct", grey_levels((10, 20, 16)))
    write_series(tmp_path / "in" / "p2", grey_levels((10, 20, 16)))
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4)), tmp_path / "in" / "p1" / "x.nii.gz")
    Image.new("L", (5, 5)).save(tmp_path / "in" / "p1" / "y.png")
    found = [sample.path for sample in find(tmp_path / "in", job("unet3d"))]
    assert found == ["p1/ct", "p1/x.nii.gz", "p2"]
    assert [sample.path for sample in find(tmp_path / "in", job())][-1] == "p2/009.dcm"


def test_the_masks_of_a_sites_own_folder_are_no_cases(tmp_path: Path) -> None:
    """Two folders of equal names, a table, and a DICOM segmentation beside its images without either."""
    pictures, volumes, pacs = (tmp_path / name for name in ("pictures", "volumes", "pacs"))
    for folder in ("images", "labels", "elsewhere/labels"):
        (pictures / folder).mkdir(parents=True)
        Image.new("L", (9, 9)).save(pictures / folder / "a.png")
    for name in ("ct.nii.gz", "truth.nii.gz", "other.nii.gz"):
        volumes.mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4)), volumes / name)
    (volumes / "cases.csv").write_text("path,mask\nct.nii.gz,truth.nii.gz\nother.nii.gz,\n")
    write_series(pacs / "ct", grey_levels((10, 20, 16)))
    write_segmentation(
        grey_levels((10, 20, 16)), ("liver", "lesion"), sorted((pacs / "ct").iterdir()), pacs / "seg.dcm"
    )
    flat, deep = job(), job("unet3d")
    assert [sample.path for sample in find(pictures, flat)] == ["elsewhere/labels/a.png", "images/a.png"]
    assert [sample.path for sample in find(volumes, deep)] == ["ct.nii.gz", "other.nii.gz"]
    assert [sample.path for sample in find(pacs, deep)] == ["ct"]
    assert "seg.dcm" not in [sample.path for sample in find(pacs, flat)]
    assert [sample.path for sample in find(tmp_path, deep)] == ["pacs/ct", "volumes/ct.nii.gz", "volumes/other.nii.gz"]


def test_a_frame_of_many_gives_a_png(tmp_path: Path) -> None:
    frames = np.stack([grey_levels((20, 33)) * k for k in (0, 1, 0)])
    (tmp_path / "in").mkdir()
    sitk.WriteImage(sitk.GetImageFromArray((frames * 127).astype(np.uint8)), str(tmp_path / "in" / "film.dcm"))
    (file,) = predicted(tmp_path / "in", job(), Levels(), tmp_path / "out")
    assert file.name == "film.png"
    assert np.array_equal(np.asarray(Image.open(file)), frames[1])


def test_labels_of_whole_images_are_written_to_a_table(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, grey in (("dark", 30), ("light", 220)):
        Image.new("L", (16, 16), grey).save(tmp_path / "in" / f"{name}.png")
    of = job(data__labels="dim,bright")
    files = predicted(tmp_path / "in", of, Levels(labels=True), tmp_path / "out")
    assert [file.name for file in files] == ["dark.png", "light.png", "labels.csv"]
    with files[-1].open(newline="") as table:
        rows = list(csv.DictReader(table))
    assert [(row["path"], row["label"]) for row in rows] == [("dark.png", "dim"), ("light.png", "bright")]
    assert all(float(row["probability:dim"]) + float(row["probability:bright"]) == pytest.approx(1) for row in rows)
    assert float(rows[0]["probability:dim"]) == pytest.approx(1 / (1 + np.exp(20 * (30 / 255 - 0.5))), abs=1e-3)

"""Volumes from files that ITK, nibabel, pydicom and dcmtk wrote, against ITK and nibabel as readers."""

from __future__ import annotations

import gzip
import itertools
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.uid import EnhancedCTImageStorage, ExplicitVRLittleEndian

from shared.errors import UserError
from shared.imaging.errors import CODES, UnreadableImage
from shared.imaging.grid import Stack, as_in_file, canonical
from shared.imaging.volumes import is_volume, read_stack, read_volume, source_files, volume_patient, window_ends

SPACING = (0.7, 0.9, 2.5)  # x, y, z
ROTATED = [0.6, -0.8, 0.0, 0.8, 0.6, 0.0, 0.0, 0.0, 1.0]
SAGITTAL = [0.0, 0.0, -1.0, 1.0, 0.0, 0.0, 0.0, -1.0, 0.0]
AXIAL = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
DIRECTIONS = {
    "axial": AXIAL,
    "rotated": ROTATED,
    "sagittal": SAGITTAL,
    "head first": [-1.0, 0, 0, 0, 1, 0, 0, 0, -1],
}


def phantom(direction: list[float] | None = None, shape: tuple[int, int, int] = (6, 9, 8)) -> sitk.Image:
    """HU that differ in every voxel, somewhere in space."""
    values = np.arange(np.prod(shape), dtype=np.int16).reshape(shape) * 3 - 1000
    image = sitk.GetImageFromArray(values)
    image.SetSpacing(SPACING)
    image.SetOrigin((-31.5, 12.25, 104.0))
    image.SetDirection(direction or AXIAL)
    return image


def write_series(
    folder: Path, image: sitk.Image, series: str = "1.2.3.4", patient: str = "p-1", intercept: int = -1024
) -> list[Path]:
    """A CT series by ITK (GDCM), one file per slice; names and instance numbers run against the positions."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    direction, count = image.GetDirection(), image.GetSize()[2]
    files = []
    for index in range(count):
        plane = image[:, :, index]
        number = (index * 5) % count if count % 5 else count - index
        tags = {
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
            "0008|0018": f"{series}.{index + 1}",
            "0008|0060": "CT",
            "0010|0010": "Phantom^One",
            "0010|0020": patient,
            "0020|000d": "1.2.3",
            "0020|000e": series,
            "0020|0052": "1.2.3.99",
            "0020|0013": str(number),
            "0020|0032": "\\".join(map(str, image.TransformIndexToPhysicalPoint((0, 0, index)))),
            "0020|0037": "\\".join(map(str, (*direction[0::3], *direction[1::3]))),
            "0028|1052": str(intercept),
            "0028|1053": "1",
        }
        for tag, value in tags.items():
            plane.SetMetaData(tag, value)
        files.append(folder / f"{number:03d}.dcm")
        writer.SetFileName(str(files[-1]))
        writer.Execute(plane)
    return files


def itk_series(folder: Path) -> sitk.Image:
    """The series as ITK reads it: its own sorting, its own rescaling."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()


def change(file: Path, **values: object) -> None:
    """Rewrite a file with other header values; None takes one out."""
    ds = pydicom.dcmread(file)
    for keyword, value in values.items():
        if value is None:
            delattr(ds, keyword)
        else:
            setattr(ds, keyword, value)
    ds.save_as(file)


def code(reader: Callable[[], object], name: str = "") -> str:
    """The code of the error; its detail must name ``name``."""
    with pytest.raises(UnreadableImage) as caught:
        reader()
    assert name in caught.value.detail
    assert str(caught.value) == caught.value.code in CODES
    return caught.value.code


# --- the right array --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", DIRECTIONS.values(), ids=DIRECTIONS)
def test_a_series_and_a_nifti_of_one_patient_give_the_array_that_itk_gives(
    tmp_path: Path, direction: list[float]
) -> None:
    write_series(tmp_path / "series", phantom(direction))
    image = sitk.DICOMOrient(itk_series(tmp_path / "series"), "LPS")
    sitk.WriteImage(phantom(direction), str(tmp_path / "scan.nii.gz"))
    series, nifti = read_stack(tmp_path / "series"), read_stack(tmp_path / "scan.nii.gz")
    assert np.array_equal(series.values, sitk.GetArrayFromImage(image))
    assert np.array_equal(nifti.values, series.values)
    assert series.affine is not None
    assert nifti.affine is not None
    assert np.allclose(series.affine, nifti.affine, atol=1e-4)
    for place in itertools.product((0, 3), (0, 4), (0, 5)):
        point = np.array(image.TransformIndexToPhysicalPoint(place[::-1])) * [-1, -1, 1]
        assert np.allclose((series.affine @ (*place, 1))[:3], point, atol=1e-4)
    volume = read_volume(tmp_path / "series")
    assert volume.spacing == pytest.approx(image.GetSpacing()[::-1], abs=1e-4)
    assert volume.reference == "1.2.3.99"


def test_real_series_and_real_dose_as_itk_reads_them(shared_data: Callable[[str], Path]) -> None:
    folder = shared_data("dicom_robustness") / "pydicom"
    ct = folder / "dicomdirtests" / "98892001" / "CT5N"
    assert np.array_equal(read_stack(ct).values, sitk.GetArrayFromImage(sitk.DICOMOrient(itk_series(ct), "LPS")))
    dose, image = read_stack(folder / "rtdose.dcm"), sitk.ReadImage(str(folder / "rtdose.dcm"))
    assert np.array_equal(dose.values, sitk.GetArrayFromImage(image).astype(np.float32))
    assert dose.affine is not None
    assert np.allclose(dose.affine[:3, 3] * [-1, -1, 1], image.GetOrigin())


@settings(max_examples=40, deadline=None)
@given(
    axes=st.permutations(range(3)),
    flips=st.tuples(*[st.booleans()] * 3),
    shape=st.tuples(*[st.integers(2, 4)] * 3),
    shift=st.tuples(*[st.floats(-200, 200)] * 3),
)
def test_the_order_of_axes_in_the_file_does_not_matter(
    axes: list[int], flips: tuple[bool, ...], shape: tuple[int, ...], shift: tuple[float, ...]
) -> None:
    values = np.arange(np.prod(shape)).reshape(shape)
    affine = np.array([[0, 0, -0.8, shift[0]], [0, -0.7, 0, shift[1]], [2.5, 0, 0, shift[2]], [0, 0, 0, 1]])
    image = nibabel.Nifti1Image(values.astype(np.int32), affine)
    image = image.as_reoriented(np.array([[axis, -1 if flip else 1] for axis, flip in zip(axes, flips, strict=True)]))
    found = canonical(Stack(np.asarray(image.dataobj), image.affine))
    assert np.array_equal(found.values, values)
    assert found.affine is not None
    assert np.allclose(found.affine, affine)
    assert np.array_equal(as_in_file(found.values, image.affine), np.asarray(image.dataobj))


def test_window_range_and_types(tmp_path: Path) -> None:
    values = np.linspace(-1000, 500, 60, dtype=np.float32).reshape(3, 4, 5)
    nibabel.save(nibabel.Nifti1Image(values, np.diag([1, 1, 1, 1])), tmp_path / "f.nii")
    full, narrow = read_volume(tmp_path / "f.nii"), read_volume(tmp_path / "f.nii", "-160 240")
    hu = read_stack(tmp_path / "f.nii").values
    assert full.values.dtype == np.float32
    assert np.allclose(full.values, (hu + 1000) / 1500, atol=1e-6)
    assert np.allclose(narrow.values, np.clip((hu + 160) / 400, 0, 1), atol=1e-6)
    assert full.reference == ""
    big = np.array([2**31 - 1, 2**31 - 2, 0, -(2**31)] * 2, np.int32).reshape(2, 2, 2)
    nibabel.save(nibabel.Nifti1Image(big, np.eye(4)), tmp_path / "big.nii")
    window = f"{2**31 - 3} {2**31 - 1}"
    assert set(np.unique(read_volume(tmp_path / "big.nii", window).values)) == {0.0, 0.5, 1.0}
    nibabel.save(nibabel.Nifti1Image(np.full((2, 2, 2), 7, np.uint8), np.eye(4)), tmp_path / "flat.nii")
    assert read_volume(tmp_path / "flat.nii").values.max() == 0
    assert window_ends("") is None
    assert window_ends(" -160, 240 ") == (-160, 240)
    for wrong in ("1", "240 -160", "a b", "1 2 3", "nan 1", "0 inf"):
        with pytest.raises(UserError, match="growing"):
            read_volume(tmp_path / "f.nii", wrong)


def test_scale_units_nan_and_one_volume_of_a_film(tmp_path: Path) -> None:
    stored = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    image = nibabel.Nifti1Image(stored[..., None], np.diag([0.001, 0.002, 0.003, 1]))
    image.header.set_xyzt_units("meter")
    image.header.set_slope_inter(0.5, -10)
    nibabel.save(image, tmp_path / "a.nii.gz")
    found = read_stack(tmp_path / "a.nii.gz")
    assert np.array_equal(np.sort(found.values.ravel()), np.arange(24) * 0.5 - 10)
    assert read_volume(tmp_path / "a.nii.gz").spacing == pytest.approx((3, 2, 1))
    values = stored.astype(np.float32)
    values[0, 0, 0] = np.nan
    values[1, 1, 1] = np.inf
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "nan.nii")
    volume = read_volume(tmp_path / "nan.nii").values
    assert np.isfinite(volume).all()
    assert volume.max() == 1
    assert np.count_nonzero(volume == 0) == 3  # the two, and the least value, 1


def test_missing_slope_and_padding(tmp_path: Path) -> None:
    files = write_series(tmp_path, phantom())
    before = read_stack(tmp_path).values
    for file in files:
        ds = pydicom.dcmread(file)
        ds.PixelRepresentation = 1
        pixels = ds.pixel_array.astype(np.int16)
        pixels[0, 0] = -2000
        del ds.RescaleSlope  # pydicom's own rescaling then leaves the intercept out, too
        ds.add_new("PixelPaddingValue", "US", 63536)  # -2000 under the wrong VR, as GE writes it
        ds.PixelData = pixels.tobytes()
        ds.save_as(file)
    stack = read_stack(tmp_path)
    assert np.array_equal(stack.values[:, 1:], before[:, 1:])
    assert stack.valid is not None
    assert not stack.valid[:, 0, 0].any()
    assert stack.valid.sum() == before.size - len(files)
    volume = read_volume(tmp_path)
    least, most = before[:, 0, 1:].min(), before.max()
    assert np.allclose(volume.values[:, 1:], ((before - least) / (most - least))[:, 1:], atol=1e-6)
    assert (volume.values[:, 0, 0] == 0).all()


def test_a_gantry_tilt_stays_a_shear(tmp_path: Path) -> None:
    files = write_series(tmp_path, phantom())
    for index, file in enumerate(files):
        change(file, ImagePositionPatient=[-31.5, 12.25 + 0.8 * index, 104 + 2.5 * index])
    affine = read_stack(tmp_path).affine
    assert affine is not None
    for index, row, column in ((0, 0, 0), (5, 0, 0), (3, 2, 7)):
        point = [-31.5 + 0.7 * column, 12.25 + 0.8 * index + 0.9 * row, 104 + 2.5 * index]
        assert np.allclose((affine @ (index, row, column, 1))[:3], np.array(point) * [-1, -1, 1], atol=1e-3)
    change(files[2], ImagePositionPatient=[-31.5, 40.0, 109.0])
    assert code(lambda: read_stack(tmp_path), files[2].name) == "uneven-slices"


def enhanced(path: Path, image: sitk.Image, order: list[int], placed: bool = True) -> None:
    """An Enhanced CT: all slices in one file, in the order given (PS3.3 A.38)."""
    values = sitk.GetArrayFromImage(image)
    ds = Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = EnhancedCTImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = "1.2.3.4.5"
    ds.Modality, ds.SeriesInstanceUID, ds.StudyInstanceUID, ds.PatientID = "CT", "1.2.3.4", "1.2.3", "p-1"
    ds.FrameOfReferenceUID = "1.2.3.99"
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 1
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 16, 15
    ds.NumberOfFrames, ds.Rows, ds.Columns = len(order), *values.shape[1:]
    shared, orientation, measures, rescale = Dataset(), Dataset(), Dataset(), Dataset()
    direction = image.GetDirection()
    orientation.ImageOrientationPatient = [*direction[0::3], *direction[1::3]]
    measures.PixelSpacing = [SPACING[1], SPACING[0]]
    rescale.RescaleIntercept, rescale.RescaleSlope, rescale.RescaleType = -24, 2, "HU"
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [orientation], [measures]
    shared.PixelValueTransformationSequence = [rescale]
    ds.SharedFunctionalGroupsSequence = [shared]
    ds.PerFrameFunctionalGroupsSequence = []
    for index in order if placed else []:
        group, position = Dataset(), Dataset()
        position.ImagePositionPatient = list(image.TransformIndexToPhysicalPoint((0, 0, index)))
        group.PlanePositionSequence = [position]
        ds.PerFrameFunctionalGroupsSequence.append(group)
    ds.PixelData = values[order].astype(np.int16).tobytes()
    ds.save_as(path, enforce_file_format=True)


def test_many_frames_in_one_file(tmp_path: Path) -> None:
    image = phantom(ROTATED)
    write_series(tmp_path / "series", image)
    enhanced(tmp_path / "e.dcm", image, [3, 0, 5, 1, 4, 2])
    series, frames = read_stack(tmp_path / "series"), read_stack(tmp_path / "e.dcm")
    assert np.array_equal(frames.values, series.values * 2 - 24)
    assert frames.affine is not None
    assert series.affine is not None
    assert np.allclose(frames.affine, series.affine, atol=1e-4)
    turned = sitk.GetArrayFromImage(sitk.DICOMOrient(image, "LPS"))
    assert np.array_equal(frames.values, turned * 2.0 - 24)
    enhanced(tmp_path / "two.dcm", image, [0, 1, 2, 3, 4, 5, 0])
    assert code(lambda: read_stack(tmp_path / "two.dcm"), "two.dcm frame 6") == "duplicate-slice"
    enhanced(tmp_path / "film.dcm", image, [2, 0, 1], placed=False)
    film = read_volume(tmp_path / "film.dcm")
    assert film.spacing is None
    assert np.array_equal(film.affine, np.eye(4))
    assert np.array_equal(read_stack(tmp_path / "film.dcm").values, sitk.GetArrayFromImage(image)[[2, 0, 1]] * 2.0 - 24)


DCMTK = pytest.mark.skipif(shutil.which("dcmconv") is None, reason="dcmtk is not installed here (apt: dcmtk)")


@DCMTK
@pytest.mark.parametrize("tool", ["dcmconv +tb", "dcmconv +ti", "dcmconv +td", "dcmcrle", "dcmcjpeg", "dcmcjpls"])
def test_series_that_dcmtk_rewrote(tmp_path: Path, tool: str) -> None:
    """Big endian, implicit, deflated, run lengths, lossless JPEG and JPEG-LS: the same voxels."""
    files = write_series(tmp_path, phantom())
    before = read_stack(tmp_path).values
    for file in files:
        subprocess.run([*tool.split(), file, file], check=True, capture_output=True)
    assert np.array_equal(read_stack(tmp_path).values, before)
    subprocess.run(["dcmodify", "-nb", "-m", "(0028,1052)=-24", *files], check=True, capture_output=True)
    assert np.array_equal(read_stack(tmp_path).values, before + 1000)
    subprocess.run(["dcmodify", "-nb", "-m", "(0020,000e)=9.9", files[0]], check=True, capture_output=True)
    assert code(lambda: read_stack(tmp_path)) == "mixed-series"


# --- files that are none ----------------------------------------------------------------------------------------------


def test_each_fault_of_a_series_has_its_name(tmp_path: Path) -> None:
    def fresh(name: str) -> tuple[Path, list[Path]]:
        return tmp_path / name, write_series(tmp_path / name, phantom())

    folder, files = fresh("gap")
    files[3].unlink()
    assert code(lambda: read_volume(folder), files[2].name) == "missing-slice"
    folder, files = fresh("mixed")
    other = write_series(tmp_path / "other", phantom(), "1.2.3.5")
    shutil.copy(other[0], folder / "x.dcm")
    assert code(lambda: read_volume(folder), "x.dcm") == "mixed-series"
    folder, files = fresh("twice")
    shutil.copy(files[1], folder / "copy.dcm")
    assert code(lambda: read_volume(folder), "copy.dcm") == "duplicate-slice"
    folder, files = fresh("size")
    ds = pydicom.dcmread(files[2])
    ds.Rows, ds.PixelData = 5, ds.PixelData[: 5 * 8 * 2]
    ds.save_as(files[2])
    assert code(lambda: read_volume(folder), files[2].name) == "uneven-slices"
    for keyword, value in (("ImageOrientationPatient", [0, 1, 0, 0, 0, -1]), ("PixelSpacing", [0.9, 0.8])):
        folder, files = fresh(keyword)
        change(files[2], **{keyword: value})
        assert code(lambda folder=folder: read_volume(folder), files[2].name) == "uneven-slices"  # type: ignore[misc]
    folder, files = fresh("placeless")
    change(files[4], ImagePositionPatient=None)
    assert code(lambda: read_volume(folder), files[4].name) == "not-a-volume"
    folder, files = fresh("position")
    change(files[4], ImagePositionPatient=[1, 2])
    assert code(lambda: read_volume(folder), files[4].name) == "corrupt"
    folder, files = fresh("empty")
    files[4].write_bytes(b"")
    assert code(lambda: read_volume(folder), files[4].name) == "empty-file"
    folder, files = fresh("cut")
    files[4].write_bytes(files[4].read_bytes()[:-20])
    assert code(lambda: read_volume(folder), files[4].name) == "truncated"
    folder, files = fresh("head")
    files[4].write_bytes(b"\0" * 500)
    assert code(lambda: read_volume(folder), files[4].name) == "not-dicom"
    folder, files = fresh("one")
    for file in files[1:]:
        file.unlink()
    assert code(lambda: read_volume(folder), "one") == "not-a-volume"
    assert code(lambda: read_volume(files[0]), files[0].name) == "not-a-volume"
    assert code(lambda: read_volume(tmp_path / "nowhere"), "nowhere") == "not-found"
    (tmp_path / "bare").mkdir()
    assert code(lambda: read_volume(tmp_path / "bare"), "bare") == "not-a-volume"


def test_what_lies_beside_the_slices_is_passed_over(tmp_path: Path, shared_data: Callable[[str], Path]) -> None:
    write_series(tmp_path, phantom())
    before = read_stack(tmp_path).values
    robust = shared_data("dicom_robustness")
    shutil.copy(robust / "highdicom" / "seg_image_ct_binary.dcm", tmp_path / "seg.dcm")
    shutil.copy(robust / "highdicom" / "sr_document.dcm", tmp_path / "report.dcm")
    shutil.copy(robust / "pydicom" / "dicomdirtests" / "DICOMDIR", tmp_path / "DICOMDIR")
    (tmp_path / ".DS_Store").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("left kidney missing")
    assert np.array_equal(read_stack(tmp_path).values, before)


def test_real_folders_that_hold_no_volume(shared_data: Callable[[str], Path]) -> None:
    folder = shared_data("dicom_robustness") / "pydicom" / "dicomdirtests"
    assert code(lambda: read_volume(folder / "77654033" / "CT2"), "17106") == "missing-slice"
    assert code(lambda: read_volume(folder / "98892003" / "MR2"), "MR2") == "mixed-series"
    assert code(lambda: read_volume(folder / "98892003" / "MR700"), "MR700") == "uneven-slices"
    assert code(lambda: read_volume(folder / "98892001" / "CT2N"), "CT2N") == "uneven-slices"


def test_each_fault_of_a_nifti_has_its_name(tmp_path: Path) -> None:
    def saved(name: str, values: np.ndarray, affine: np.ndarray | None = None) -> Path:
        image = nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine)
        nibabel.save(image, tmp_path / name)
        return tmp_path / name

    good = saved("good.nii", np.arange(1000, dtype=np.int16).reshape(10, 10, 10))
    cut, zipped = tmp_path / "cut.nii", tmp_path / "cut.nii.gz"
    cut.write_bytes(good.read_bytes()[:-100])
    assert code(lambda: read_volume(cut), "cut.nii") == "truncated"
    zipped.write_bytes(gzip.compress(good.read_bytes())[:-60])
    assert code(lambda: read_volume(zipped), "cut.nii.gz") == "truncated"
    (tmp_path / "empty.nii.gz").write_bytes(b"")
    assert code(lambda: read_volume(tmp_path / "empty.nii.gz"), "empty.nii.gz") == "empty-file"
    (tmp_path / "text.nii").write_text("nothing of the kind " * 50)
    assert code(lambda: read_volume(tmp_path / "text.nii"), "text.nii") == "corrupt"
    assert code(lambda: read_volume(tmp_path / "gone.nii"), "gone.nii") == "not-found"
    film = saved("film.nii", np.zeros((4, 4, 4, 3), np.int16))
    assert code(lambda: read_volume(film), "4 x 4 x 4 x 3") == "not-a-volume"
    assert code(lambda: read_volume(saved("2d.nii", np.zeros((4, 4), np.int16))), "2d.nii") == "not-a-volume"
    assert code(lambda: read_volume(saved("1.nii", np.zeros((4, 4, 1), np.int16))), "4 x 4 x 1") == "not-a-volume"
    colour = np.zeros((4, 4, 4), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    assert code(lambda: read_volume(saved("rgb.nii", colour)), "rgb.nii") == "not-a-volume"
    assert code(lambda: read_volume(saved("c.nii", np.zeros((4, 4, 4), np.complex64))), "c.nii") == "not-a-volume"
    flat = saved("flat.nii", np.zeros((4, 4, 4), np.int16))
    data = bytearray(flat.read_bytes())
    data[252:256] = (0).to_bytes(2, "little") + (1).to_bytes(2, "little")  # no qform; an sform
    data[280:328] = bytes(48)  # that is all zero
    flat.write_bytes(data)
    assert code(lambda: read_volume(flat), "flat.nii") == "corrupt"


def test_what_is_a_volume_and_whose(tmp_path: Path, shared_data: Callable[[str], Path]) -> None:
    files = write_series(tmp_path / "s", phantom(), patient="p-7")
    sitk.WriteImage(phantom(), str(tmp_path / "scan.nii.gz"))
    robust = shared_data("dicom_robustness") / "pydicom"
    assert is_volume(tmp_path / "s")
    assert is_volume(tmp_path / "scan.nii.gz")
    assert is_volume(robust / "rtdose.dcm")
    assert not is_volume(tmp_path)
    assert not is_volume(files[0])
    assert not is_volume(tmp_path / "gone.nii")
    assert not is_volume(tmp_path / "nowhere")
    radiographs = tmp_path / "radiographs"
    radiographs.mkdir()
    for name in ("CR1/6154", "CR2/6247", "CR3/6278"):
        shutil.copy(robust / "dicomdirtests" / "77654033" / name, radiographs)
    assert not is_volume(radiographs)
    assert source_files(tmp_path / "s") == files  # write_series gives them in the order of their places
    assert source_files(tmp_path / "scan.nii.gz") == [tmp_path / "scan.nii.gz"]
    assert volume_patient(tmp_path / "s") == "p-7" == volume_patient(files[0])
    assert volume_patient(tmp_path / "scan.nii.gz") == ""


def test_a_real_enhanced_mr_reads_as_itk_reads_it(shared_data: Callable[[str], Path]) -> None:
    """Ten frames without positions, in five transfer syntaxes; one file is cut."""
    folder = shared_data("dicom_robustness") / "pydicom-data"
    wanted = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "emri_small.dcm")))
    for kind in ("", "_RLE", "_big_endian", "_jpeg_2k_lossless", "_jpeg_ls_lossless"):
        file = folder / f"emri_small{kind}.dcm"
        assert is_volume(file)
        assert np.array_equal(read_stack(file).values, wanted.astype(np.float32))
    cut = folder / "emri_small_jpeg_2k_lossless_too_short.dcm"
    assert code(lambda: read_stack(cut), cut.name) == "truncated"
    assert code(lambda: read_stack(folder / "SC_rgb_2frame.dcm"), "colour") == "not-a-volume"

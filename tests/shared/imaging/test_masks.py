"""Masks that Pillow, tifffile, ITK, nibabel, highdicom and dcmqi wrote, and masks we wrote, read by others."""

from __future__ import annotations

import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from shared.errors import SiteRefusal
from shared.imaging.errors import CODES, UnreadableImage
from shared.imaging.masks import read_mask, write_nifti, write_segmentation
from shared.imaging.volumes import Volume, read_volume, source_files
from tests.shared.imaging.test_volumes import AXIAL, DIRECTIONS, ROTATED, change, enhanced, phantom, write_series

ORGANS = ("liver", "spleen", "lesion")
VALUES = np.array([[0, 1, 2, 3], [3, 3, 0, 0], [1, 1, 2, 0]])


def code(reader: Callable[[], object], *words: object) -> str:
    """The code of the error; its detail must hold ``words``."""
    with pytest.raises(UnreadableImage) as caught:
        reader()
    assert all(str(word) in caught.value.detail for word in words), caught.value.detail
    assert caught.value.code in CODES
    return caught.value.code


def organs(path: Path, shape: tuple[int, ...] = (3, 4), **more: object) -> np.ndarray:
    """The mask with the three organs as classes."""
    return read_mask(path, shape, ORGANS, **({"label_map": {}} | more))  # type: ignore[arg-type]


# --- pictures ---------------------------------------------------------------------------------------------------------


def grey_png(path: Path, values: np.ndarray, bits: int) -> Path:
    """A grey PNG of 1, 2 or 4 bits, which Pillow cannot write (PNG specification, sections 5 and 7)."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = []
    for row in values:
        text = "".join(f"{value:0{bits}b}" for value in row)
        text = text.ljust(-(-len(text) // 8) * 8, "0")
        rows.append(b"\0" + bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8)))
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0)
    content = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"".join(rows))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    return path


def test_every_kind_of_picture_keeps_its_values(tmp_path: Path) -> None:
    byte, word = VALUES.astype(np.uint8), VALUES.astype(np.uint16)
    palette = Image.fromarray(byte, "L").convert("P")
    palette.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200, 9, 9, 9])
    palette.putdata(byte.ravel().tolist())
    few = Image.new("P", (4, 3))
    few.putdata(byte.ravel().tolist())
    few.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    Image.fromarray(byte).save(tmp_path / "l.png")
    Image.fromarray(word).save(tmp_path / "i16.png")
    palette.save(tmp_path / "p.png")
    few.save(tmp_path / "p2.png", bits=2)
    grey_png(tmp_path / "two.png", VALUES, 2)
    grey_png(tmp_path / "four.png", VALUES, 4)
    Image.fromarray(np.stack([byte] * 3, -1)).save(tmp_path / "rgb.png")
    Image.fromarray(np.stack([byte, byte, byte, byte * 0 + 255], -1), "RGBA").save(tmp_path / "rgba.png")
    Image.fromarray(np.stack([byte, byte * 0 + 255], -1), "LA").save(tmp_path / "la.png")
    Image.fromarray(byte).save(tmp_path / "l.bmp")
    Image.fromarray(byte).save(tmp_path / "lzw.tif", compression="tiff_lzw")
    palette.save(tmp_path / "p.tif")
    tifffile.imwrite(tmp_path / "i32.tif", VALUES.astype(np.int32))
    tifffile.imwrite(tmp_path / "f32.tif", VALUES.astype(np.float32))
    sitk.WriteImage(sitk.GetImageFromArray(word), str(tmp_path / "itk.png"))
    sitk.WriteImage(sitk.GetImageFromArray(word), str(tmp_path / "itk.tif"))
    sitk.WriteImage(sitk.GetImageFromArray(byte), str(tmp_path / "itk.nii.gz"))
    files = sorted(tmp_path.iterdir())
    assert len(files) == 17
    for file in files:
        mask = organs(file)
        assert mask.dtype == np.int32, file
        assert np.array_equal(mask, VALUES), file
    grey_png(tmp_path / "one.png", VALUES > 0, 1)
    assert np.array_equal(read_mask(tmp_path / "one.png", (3, 4), ["x"], {}), VALUES > 0)


def test_black_and_white_means_background_and_the_one_class(tmp_path: Path) -> None:
    lit = (VALUES > 1).astype(np.uint8)
    Image.fromarray(lit * 255).save(tmp_path / "8.png")
    Image.fromarray(lit.astype(np.uint16) * 65535).save(tmp_path / "16.png")
    Image.fromarray(lit * 128).save(tmp_path / "128.png")
    for name in ("8.png", "16.png"):
        assert np.array_equal(read_mask(tmp_path / name, (3, 4), ["nucleus"], {}), lit)
        assert code(lambda name=name: organs(tmp_path / name), name) == "unknown-class"  # type: ignore[misc]
    assert code(lambda: read_mask(tmp_path / "128.png", (3, 4), ["nucleus"], {}), "128") == "unknown-class"
    mapped = read_mask(tmp_path / "8.png", (3, 4), ORGANS, {"255": "lesion"})
    assert np.array_equal(mapped, lit * 3)


def test_values_go_through_the_label_map_of_the_site(tmp_path: Path) -> None:
    file = tmp_path / "m.png"
    Image.fromarray(np.array([[0, 1, 2, 7, 255]], np.uint8)).save(file)
    label_map = {"1": "spleen", "2": "liver", "7": "", "255": "background"}
    assert read_mask(file, (1, 5), ORGANS, label_map).tolist() == [[0, 2, 1, 0, 0]]
    assert code(lambda: organs(file, (1, 5)), file, "value 7", "1 liver, 2 spleen, 3 lesion") == "unknown-class"
    with pytest.raises(
        SiteRefusal, match=r"m.png: value 7: .* which is not a class of the job \(liver, spleen"
    ) as caught:
        read_mask(file, (1, 5), ORGANS, {"7": "pancreas"})
    assert caught.value.code == "unknown-label"


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.integers(0, 65535), min_size=3, max_size=3), min_size=1, max_size=6))
def test_objects_are_numbered_without_gaps(tmp_path: Path, rows: list[list[int]]) -> None:
    values = np.array(rows, np.uint16)
    Image.fromarray(values).save(tmp_path / "objects.png")
    mask = read_mask(tmp_path / "objects.png", values.shape, ["nucleus"], {}, instances=True)
    order = sorted({value for row in rows for value in row} - {0})  # the slow way
    assert mask.tolist() == [[order.index(value) + 1 if value else 0 for value in row] for row in rows]


def test_pictures_that_are_no_masks(tmp_path: Path, shared_data: Callable[[str], Path]) -> None:
    Image.fromarray(VALUES.astype(np.uint8)).save(tmp_path / "m.png")
    assert code(lambda: organs(tmp_path / "m.png", (4, 4)), "m.png", "3 x 4", "4 x 4") == "mask-size"
    colour = np.zeros((3, 4, 3), np.uint8)
    colour[0, 0] = (255, 0, 0)
    Image.fromarray(colour).save(tmp_path / "c.png")
    assert code(lambda: organs(tmp_path / "c.png"), "c.png", "colour") == "not-a-mask"
    Image.fromarray(VALUES.astype(np.uint8)).save(tmp_path / "m.jpg")
    assert code(lambda: organs(tmp_path / "m.jpg"), "m.jpg", "PNG") == "not-a-mask"
    tifffile.imwrite(tmp_path / "f.tif", VALUES * 0.5)
    assert code(lambda: organs(tmp_path / "f.tif"), "f.tif", "interpolation") == "not-a-mask"
    tifffile.imwrite(tmp_path / "pages.tif", np.zeros((5, 3, 4), np.uint8), photometric="minisblack")
    assert code(lambda: organs(tmp_path / "pages.tif"), "5 pages") == "not-a-mask"
    tifffile.imwrite(tmp_path / "n.tif", VALUES.astype(np.int16) - 1)
    assert code(lambda: organs(tmp_path / "n.tif"), "value -1") == "unknown-class"
    (tmp_path / "e.png").write_bytes(b"")
    assert code(lambda: organs(tmp_path / "e.png"), "e.png") == "empty-file"
    (tmp_path / "t.png").write_bytes((tmp_path / "m.png").read_bytes()[:45])
    assert code(lambda: organs(tmp_path / "t.png"), "t.png") in ("truncated", "corrupt")
    (tmp_path / "x.png").write_text("no picture")
    assert code(lambda: organs(tmp_path / "x.png"), "x.png") == "unsupported-format"
    assert code(lambda: organs(tmp_path / "gone.png"), "gone.png") == "not-found"
    assert code(lambda: organs(tmp_path / "m.png", (2, 3, 4)), "m.png", "NIfTI") == "unsupported-format"
    seg = shared_data("dicom_robustness") / "highdicom" / "seg_image_sm_dots.dcm"
    assert code(lambda: read_mask(seg, (50, 50), ["x"], {}, instances=True), "tiles") == "unsupported-format"


# --- NIfTI ------------------------------------------------------------------------------------------------------------


def labels(direction: list[float], shape: tuple[int, int, int] = (6, 9, 8)) -> sitk.Image:
    """A label map on the phantom's grid."""
    image = sitk.GetImageFromArray(np.random.default_rng(3).integers(0, 4, shape).astype(np.uint8))
    image.CopyInformation(phantom(direction, shape))
    return image


@pytest.mark.parametrize("direction", DIRECTIONS.values(), ids=DIRECTIONS)
def test_a_nifti_mask_lies_on_its_image_whatever_its_order_of_axes(tmp_path: Path, direction: list[float]) -> None:
    write_series(tmp_path / "series", phantom(direction))
    volume = read_volume(tmp_path / "series")
    wanted = sitk.GetArrayFromImage(sitk.DICOMOrient(labels(direction), "LPS"))
    for order in ("LPS", "RAS", "SAL", "PIR"):
        file = tmp_path / f"{order}.nii.gz"
        sitk.WriteImage(sitk.DICOMOrient(labels(direction), order), str(file))
        assert np.array_equal(organs(file, volume.values.shape, like=volume), wanted)


def test_a_nifti_mask_elsewhere_is_refused(tmp_path: Path) -> None:
    write_series(tmp_path / "series", phantom())
    volume = read_volume(tmp_path / "series")
    image = labels(AXIAL)
    image.SetOrigin((-31.5, 12.25 + 0.45, 104.0))  # half a pixel
    sitk.WriteImage(image, str(tmp_path / "aside.nii"))
    shape = volume.values.shape
    assert code(lambda: organs(tmp_path / "aside.nii", shape, like=volume), "aside.nii") == "mask-position"
    assert organs(tmp_path / "aside.nii", shape).shape == shape  # nothing to compare with
    sitk.WriteImage(labels(AXIAL, (5, 9, 8)), str(tmp_path / "short.nii"))
    assert code(lambda: organs(tmp_path / "short.nii", shape, like=volume), "5 x 9 x 8", "6 x 9 x 8") == "mask-size"
    soft = sitk.GetImageFromArray(np.random.default_rng(0).random((6, 9, 8)).astype(np.float32))
    soft.CopyInformation(phantom())
    sitk.WriteImage(soft, str(tmp_path / "soft.nii"))
    assert code(lambda: organs(tmp_path / "soft.nii", shape, like=volume), "soft.nii") == "not-a-mask"


@pytest.mark.parametrize("direction", DIRECTIONS.values(), ids=DIRECTIONS)
def test_a_nifti_we_write_lies_where_itk_and_nibabel_expect_it(tmp_path: Path, direction: list[float]) -> None:
    source = tmp_path / "scan.nii.gz"
    sitk.WriteImage(phantom(direction), str(source))
    volume = read_volume(source)
    mask = (np.arange(volume.values.size).reshape(volume.values.shape) % 7).astype(np.int32)
    write_nifti(mask, volume.affine, tmp_path / "free.nii.gz")
    write_nifti(mask, volume.affine, tmp_path / "alike.nii.gz", like=source)
    free = sitk.ReadImage(str(tmp_path / "free.nii.gz"))
    assert free.GetPixelID() == sitk.sitkUInt8
    for place in ((0, 0, 0), (1, 5, 2), (3, 0, 4)):
        point = (volume.affine @ (*place, 1))[:3] * [-1, -1, 1]
        assert free.GetPixel(free.TransformPhysicalPointToIndex(point)) == mask[place]
    alike, scan = nibabel.load(tmp_path / "alike.nii.gz"), nibabel.load(source)
    assert alike.shape == scan.shape
    assert np.allclose(alike.affine, scan.affine, atol=1e-5)
    for name in ("free.nii.gz", "alike.nii.gz"):
        assert np.array_equal(read_mask(tmp_path / name, mask.shape, [*"abcdef"], {}, like=volume), mask)
    write_nifti(mask * 200, volume.affine, tmp_path / "many.nii")
    assert nibabel.load(tmp_path / "many.nii").get_data_dtype() == np.uint16


# --- DICOM SEG --------------------------------------------------------------------------------------------------------


@pytest.fixture
def real(shared_data: Callable[[str], Path], tmp_path: Path) -> tuple[Path, Volume]:
    """The folder of highdicom's own segmentations, and the three slices of the real CT they were drawn on."""
    robust = shared_data("dicom_robustness")
    for name in ("17136", "17166", "17196"):
        shutil.copy(robust / "pydicom" / "dicomdirtests" / "77654033" / "CT2" / name, tmp_path)
    return robust / "highdicom", read_volume(tmp_path)


def by_highdicom(file: Path, volume: Volume, files: list[Path], segment: int) -> np.ndarray:
    """One segment as highdicom finds it for each slice."""
    uids = [pydicom.dcmread(one, stop_before_pixels=True).SOPInstanceUID for one in files]
    found: np.ndarray = highdicom.seg.segread(file).get_pixels_by_source_instance(
        uids, segment_numbers=[segment], assert_missing_frames_are_empty=True
    )
    assert found.shape == (*volume.values.shape, 1)
    return found[..., 0]


def test_real_segmentations_as_highdicom_reads_them(real: tuple[Path, Volume], tmp_path: Path) -> None:
    folder, volume = real
    files, shape = source_files(tmp_path), volume.values.shape
    names = {"first segment": "bone"}
    for name in ("seg_image_ct_binary.dcm", "seg_image_ct_binary_fractional.dcm"):
        mask = read_mask(folder / name, shape, ["bone"], names, like=volume)
        assert np.array_equal(mask, by_highdicom(folder / name, volume, files, 1) > 0)
        assert mask.sum() == 638
    soft = folder / "seg_image_ct_true_fractional.dcm"  # values of 64/255 and 128/255
    wanted = by_highdicom(soft, volume, files, 1) >= 0.5
    assert np.array_equal(read_mask(soft, shape, ["bone"], names, like=volume), wanted)
    assert wanted.sum() > 0
    binary, says = (
        folder / "seg_image_ct_binary.dcm",
        "segment 'first segment' is not a class of the job (liver, spleen",
    )
    assert code(lambda: organs(binary, shape, like=volume), binary, says) == "unknown-class"
    with pytest.raises(SiteRefusal, match=r"makes it 'livre', which is not a class of the job \(liver, spleen"):
        organs(binary, shape, like=volume, label_map={"first segment": "livre"})
    with pytest.raises(ValueError, match="like"):
        read_mask(soft, shape, ["bone"], names)


def test_overlapping_segments_objects_and_what_the_volume_lacks(real: tuple[Path, Volume], tmp_path: Path) -> None:
    folder, volume = real
    file, shape = folder / "seg_image_ct_binary_overlap.dcm", volume.values.shape
    names = {"first segment": "spleen", "second segment": "liver"}
    # The file has a frame on a fourth slice, far below the three.
    assert code(lambda: organs(file, shape, label_map=names, like=volume), file, "outside") == "mask-position"
    ds = pydicom.dcmread(file)
    kept = [i for i, g in enumerate(ds.PerFrameFunctionalGroupsSequence)
            if g.PlanePositionSequence[0].ImagePositionPatient[2] > 0]  # fmt: skip
    pixels = ds.pixel_array[kept]
    ds.PerFrameFunctionalGroupsSequence = [ds.PerFrameFunctionalGroupsSequence[i] for i in kept[::-1]]
    ds.NumberOfFrames, ds.PixelData = len(kept), np.packbits(pixels[::-1].ravel(), bitorder="little").tobytes()
    ds.save_as(tmp_path / "three.seg")
    files = [file for file in source_files(tmp_path) if file.suffix != ".seg"]
    first, second = (by_highdicom(file, volume, files, segment) > 0 for segment in (1, 2))
    assert (first & second).any()
    mask = organs(tmp_path / "three.seg", shape, label_map=names, like=volume)
    assert np.array_equal(mask, np.where(second, 1, np.where(first, 2, 0)))
    only = organs(
        tmp_path / "three.seg", shape, label_map={"first segment": "lesion", "second segment": ""}, like=volume
    )
    assert np.array_equal(only, first * 3)
    objects = read_mask(tmp_path / "three.seg", shape, ["thing"], {}, instances=True, like=volume)
    assert np.array_equal(objects, np.where(second, 2, np.where(first, 1, 0)))


def test_a_segmentation_by_another_program_on_a_nifti(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    """liver.dcm, by dcmqi, in frames sorted from below; its CT is not at hand, so a NIfTI stands in its place."""
    file = shared_data("dicom_robustness") / "pydicom-data" / "liver.dcm"
    found = highdicom.seg.segread(file).get_volume()  # from above
    image = sitk.GetImageFromArray(np.zeros((5, 512, 512), np.int16))
    image.SetSpacing((0.810547, 0.810547, 1.0))
    image.SetOrigin((-235.2, -226.8, -129.69))
    sitk.WriteImage(image, str(tmp_path / "ct.nii.gz"))
    volume = read_volume(tmp_path / "ct.nii.gz")
    mask = read_mask(file, (5, 512, 512), ["liver"], {"Liver": "liver"}, like=volume)
    assert np.array_equal(mask[1:4], found.array[::-1, :, :, 0])
    assert mask.sum() == 36233 + 35645 + 35220
    assert not mask[[0, 4]].any()


def test_segmentations_of_single_pictures(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    robust = shared_data("dicom_robustness")
    seg, radiograph = (
        robust / "highdicom" / "seg_image_cr_binary.dcm",
        robust / "pydicom/dicomdirtests/77654033/CR1/6154",
    )
    wanted = highdicom.seg.segread(seg).pixel_array
    names = {"first segment": "x"}
    for image in (radiograph, None, Path(__file__)):
        assert np.array_equal(read_mask(seg, (16, 16), ["x"], names, image=image), wanted)
    other = robust / "pydicom/dicomdirtests/77654033/CR2/6247"
    assert code(lambda: read_mask(seg, (16, 16), ["x"], names, image=other), seg, other) == "mask-position"
    assert code(lambda: read_mask(seg, (16, 17), ["x"], names, image=radiograph), "16") == "mask-size"
    # One slice of a series: its own frame of three; without the slice's name it is anyone's.
    three = robust / "highdicom" / "seg_image_ct_binary.dcm"
    middle = robust / "pydicom/dicomdirtests/77654033/CT2/17166"
    uid = pydicom.dcmread(middle).SOPInstanceUID
    found = highdicom.seg.segread(three).get_pixels_by_source_instance([uid], segment_numbers=[1])[0, ..., 0]
    assert np.array_equal(read_mask(three, (16, 16), ["x"], names, image=middle), found)
    assert found.any()
    assert code(lambda: read_mask(three, (16, 16), ["x"], names), three, "several") == "mask-position"
    lower = robust / "pydicom/dicomdirtests/77654033/CT2/17106"  # of the series, and nothing is marked on it
    assert not read_mask(three, (16, 16), ["x"], names, image=lower).any()


def test_a_label_map_segmentation(tmp_path: Path) -> None:
    """The newer kind (PS3.3 A.90), by highdicom."""
    files = write_series(tmp_path / "s", phantom())
    volume = read_volume(tmp_path / "s")
    values = np.random.default_rng(1).integers(0, 4, volume.values.shape).astype(np.uint8)
    write_segmentation(values, ORGANS, files, tmp_path / "binary.dcm")
    ds = highdicom.seg.segread(tmp_path / "binary.dcm")
    sources = [pydicom.dcmread(file) for file in files]
    for source in sources:
        source.SliceThickness = 2.5
    seg = highdicom.seg.Segmentation(
        sources, values, "LABELMAP",
        [ds.get_segment_description(number) for number in (1, 2, 3)],
        "1.2.9", 1, "1.2.9.1", 1, "maker", "model", "1", "1",
    )  # fmt: skip
    seg.save_as(tmp_path / "labelmap.dcm")
    for name in ("binary.dcm", "labelmap.dcm"):
        assert np.array_equal(organs(tmp_path / name, values.shape, like=volume), values)
        turned = organs(tmp_path / name, values.shape, like=volume, label_map={"liver": "lesion", "lesion": ""})
        assert np.array_equal(turned, np.array([0, 3, 2, 0])[values])


@pytest.mark.parametrize("direction", DIRECTIONS.values(), ids=DIRECTIONS)
def test_a_segmentation_we_write_is_read_by_highdicom_and_lies_right(tmp_path: Path, direction: list[float]) -> None:
    files = write_series(tmp_path / "s", phantom(direction))
    for file in files:
        change(file, SpacingBetweenSlices=1.0)  # it is 2.5 by the positions; ITK writes such headers at times
    volume = read_volume(tmp_path / "s")
    mask = np.random.default_rng(2).integers(0, 4, volume.values.shape)
    mask[2] = 0  # an empty slice is left out of the file
    out = tmp_path / "seg.dcm"
    write_segmentation(mask, ORGANS, files[::-1], out)
    seg = highdicom.seg.segread(out)
    assert [seg.get_segment_description(k).segment_label for k in (1, 2, 3)] == list(ORGANS)
    kinds = [seg.get_segment_description(k).segmented_property_type.meaning for k in (1, 2, 3)]
    assert kinds == ["Liver", "Spleen", "Lesion"]
    assert (seg.PatientID, seg.StudyInstanceUID, seg.FrameOfReferenceUID) == ("p-1", "1.2.3", "1.2.3.99")
    found = seg.get_volume(combine_segments=True, allow_missing_positions=True)
    for place in np.argwhere(found.array > 0)[::17]:
        point = (found.affine @ (*place, 1))[:3] * [-1, -1, 1]
        index = np.rint(np.linalg.inv(volume.affine) @ (*point, 1))[:3].astype(int)
        assert mask[tuple(index)] == found.array[tuple(place)]
    assert (found.array > 0).sum() == (mask > 0).sum()
    assert np.array_equal(organs(out, mask.shape, like=volume), mask)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "s", out]


def test_a_segmentation_of_one_picture_and_of_many_frames(tmp_path: Path) -> None:
    image = phantom(ROTATED)
    enhanced(tmp_path / "e.dcm", image, [3, 0, 5, 1, 4, 2])
    volume = read_volume(tmp_path / "e.dcm")
    mask = np.random.default_rng(4).integers(0, 3, volume.values.shape)
    write_segmentation(mask, ORGANS, [tmp_path / "e.dcm"], tmp_path / "seg.dcm")
    assert np.array_equal(organs(tmp_path / "seg.dcm", mask.shape, like=volume), mask)
    frames = highdicom.seg.segread(tmp_path / "seg.dcm").get_pixels_by_source_frame(
        "1.2.3.4.5", [1, 2, 3, 4, 5, 6], combine_segments=True
    )
    assert set(np.unique(frames)) == {0, 1, 2}
    files = write_series(tmp_path / "s", phantom())
    flat = np.random.default_rng(5).integers(0, 4, (9, 8))
    write_segmentation(flat, ORGANS, files[2:3], tmp_path / "flat.dcm")
    assert np.array_equal(organs(tmp_path / "flat.dcm", (9, 8), image=files[2]), flat)
    with pytest.raises(ValueError, match="for 6 slices"):
        write_segmentation(mask[:5], ORGANS, [tmp_path / "e.dcm"], tmp_path / "x.dcm")
    with pytest.raises(ValueError, match="9 x 8"):
        write_segmentation(flat.T, ORGANS, files[:1], tmp_path / "x.dcm")
    write_segmentation(mask * 0, ["unheard of"], [tmp_path / "e.dcm"], tmp_path / "none.dcm")
    assert not read_mask(tmp_path / "none.dcm", mask.shape, ["unheard of"], {}, like=volume).any()


def test_a_segmentation_of_another_patient_or_place_is_refused(tmp_path: Path) -> None:
    files = write_series(tmp_path / "s", phantom())
    volume = read_volume(tmp_path / "s")
    shape = volume.values.shape
    write_segmentation(np.ones(shape, np.uint8), ["liver"], files, tmp_path / "seg.dcm")
    elsewhere = volume._replace(reference="1.2.3.98")
    assert code(lambda: organs(tmp_path / "seg.dcm", shape, like=elsewhere), "seg.dcm", "reference") == "mask-position"
    aside = volume._replace(affine=volume.affine + np.array([[0, 0, 0, 0.3]] + [[0] * 4] * 3))
    assert code(lambda: organs(tmp_path / "seg.dcm", shape, like=aside), "between") == "mask-position"
    short = volume._replace(values=volume.values[:5])
    assert code(lambda: organs(tmp_path / "seg.dcm", (5, 9, 8), like=short), "outside") == "mask-position"
    (tmp_path / "cut.dcm").write_bytes((tmp_path / "seg.dcm").read_bytes()[:-9])
    assert code(lambda: organs(tmp_path / "cut.dcm", shape, like=volume), "cut.dcm") == "truncated"
    (tmp_path / "alone").mkdir()
    shutil.copy(tmp_path / "seg.dcm", tmp_path / "alone")
    assert organs(tmp_path / "alone", shape, like=volume).all()


def test_a_mask_as_a_series(tmp_path: Path) -> None:
    """Some programs export label maps as CT slices."""
    image = labels(ROTATED)
    write_series(tmp_path / "s", phantom(ROTATED))
    write_series(tmp_path / "m", sitk.Cast(image, sitk.sitkInt16), "1.2.3.5", intercept=0)
    volume = read_volume(tmp_path / "s")
    wanted = sitk.GetArrayFromImage(sitk.DICOMOrient(image, "LPS"))
    assert np.array_equal(organs(tmp_path / "m", volume.values.shape, like=volume), wanted)


@pytest.mark.skipif(shutil.which("dcmdump") is None, reason="dcmtk is not installed here (apt: dcmtk)")
def test_dcmtk_reads_the_segmentation_we_write(tmp_path: Path) -> None:
    files = write_series(tmp_path / "s", phantom())
    volume = read_volume(tmp_path / "s")
    mask = np.random.default_rng(2).integers(0, 4, volume.values.shape)
    write_segmentation(mask, ORGANS, files, tmp_path / "seg.dcm")
    done = subprocess.run(
        ["dcmdump", "-q", "+P", "SegmentLabel", "+P", "SOPClassUID", "+P", "NumberOfFrames", tmp_path / "seg.dcm"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert all(f"[{name}]" in done.stdout for name in ORGANS)
    assert "=SegmentationStorage" in done.stdout
    assert "[18]" in done.stdout
    subprocess.run(["dcmconv", "+ti", tmp_path / "seg.dcm", tmp_path / "i.dcm"], check=True, capture_output=True)
    subprocess.run(["dcmconv", "+td", tmp_path / "seg.dcm", tmp_path / "d.dcm"], check=True, capture_output=True)
    for name in ("i.dcm", "d.dcm"):
        assert np.array_equal(organs(tmp_path / name, mask.shape, like=volume), mask)


def test_damaged_files_raise_nothing_else_and_print_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    files = write_series(tmp_path / "s", phantom())
    volume = read_volume(tmp_path / "s")
    mask = np.random.default_rng(2).integers(0, 4, volume.values.shape)
    write_segmentation(mask, ORGANS, files, tmp_path / "a.dcm")
    write_nifti(mask, volume.affine, tmp_path / "a.nii")
    write_nifti(mask, volume.affine, tmp_path / "a.nii.gz")
    tifffile.imwrite(tmp_path / "a.tif", mask[0].astype(np.uint16), compression="zlib")
    rng = np.random.default_rng(0)
    codes, words = set(), []
    for name in ("a.dcm", "a.nii", "a.nii.gz", "a.tif"):
        shape = mask.shape[1:] if name == "a.tif" else mask.shape
        whole = (tmp_path / name).read_bytes()
        for _ in range(60):
            data = bytearray(whole)
            for _ in range(rng.integers(1, 6)):
                data[rng.integers(min(len(data), 400))] = rng.integers(256)
            broken = tmp_path / f"broken{name[1:]}"
            broken.write_bytes(data)
            try:
                organs(broken, shape, like=volume)
            except UnreadableImage as error:
                codes.add(error.code)
                words.append(error.detail)
            except SiteRefusal as refusal:
                words.append(str(refusal))
    assert codes > {"corrupt", "truncated"}
    assert all(str(tmp_path / "broken.") in word for word in words)
    assert capfd.readouterr() == ("", "")

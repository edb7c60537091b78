"""shared.imaging.dicom against pydicom and SimpleITK on 279 odd real files."""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from shared.imaging.dicom import dicom_frame_count, read_dicom
from shared.imaging.errors import UnreadableImage
from tests.shared.imaging.dicom_files import (
    EXACT,
    LEVEL,
    is_sound,
    outcome,
)

# --- real files -------------------------------------------------------------------------------------------------------

Finder = Callable[[str], Path]


def listed(folder: Path) -> list[Path]:
    with open(folder / "manifest.csv", newline="") as file:
        return [folder / row["file"] for row in csv.DictReader(file)]


def test_every_odd_file_reads_or_says_why(shared_data: Finder, capfd: pytest.CaptureFixture[str]) -> None:
    """The oracle is pydicom itself, with every plug-in installed here: what it decodes, we decode."""
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
    paths = listed(shared_data("dicom_robustness"))
    assert len(paths) == 279
    decoded = 0
    for path in paths:
        found = outcome(path)
        assert is_sound(found), path.name
        if isinstance(found, UnreadableImage):
            with pytest.raises(Exception):  # noqa: B017 - whatever it raises
                pydicom.pixels.pixel_array(pydicom.dcmread(path))
        else:
            decoded += 1
    assert decoded >= 178


#: Names in the folder whose other reading is not to be compared, and why.
NOT_COMPARED = {
    "JLSL_08_07_0_1F.dcm": "GDCM does not open JPEG-LS of 7 bits",
    "liver_j2k.dcm": "GDCM does not open 1-bit JPEG 2000",
    "liver_nonbyte_aligned_j2k.dcm": "GDCM does not open 1-bit JPEG 2000",
    "liver_nonbyte_aligned.dcm": "GDCM starts every frame at a whole byte; see test_twins",
    "mlut_18.dcm": "GDCM leaves out the Modality LUT; see test_twins",
    "SC_rgb_rle_16bit.dcm": "GDCM mixes up planes of 16 bits; see test_twins",
    "SC_rgb_rle_16bit_2frame.dcm": "as above",
    "SC_rgb_rle_32bit.dcm": "as above",
    "SC_rgb_rle_32bit_2frame.dcm": "as above",
    "rtdose_expb.dcm": "GDCM swaps 32-bit big endian by words of 16; see test_twins",
    "rtdose_1frame.dcm": "GDCM does not open it",
    "rtdose_expb_1frame.dcm": "GDCM does not open it",
    "rtdose_rle_1frame.dcm": "GDCM does not open it",
    "parametric_map_float.dcm": "GDCM does not read Float Pixel Data",
    "parametric_map_double_float.dcm": "GDCM does not read Double Float Pixel Data",
}
NOT_COMPARED |= dict.fromkeys(
    [f"seg_image_sm_{name}.dcm" for name in ("control", "dots", "dots_tiled_full", "numbers")]
    + [f"seg_image_sm_control_labelmap{end}.dcm" for end in ("", "_palette_color")],
    "GDCM does not open tiled segmentations",
)


def other_reading(path: Path) -> np.ndarray:
    """The file by SimpleITK: (frames, rows, columns (, 3)), rescaled."""
    import SimpleITK as sitk

    sitk.ProcessObject.GlobalWarningDisplayOff()
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    array = sitk.GetArrayFromImage(reader.Execute()).astype(np.float64)
    return array if array.ndim - (reader.GetNumberOfComponents() > 1) == 3 else array[None]


def shown(values: np.ndarray, ds: Dataset) -> np.ndarray:
    """Grey values of SimpleITK as a picture: PS3.3 C.11.2, written again without shared.imaging."""
    if ds.BitsStored == 1:
        return values / 255  # SimpleITK has 255 for a set bit
    slope, intercept = float(ds.get("RescaleSlope", 1)), float(ds.get("RescaleIntercept", 0))
    if ds.PhotometricInterpretation == "MONOCHROME1":  # SimpleITK has inverted the stored values: back
        values = slope * (2**ds.BitsStored - 1) + intercept - (values - intercept)
    padded = np.zeros(values.shape, bool)
    if "PixelPaddingValue" in ds:
        padded = np.isclose(values, ds.PixelPaddingValue * slope + intercept)
    if "VOILUTSequence" in ds:
        entries, first, bits = ds.VOILUTSequence[0].LUTDescriptor
        table = np.asarray(ds.VOILUTSequence[0].LUTData)
        grey = table[np.clip(values - first, 0, entries - 1).astype(int)] / (2**bits - 1)
    elif "WindowWidth" in ds:
        first_of = lambda v: float(v[0] if isinstance(v, pydicom.multival.MultiValue) else v)  # noqa: E731
        c, w = first_of(ds.WindowCenter), first_of(ds.WindowWidth)
        grey = np.clip((values - (c - 0.5)) / (w - 1) + 0.5, 0, 1)
    else:
        inside = values[~padded] if not padded.all() else np.zeros(1)
        spread = inside.max() - inside.min()
        grey = (values - inside.min()) / spread if spread else np.zeros(values.shape)
    grey = 1 - grey if ds.PhotometricInterpretation == "MONOCHROME1" else grey
    return np.where(padded, 0, np.clip(grey, 0, 1))


def test_pictures_agree_with_simpleitk(shared_data: Finder) -> None:
    pytest.importorskip("SimpleITK")
    compared = 0
    for path in listed(shared_data("dicom_robustness")):
        try:
            frames = dicom_frame_count(path)
            ours = {index: read_dicom(path, index) for index in {0, frames // 2, frames - 1}}
        except UnreadableImage:
            continue
        if path.name in NOT_COMPARED:
            continue
        theirs = other_reading(path)
        assert len(theirs) == frames, path.name
        ds = pydicom.dcmread(path, stop_before_pixels=True)
        for index, picture in ours.items():
            if picture.ndim == 3:
                wanted = theirs[index] / (2**ds.BitsStored - 1)
            else:
                wanted = shown(theirs[index], ds)
            assert np.abs(picture - wanted).max() <= LEVEL + EXACT, (path.name, index)
        compared += 1
    assert compared >= 178 - len(NOT_COMPARED)


TWINS = [
    ("pydicom/SC_rgb_rle_16bit.dcm", "pydicom-data/SC_rgb_16bit.dcm", 0),
    ("pydicom/SC_rgb_rle_16bit_2frame.dcm", "pydicom-data/SC_rgb_16bit_2frame.dcm", 0),
    ("pydicom/SC_rgb_rle_32bit.dcm", "pydicom-data/SC_rgb_32bit.dcm", 0),
    ("pydicom/SC_rgb_rle_32bit_2frame.dcm", "pydicom-data/SC_rgb_32bit_2frame.dcm", 0),
    ("pydicom-data/SC_rgb_expb_16bit.dcm", "pydicom-data/SC_rgb_16bit.dcm", 0),
    ("pydicom/rtdose_expb.dcm", "pydicom/rtdose.dcm", 0),
    ("pydicom/rtdose_rle.dcm", "pydicom/rtdose.dcm", 0),
    ("pydicom/rtdose_expb_1frame.dcm", "pydicom/rtdose_1frame.dcm", 0),
    ("pydicom/rtdose_rle_1frame.dcm", "pydicom/rtdose_1frame.dcm", 0),
    ("pydicom-data/liver_expb.dcm", "pydicom-data/liver.dcm", 0),
    ("pydicom-data/liver_j2k.dcm", "pydicom-data/liver.dcm", 0),
    ("pydicom-data/liver_nonbyte_aligned_j2k.dcm", "pydicom-data/liver_nonbyte_aligned.dcm", 0),
    ("pydicom-data/OBXXXX1A_expb.dcm", "pydicom-data/OBXXXX1A.dcm", 0),
    ("pydicom-data/OBXXXX1A_rle.dcm", "pydicom-data/OBXXXX1A.dcm", 0),
    ("pydicom-data/emri_small_jpeg_ls_lossless.dcm", "pydicom-data/emri_small.dcm", 0),
    ("pydicom-data/emri_small_jpeg_2k_lossless.dcm", "pydicom-data/emri_small.dcm", 0),
    ("pydicom-data/emri_small_big_endian.dcm", "pydicom-data/emri_small.dcm", 0),
    ("highdicom/sm_image_jpegls_nobot.dcm", "highdicom/sm_image_jpegls.dcm", 0),
    # One test chart, hidden behind a Modality LUT in one file and a VOI LUT in the other.
    ("pydicom-data/mlut_18.dcm", "pydicom-data/vlut_04.dcm", 1),
]


@pytest.mark.parametrize(("one", "other", "levels"), TWINS, ids=[Path(one).stem for one, _, _ in TWINS])
def test_twins(shared_data: Finder, one: str, other: str, levels: int) -> None:
    folder = shared_data("dicom_robustness")
    frames = dicom_frame_count(folder / one)
    assert frames == dicom_frame_count(folder / other)
    spread = 0.0
    for index in range(frames):
        a, b = read_dicom(folder / one, index), read_dicom(folder / other, index)
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= levels * LEVEL + EXACT
        spread = max(spread, float(a.max() - a.min()))
    assert spread > 0  # a picture, not nothing twice

"""shared.imaging.dicom against closed forms of PS3.3: rescale, windows, tables, padding, what is stored where."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    RLELossless,
)

from shared.imaging.dicom import read_dicom
from tests.shared.imaging.dicom_files import (
    COMPRESSED,
    EXACT,
    NATIVE,
    each,
    header,
    linear,
    linear_exact,
    lut,
    sample,
    save,
    sigmoid,
    write,
)


@pytest.mark.parametrize("syntax", NATIVE + COMPRESSED, ids=lambda uid: uid.name)
@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_display_is_the_closed_form(tmp_path: Path, syntax: str, signed: bool, bits: int) -> None:
    stored = sample(bits, signed)
    low, high = float(stored.min()), float(stored.max())
    slope, intercept = 0.5, -1024.0
    values = stored * slope + intercept
    centre, width = slope * (low + high) / 2 + intercept, slope * (high - low) / 3
    entries = [int(65535 * (1 - k / 99) ** 2) for k in range(100)]  # falls: a table may
    first = int(values.mean()) - 50
    expected = {
        "none": (values - values.min()) / (values.max() - values.min()),
        "window": each(lambda x: linear(x, centre, width), values),
        "lut": each(lambda x: entries[min(max(round(x) - first, 0), 99)] / 65535, values),
    }
    for photometric, voi in itertools.product(("MONOCHROME1", "MONOCHROME2"), expected):
        ds = header(syntax, stored)
        ds.BitsStored, ds.HighBit = bits, bits - 1
        ds.PhotometricInterpretation = photometric
        ds.RescaleSlope, ds.RescaleIntercept = str(slope), str(intercept)
        if voi == "window":
            ds.WindowCenter, ds.WindowWidth = pydicom.valuerep.DSfloat(centre), f"{width:.10g}"
        if voi == "lut":
            ds.VOILUTSequence = lut(entries, first, 16)
        picture = read_dicom(save(tmp_path / "a.dcm", ds, stored, syntax))
        assert picture.dtype == np.float32
        assert picture.shape == stored.shape
        wanted = expected[voi] if photometric == "MONOCHROME2" else 1 - expected[voi]
        assert np.abs(picture - wanted).max() < 1e-5, (photometric, voi)


# --- rescale, window, tables ------------------------------------------------------------------------------------------


def test_a_missing_slope_counts_as_one(tmp_path: Path) -> None:
    stored = np.array([[0, 964, 1024, 1064, 1104, 3000]], np.uint16)  # HU -1024, -60, 0, 40, 80, 1976
    tags = {"RescaleIntercept": -1024, "WindowCenter": 40, "WindowWidth": 80}
    picture = read_dicom(write(tmp_path / "a.dcm", stored, **tags))
    assert np.allclose(picture, each(lambda x: linear(x - 1024, 40, 80), stored), atol=EXACT)
    assert 0.4 < picture[0, 3] < 0.6
    assert np.array_equal(picture, read_dicom(write(tmp_path / "b.dcm", stored, RescaleSlope=1, **tags)))
    assert np.array_equal(picture, read_dicom(write(tmp_path / "c.dcm", stored, RescaleSlope=0, **tags)))


@pytest.mark.parametrize(("centre", "width"), [(100, 50), (100, 1), (100.5, 1), (2, 2), (-20, 300.5), (127, 1e6)])
@pytest.mark.parametrize("function", [None, "LINEAR", "LINEAR_EXACT", "SIGMOID", "sigmoid", "ODD"])
def test_window_functions(tmp_path: Path, centre: float, width: float, function: str | None) -> None:
    stored = np.arange(256, dtype=np.uint8).reshape(16, 16)
    tags: dict[str, Any] = {"WindowCenter": [centre, 9], "WindowWidth": [width, 7]}  # the first of two is taken
    if function:
        tags["VOILUTFunction"] = function
    formula = {"LINEAR_EXACT": linear_exact, "SIGMOID": sigmoid, "sigmoid": sigmoid}.get(function or "", linear)
    picture = read_dicom(write(tmp_path / "a.dcm", stored, **tags))
    assert np.allclose(picture, each(lambda x: formula(x, centre, width), stored), atol=EXACT)


def test_width_below_one_is_exact_and_width_zero_is_no_window(tmp_path: Path) -> None:
    stored = np.arange(256, dtype=np.uint8).reshape(16, 16)
    tags = {"RescaleSlope": 0.01, "RescaleIntercept": 0}
    picture = read_dicom(write(tmp_path / "a.dcm", stored, WindowCenter=1, WindowWidth=0.5, **tags))
    assert np.allclose(picture, each(lambda x: linear_exact(x / 100, 1, 0.5), stored), atol=1e-5)
    for width in (0, -4, None):
        picture = read_dicom(write(tmp_path / "b.dcm", stored, WindowCenter=1, WindowWidth=width, **tags))
        assert np.allclose(picture, stored / 255, atol=EXACT)


def test_voi_table_is_clamped_and_its_first_value_may_be_signed(tmp_path: Path) -> None:
    stored = np.array([[0, 1000, 1024, 1025, 1026, 1027, 4000]], np.uint16)  # HU -1024, -24, 0, 1, 2, 3, 2976
    table = lut([10, 100, 200, 1023], 0, 10)
    picture = read_dicom(write(tmp_path / "a.dcm", stored, RescaleIntercept=-1024, VOILUTSequence=table))
    assert np.allclose(picture * 1023, [[10, 10, 10, 100, 200, 1023, 1023]], atol=1e-3)
    wrong_vr = lut([10, 100, 200, 1023], 2**16 - 1024, 10)  # -1024 written as US
    picture = read_dicom(write(tmp_path / "b.dcm", stored, RescaleIntercept=-1024, VOILUTSequence=wrong_vr))
    assert np.allclose(picture * 1023, [[10, 1023, 1023, 1023, 1023, 1023, 1023]], atol=1e-3)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ExplicitVRBigEndian], ids=["little", "big"])
@pytest.mark.parametrize("packed", [False, True])
def test_modality_table_of_8_bits_in_words(tmp_path: Path, syntax: str, packed: bool) -> None:
    entries = [0, 50, 100, 255]
    ds = Dataset()
    ds.add_new("LUTDescriptor", "US", [4, 2, 8])
    words = np.array(entries, np.uint8).view("<u2") if packed else np.array(entries, "<u2")
    ds.add_new("LUTData", "OW", words.astype(">u2" if syntax == ExplicitVRBigEndian else "<u2").tobytes())
    stored = np.array([[0, 2, 3, 4, 5, 250]], np.uint8)
    picture = read_dicom(write(tmp_path / "a.dcm", stored, syntax, ModalityLUTSequence=Sequence([ds])))
    assert np.allclose(picture * 255, [[0, 0, 50, 100, 255, 255]], atol=1e-3)


def test_inversion_is_done_once(tmp_path: Path) -> None:
    stored = np.arange(200, dtype=np.uint8).reshape(10, 20)
    seen = {
        (photometric, shape): read_dicom(
            write(tmp_path / "a.dcm", stored, PhotometricInterpretation=photometric, PresentationLUTShape=shape)
        )
        for photometric in ("MONOCHROME1", "MONOCHROME2")
        for shape in ("IDENTITY", "INVERSE")
    }
    plain = seen["MONOCHROME2", "IDENTITY"]
    assert np.allclose(plain, stored / 199, atol=EXACT)
    for key in (("MONOCHROME1", "INVERSE"), ("MONOCHROME1", "IDENTITY"), ("MONOCHROME2", "INVERSE")):
        assert np.allclose(seen[key], 1 - plain, atol=EXACT), key


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(("vr", "value"), [("SS", -2000), ("US", 2**16 - 2000)])
def test_padding_is_black_and_outside_the_range(tmp_path: Path, photometric: str, vr: str, value: int) -> None:
    stored = np.array([[-2000, -2000, 0, 25, 100]], np.int16)
    ds = header(ExplicitVRLittleEndian, stored)
    ds.PhotometricInterpretation = photometric
    ds.add_new("PixelPaddingValue", vr, value)
    picture = read_dicom(save(tmp_path / "a.dcm", ds, stored))
    wanted = [0, 0, 0, 0.25, 1] if photometric == "MONOCHROME2" else [0, 0, 1, 0.75, 0]
    assert np.allclose(picture, [wanted], atol=EXACT)
    ds.WindowCenter, ds.WindowWidth = 50.5, 101
    assert np.allclose(read_dicom(save(tmp_path / "b.dcm", ds, stored)), [wanted], atol=EXACT)


def test_padding_range_limit(tmp_path: Path) -> None:
    stored = np.array([[0, 1, 2, 3, 13, 23]], np.uint16)
    path = write(tmp_path / "a.dcm", stored, PixelPaddingValue=0, PixelPaddingRangeLimit=2)
    assert np.allclose(read_dicom(path), [[0, 0, 0, 0, 0.5, 1]], atol=EXACT)
    path = write(tmp_path / "b.dcm", stored, PixelPaddingValue=2, PixelPaddingRangeLimit=0)
    assert np.allclose(read_dicom(path), [[0, 0, 0, 0, 0.5, 1]], atol=EXACT)
    assert not read_dicom(write(tmp_path / "c.dcm", stored, PixelPaddingValue=0, PixelPaddingRangeLimit=99)).any()


@pytest.mark.parametrize(("photometric", "wanted"), [("MONOCHROME2", 0), ("MONOCHROME1", 1)])
def test_a_constant_picture(tmp_path: Path, photometric: str, wanted: int) -> None:
    path = write(tmp_path / "a.dcm", np.full((4, 5), 7, np.uint16), PhotometricInterpretation=photometric)
    assert np.array_equal(read_dicom(path), np.full((4, 5), wanted, np.float32))


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless], ids=lambda u: u.name)
@pytest.mark.parametrize("high_bit", [11, 13, 15])
@pytest.mark.parametrize("signed", [False, True])
def test_high_bit_and_what_hides_beside_it(tmp_path: Path, syntax: str, high_bit: int, signed: bool) -> None:
    values = sample(12, signed).astype(np.int64)
    shift = high_bit - 11
    noise = np.random.default_rng(1).integers(0, 2**16, values.shape) & ~(0xFFF << shift)  # overlays, rubbish
    words = ((values & 0xFFF) << shift | noise).astype(np.uint16)
    path = write(tmp_path / "a.dcm", words, syntax, BitsStored=12, HighBit=high_bit, PixelRepresentation=int(signed))
    assert np.allclose(read_dicom(path), (values - values.min()) / 4095, atol=EXACT)


@pytest.mark.parametrize(("keyword", "kind"), [("FloatPixelData", "<f4"), ("DoubleFloatPixelData", "<f8")])
def test_float_pixels(tmp_path: Path, keyword: str, kind: str) -> None:
    values = np.array([[np.nan, np.inf, -np.inf, -99.0, -1.5, 0.0, 0.5]], kind)
    ds = header(ExplicitVRLittleEndian, values)
    del ds.BitsStored, ds.HighBit, ds.PixelRepresentation
    setattr(ds, keyword, values.tobytes())
    setattr(ds, keyword.removesuffix("PixelData") + "PixelPaddingValue", -99.0)
    ds.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    assert np.allclose(read_dicom(tmp_path / "a.dcm"), [[0, 0, 0, 0, 0, 0.75, 1]], atol=EXACT)

"""shared.imaging.dicom against closed forms of PS3.3, against SimpleITK, and against 279 odd real files."""

from __future__ import annotations

import csv
import functools
import itertools
import logging
import math
import multiprocessing
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels.decoders.base import get_decoder
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
)

from shared.imaging import apart, dicom, stored
from shared.imaging.dicom import dicom_frame_count, read_dicom
from shared.imaging.errors import CODES, MAX_PIXELS, UnreadableImage
from shared.imaging.stored import DECODERS

LEVEL = 1 / 255
EXACT = 1e-6
NATIVE = (ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)
COMPRESSED = (RLELossless, JPEGLSLossless, JPEG2000Lossless)


# --- writing files ----------------------------------------------------------------------------------------------------


def header(syntax: str, stored: np.ndarray, frames: int | None = None, samples: int = 1) -> Dataset:
    """A data set of the shape, type and endianness of `stored`, (frames,) rows, columns (, samples)."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = "1.2.3.4"
    ds.PatientName = "Secret^Name"
    ds.Rows, ds.Columns = stored.shape[(frames is not None) :][:2]
    ds.SamplesPerPixel = samples
    ds.PhotometricInterpretation = "MONOCHROME2" if samples == 1 else "RGB"
    if samples > 1:
        ds.PlanarConfiguration = 0
    if frames is not None:
        ds.NumberOfFrames = frames
    ds.BitsAllocated = ds.BitsStored = stored.dtype.itemsize * 8
    ds.HighBit = ds.BitsStored - 1
    ds.PixelRepresentation = int(stored.dtype.kind == "i")
    return ds


def save(path: Path, ds: Dataset, stored: np.ndarray, syntax: str = ExplicitVRLittleEndian) -> Path:
    if syntax in COMPRESSED:
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.PixelData = stored.astype(stored.dtype.newbyteorder("<")).tobytes()
        ds["PixelData"].VR = "OW"
        ds.compress(syntax, encoding_plugin="", generate_instance_uid=False)
    else:
        order = ">" if syntax == ExplicitVRBigEndian else "<"
        data = stored.astype(stored.dtype.newbyteorder(order)).tobytes()
        ds.PixelData = data + b"\0" * (len(data) % 2)
        ds["PixelData"].VR = "OB" if stored.dtype.itemsize == 1 else "OW"
    ds.save_as(path, enforce_file_format=True)
    return path


def write(path: Path, stored: np.ndarray, syntax: str = ExplicitVRLittleEndian, frames: int | None = None, **tags: Any):
    samples = stored.shape[-1] if stored.ndim - (frames is not None) == 3 else 1
    ds = header(syntax, stored, frames, samples)
    for name, value in tags.items():
        setattr(ds, name, value)
    return save(path, ds, stored, syntax)


def item(**tags: Any) -> Dataset:
    ds = Dataset()
    for name, value in tags.items():
        setattr(ds, name, value)
    return ds


def lut(entries: list[int], first: int, bits: int) -> Sequence:
    ds = Dataset()
    ds.add_new("LUTDescriptor", "US" if first >= 0 else "SS", [len(entries), first, bits])
    ds.add_new("LUTData", "US", entries)
    return Sequence([ds])


def outcome(path: Path) -> np.ndarray | UnreadableImage:
    """The picture or the exception; any other exception is the test's failure."""
    try:
        return read_dicom(path)
    except UnreadableImage as error:
        return error


def is_sound(found: np.ndarray | UnreadableImage) -> bool:
    """Whether it keeps what the reader promises: a picture in [0, 1], or a code and nothing else."""
    if isinstance(found, UnreadableImage):
        return found.code in CODES and str(found) == found.code
    shaped = found.dtype == np.float32 and found.ndim in (2, 3) and found.shape[2:] in ((), (3,))
    return shaped and bool(np.isfinite(found).all()) and found.min() >= 0 and found.max() <= 1


def code(path: Path, frame: int | str = "middle") -> str:
    with pytest.raises(UnreadableImage) as caught:
        read_dicom(path, frame)
    assert caught.value.code in CODES
    return caught.value.code


# --- the closed form --------------------------------------------------------------------------------------------------


def linear(x: float, c: float, w: float) -> float:
    """PS3.3 C.11.2.1.2.1, the pseudo-code with ymin 0 and ymax 1."""
    if x <= c - 0.5 - (w - 1) / 2:
        return 0.0
    if x > c - 0.5 + (w - 1) / 2:
        return 1.0
    return ((x - (c - 0.5)) / (w - 1) + 0.5) * (1 - 0) + 0


def linear_exact(x: float, c: float, w: float) -> float:
    """PS3.3 C.11.2.1.3.2."""
    if x <= c - w / 2:
        return 0.0
    if x > c + w / 2:
        return 1.0
    return (x - c) / w + 0.5


def sigmoid(x: float, c: float, w: float) -> float:
    """PS3.3 C.11.2.1.3.1."""
    return 1 / (1 + math.exp(-4 * (x - c) / w))


def each(function: Callable[[float], float], values: np.ndarray) -> np.ndarray:
    return np.array([function(float(v)) for v in values.ravel()]).reshape(values.shape)


def sample(bits: int, signed: bool, shape: tuple[int, ...] = (36, 40), seed: int = 0) -> np.ndarray:
    """Stored values over the whole range of `bits`, both ends among them, in the smallest type that holds them."""
    low = -(2 ** (bits - 1)) if signed else 0
    values = np.random.default_rng(seed).integers(low, low + 2**bits, shape)
    values.flat[:2] = low, low + 2**bits - 1
    return values.astype(f"{'i' if signed else 'u'}{1 if bits <= 8 else 2}")


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


# --- frames -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("syntax", NATIVE + COMPRESSED, ids=lambda uid: uid.name)
def test_frames(tmp_path: Path, syntax: str) -> None:
    stored = sample(12, False, (5, 36, 40))
    for frame in stored:
        frame.flat[:2] = 0, 4095
    path = write(tmp_path / "a.dcm", stored, syntax, frames=5, BitsStored=12, HighBit=11)
    assert dicom_frame_count(path) == 5
    for asked, index in ((0, 0), (1, 1), (4, 4), ("3", 3), ("middle", 2)):
        assert np.allclose(read_dicom(path, asked), stored[index] / 4095, atol=EXACT)
    for asked in (5, -1, "last", "-1"):
        assert code(path, asked) == "frame-out-of-range"


def test_only_the_asked_frame_is_decoded(tmp_path: Path) -> None:
    good = np.add.outer(np.arange(40), np.arange(40)).astype(np.uint8)
    ds = header(JPEG2000Lossless, good)
    save(tmp_path / "one.dcm", ds, good, JPEG2000Lossless)
    frame = next(pydicom.encaps.generate_frames(ds.PixelData, number_of_frames=1))
    ds.NumberOfFrames = 3
    ds.PixelData = encapsulate([b"rubbish!", frame, b"rubbish!"])
    ds.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    assert np.allclose(read_dicom(tmp_path / "a.dcm", 1), good / 78, atol=EXACT)
    assert code(tmp_path / "a.dcm", 0) == "corrupt"


def test_functional_groups(tmp_path: Path) -> None:
    stored = np.stack([np.arange(100).reshape(10, 10)] * 3).astype(np.uint16)

    def group(slope: float | None, window: tuple[float, float] | None) -> Dataset:
        ds = Dataset()
        if slope is not None:
            ds.PixelValueTransformationSequence = Sequence([item(RescaleSlope=slope, RescaleIntercept=-10)])
        if window:
            voi = item(WindowCenter=window[0], WindowWidth=window[1], VOILUTFunction="LINEAR_EXACT")
            ds.FrameVOILUTSequence = Sequence([voi])
        return ds

    path = write(
        tmp_path / "a.dcm",
        stored,
        frames=3,
        PerFrameFunctionalGroupsSequence=Sequence([group(2, (90, 40)), group(3, None), group(None, (30, 20))]),
        SharedFunctionalGroupsSequence=Sequence([group(0.5, (20, 30))]),
        RescaleSlope=1000,  # in the wrong place for an enhanced file: the groups come first
        RescaleIntercept=0,
    )
    for index, (slope, centre, width) in enumerate(((2, 90, 40), (3, 20, 30), (0.5, 30, 20))):
        wanted = each(lambda x, s=slope, c=centre, w=width: linear_exact(x * s - 10, c, w), stored[index])
        assert np.allclose(read_dicom(path, index), wanted, atol=EXACT), index


@pytest.mark.parametrize("shape", [(3, 8, 8), (5, 3, 5), (4, 7, 7)])
def test_bit_packed_masks(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    mask = np.random.default_rng(3).integers(0, 2, shape).astype(np.uint8)
    mask[0], mask[1] = 0, 1
    ds = header(ExplicitVRLittleEndian, mask, shape[0])
    ds.BitsAllocated = ds.BitsStored = 1
    ds.HighBit = 0
    packed = np.packbits(mask.ravel(), bitorder="little").tobytes()
    ds.PixelData = packed + b"\0" * (len(packed) % 2)
    ds["PixelData"].VR = "OB"
    ds.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    for index in range(shape[0]):
        assert np.array_equal(read_dicom(tmp_path / "a.dcm", index), mask[index])


# --- colour -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("planar", [0, 1])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless], ids=lambda u: u.name)
def test_rgb(tmp_path: Path, bits: int, planar: int, syntax: str) -> None:
    rgb = sample(bits, False, (6, 7, 3))
    ds = header(syntax, rgb, samples=3)
    ds.PlanarConfiguration = 0 if syntax == RLELossless else planar
    ds.WindowCenter, ds.WindowWidth = 3, 2  # colour has no window
    data = np.moveaxis(rgb, -1, 0) if ds.PlanarConfiguration else rgb
    assert np.allclose(read_dicom(save(tmp_path / "a.dcm", ds, data, syntax)), rgb / (2**bits - 1), atol=EXACT)


def test_ybr(tmp_path: Path) -> None:
    rgb = sample(8, False, (6, 8, 3)).astype(np.float64)
    rgb[:, 1::2] = rgb[:, ::2]  # pairs of columns alike, so that 4:2:2 loses nothing
    r, g, b = np.moveaxis(rgb, -1, 0)
    # Forward, PS3.3 C.7.6.3.1.2.
    y = 0.2990 * r + 0.5870 * g + 0.1140 * b
    cb = -0.1687 * r - 0.3313 * g + 0.5000 * b + 128
    cr = 0.5000 * r - 0.4187 * g - 0.0813 * b + 128
    ybr = np.clip(np.rint(np.stack([y, cb, cr], -1)), 0, 255).astype(np.uint8)
    full = read_dicom(write(tmp_path / "a.dcm", ybr, PhotometricInterpretation="YBR_FULL"))
    assert np.abs(full * 255 - rgb).max() < 2  # rounding of Y, Cb and Cr
    ds = header(ExplicitVRLittleEndian, ybr, samples=3)
    ds.PhotometricInterpretation = "YBR_FULL_422"
    pairs = np.stack([ybr[:, ::2, 0], ybr[:, 1::2, 0], ybr[:, ::2, 1], ybr[:, ::2, 2]], -1)
    assert np.allclose(read_dicom(save(tmp_path / "b.dcm", ds, pairs)), full, atol=EXACT)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless], ids=lambda u: u.name)
@pytest.mark.parametrize("bits", [8, 16])
def test_palette(tmp_path: Path, syntax: str, bits: int) -> None:
    tables = np.random.default_rng(5).integers(0, 2**bits, (3, 40))
    tables[:, 0] = 2**bits - 1
    stored = np.arange(60, dtype=np.uint8).reshape(6, 10)
    ds = header(syntax, stored)
    ds.PhotometricInterpretation = "PALETTE COLOR"
    big = syntax == ExplicitVRBigEndian
    for name, table in zip(("Red", "Green", "Blue"), tables, strict=True):
        ds.add_new(f"{name}PaletteColorLookupTableDescriptor", "US", [40, 5, bits])
        words = table.astype(np.uint8).view("<u2") if bits == 8 else table
        ds.add_new(f"{name}PaletteColorLookupTableData", "OW", words.astype(">u2" if big else "<u2").tobytes())
    picture = read_dicom(save(tmp_path / "a.dcm", ds, stored, syntax))
    wanted = tables.T[np.clip(stored.astype(int) - 5, 0, 39)] / (2**bits - 1)
    assert picture.shape == (6, 10, 3)
    assert np.allclose(picture, wanted, atol=EXACT)


def test_segmented_palette(tmp_path: Path) -> None:
    stored = np.arange(8, dtype=np.uint8).reshape(2, 4)
    ds = header(ExplicitVRLittleEndian, stored)
    ds.PhotometricInterpretation = "PALETTE COLOR"
    segments = np.array([0, 2, 0, 1000, 1, 6, 61000], "<u2")  # two entries as they are, six on a line (PS3.3 C.7.9.2)
    for name in ("Red", "Green", "Blue"):
        ds.add_new(f"{name}PaletteColorLookupTableDescriptor", "US", [8, 0, 16])
        ds.add_new(f"Segmented{name}PaletteColorLookupTableData", "OW", segments.tobytes())
    picture = read_dicom(save(tmp_path / "a.dcm", ds, stored))
    wanted = np.array([0, 1000, 11000, 21000, 31000, 41000, 51000, 61000]).reshape(2, 4) / 65535
    assert np.allclose(picture, wanted[..., None], atol=EXACT)


# --- decoders ---------------------------------------------------------------------------------------------------------


def jpeg_dicom(path: Path) -> tuple[Path, np.ndarray]:
    """A JPEG baseline file and its picture as Pillow decodes it."""
    import io

    from PIL import Image

    x = np.add.outer(np.arange(32), np.arange(40)) * 3 + np.random.default_rng(2).integers(0, 40, (32, 40))
    stored = np.clip(x, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(stored).save(buffer, "JPEG", quality=60)
    ds = header(JPEGBaseline8Bit, stored)
    ds.PixelData = encapsulate([buffer.getvalue()])
    ds["PixelData"].VR = "OB"
    ds.save_as(path, enforce_file_format=True)
    return path, np.asarray(Image.open(buffer)).astype(np.float64)


def test_jpeg_is_decoded_by_pillow_whatever_else_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, wanted = jpeg_dicom(tmp_path / "a.dcm")
    wanted = (wanted - wanted.min()) / (wanted.max() - wanted.min())
    assert np.allclose(read_dicom(path), wanted, atol=EXACT)
    # As if pylibjpeg-libjpeg were installed, and decoded differently.
    other = dict(get_decoder(JPEGBaseline8Bit)._available, pylibjpeg=lambda src, runner: bytearray(32 * 40))
    monkeypatch.setattr(get_decoder(JPEGBaseline8Bit), "_available", other)
    assert np.allclose(read_dicom(path), wanted, atol=EXACT)
    monkeypatch.setattr(stored, "call_apart", lambda function, *where: stored._try_apart(*where))
    monkeypatch.setattr(get_decoder(JPEGBaseline8Bit), "_available", {"pylibjpeg": other["pylibjpeg"]})
    assert not read_dicom(path).any()  # and it is used where it is the only one
    monkeypatch.setattr(get_decoder(JPEGBaseline8Bit), "_available", {})
    assert code(path) == "codec-missing"


def test_every_decoder_of_pydicom_has_its_place() -> None:
    from pydicom.pixels.decoders import base

    for uid, (decoder, _) in base._PIXEL_DATA_DECODERS.items():
        if not uid.is_encapsulated:
            continue
        known = set(decoder.available_plugins) | set(decoder._unavailable)
        if known - {"gdcm", "pylibjpeg"}:
            known -= {"gdcm"}  # it may crash, and others do
        assert set(DECODERS[uid]) == known, uid.name
    for uid, order in DECODERS.items():
        if "libjpeg" in str(get_decoder(uid)._unavailable.get("pylibjpeg", "")):
            assert order[-1] == "pylibjpeg"


# --- files that cannot be read ----------------------------------------------------------------------------------------


def test_codes(tmp_path: Path) -> None:
    stored = sample(16, False)
    whole = write(tmp_path / "a.dcm", stored).read_bytes()

    def made(data: bytes) -> Path:
        (tmp_path / "b.dcm").write_bytes(data)
        return tmp_path / "b.dcm"

    assert code(tmp_path / "none.dcm") == "not-found"
    assert code(made(b"")) == "empty-file"
    assert code(made(b"DICM")) == "not-dicom"
    assert code(made(whole[132:])) == "not-dicom"
    assert code(made(whole[:-2])) == "truncated"
    assert code(made(whole[: whole.index(b"\xe0\x7f\x10\0")])) == "no-pixels"
    assert code(write(tmp_path / "c.dcm", stored, Rows=37)) == "truncated"
    assert code(write(tmp_path / "c.dcm", stored, NumberOfFrames=2)) == "truncated"
    assert code(write(tmp_path / "c.dcm", stored, Rows=40000, Columns=40000)) == "too-large"
    for name in ("Rows", "Columns", "SamplesPerPixel"):
        for bits in (1, 16):
            path = write(tmp_path / "c.dcm", stored, **{name: 0, "BitsAllocated": bits, "BitsStored": bits})
            assert code(path) == "corrupt"
    assert MAX_PIXELS < 40000**2
    assert code(write(tmp_path / "c.dcm", stored, PhotometricInterpretation="MONOCHROME2", BitsStored=17)) == "corrupt"
    for syntax in COMPRESSED:
        packed = write(tmp_path / "d.dcm", stored, syntax).read_bytes()
        for cut in (8, 9, 100):
            assert code(made(packed[:-cut])) == "truncated"
    ds = pydicom.dcmread(tmp_path / "d.dcm")
    for uid in ("1.2.840.10008.1.2.4.102", "1.2.3.4.5"):  # MPEG-4, and nothing at all
        ds.file_meta.TransferSyntaxUID = uid
        ds.save_as(tmp_path / "e.dcm", implicit_vr=False, little_endian=True)
        assert code(tmp_path / "e.dcm") == "codec-missing"


def test_a_decoder_that_dies_costs_one_picture(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    """GDCM ends its process on a broken Huffman table; the process that reads must live, and read on."""
    path = shared_data("dicom_robustness") / "pydicom-data/bad_sequence.dcm"
    wanted = read_dicom(path)
    data = bytearray(path.read_bytes())
    data[data.index(b"\xff\xd8\xff") + 33] = 229
    (tmp_path / "a.dcm").write_bytes(data)
    assert code(tmp_path / "a.dcm") == "corrupt"
    assert np.array_equal(read_dicom(path), wanted)


def test_a_helper_that_is_killed_or_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "PATIENCE", 0.5)
    for function in ("os:abort", "time:sleep"):
        with pytest.raises(UnreadableImage) as caught:
            apart.call_apart(function, *([60] if function == "time:sleep" else []))
        assert caught.value.code == "corrupt"
        assert "died" in caught.value.detail
    monkeypatch.setattr(apart, "PATIENCE", 30.0)
    with pytest.raises(UnreadableImage) as caught:
        apart.call_apart("os:stat", "/nowhere/at/all")
    assert caught.value.code == "not-found"


def test_forked_workers_and_threads_do_not_mix_up_answers(tmp_path: Path) -> None:
    """As data loaders read: the helper of the parent must not be used by its children, nor by two threads at once."""
    wanted = []
    for seed in range(6):
        stored = sample(12, False, seed=seed)
        write(tmp_path / f"{seed}.dcm", stored, JPEG2000Lossless, BitsStored=12, HighBit=11)
        wanted.append((stored / 4095).astype(np.float32))
    paths = [tmp_path / f"{seed}.dcm" for seed in range(6)] * 5
    read_dicom(paths[0])  # so that there is a helper to mix up
    with ThreadPoolExecutor(3) as threads, multiprocessing.get_context("fork").Pool(2) as forks:
        in_forks = forks.map_async(read_dicom, paths, chunksize=1)
        for found in (list(threads.map(read_dicom, paths)), in_forks.get(60)):
            assert all(np.allclose(a, wanted[k % 6], atol=EXACT) for k, a in enumerate(found))


def test_a_file_that_may_not_be_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(dicom, "require_bytes", refuse)  # root, as which tests may run, may read anything
    assert code(write(tmp_path / "a.dcm", sample(8, False))) == "not-permitted"


def test_a_folder_is_not_read(tmp_path: Path) -> None:
    assert code(tmp_path) == "unsupported-format"


def test_a_jp2_box_of_length_0_does_not_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pydicom 3.0.2 would walk its boxes for ever."""
    monkeypatch.setattr(apart, "PATIENCE", 3.0)
    ds = header(JPEG2000Lossless, sample(8, False))
    ds.PixelData = encapsulate([b"\0\0\0\x0cjP  \r\n\x87\n" + b"\0" * 40])
    ds["PixelData"].VR = "OB"
    ds.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    assert code(tmp_path / "a.dcm") == "corrupt"


def test_nothing_of_the_header_leaves_with_the_exception(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    ds = header(ExplicitVRLittleEndian, sample(8, False))
    path = save(tmp_path / "Secret.dcm", ds, sample(8, False))
    data = path.read_bytes()
    path.write_bytes(data.replace(b"MONOCHROME2 ", b"Secret^Name "))
    logging.getLogger("pydicom").setLevel(logging.DEBUG)
    with caplog.at_level(logging.DEBUG), pytest.raises(UnreadableImage) as caught:
        read_dicom(path)
    error = caught.value
    assert "Secret" in error.detail  # so that the next lines can fail
    assert str(error) == error.code
    assert error.args == (error.code,)
    assert repr(error).count("Secret") == 0
    assert error.__cause__ is None
    assert error.__context__ is None
    assert pickle.loads(pickle.dumps(error)).code == error.code
    assert "Secret" not in caplog.text
    assert capfd.readouterr() == ("", "")


def test_nothing_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    """pydicom logs what its decoders say, and a log handler may send it on."""
    ds = header(JPEGBaseline8Bit, sample(8, False))
    ds.PixelData = encapsulate([b"Secret^Name"])
    ds["PixelData"].VR = "OB"
    ds.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    logging.getLogger("pydicom").setLevel(logging.DEBUG)
    with caplog.at_level(logging.DEBUG):
        assert code(tmp_path / "a.dcm") == "corrupt"
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


def test_a_traceback_as_the_only_argument_is_kept_out_of_the_message() -> None:
    error = UnreadableImage("Caught UnreadableImage in DataLoader worker process 0.\nTraceback: /home/Secret")
    assert str(error) == "corrupt"
    assert "Secret" in error.detail


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


# --- damaged files ----------------------------------------------------------------------------------------------------


@functools.cache
def samples() -> tuple[bytes, ...]:
    """Small whole files: native with functional groups, palette RLE, JPEG 2000, JPEG-LS, JPEG, deflated."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.dcm"
        voi = item(WindowCenter=100, WindowWidth=50)
        groups = Sequence([item(FrameVOILUTSequence=Sequence([voi])) for _ in range(2)])
        tags: dict[str, Any] = {"PerFrameFunctionalGroupsSequence": groups, "RescaleSlope": 2, "RescaleIntercept": 1}
        made = [write(path, sample(12, True, (2, 8, 9)), frames=2, **tags).read_bytes()]
        table = lut(list(range(0, 1024, 8)), 5, 10)
        for syntax in (*COMPRESSED, DeflatedExplicitVRLittleEndian, ImplicitVRLittleEndian):
            tags = {"VOILUTSequence": table, "BitsStored": 12, "HighBit": 11}
            made.append(write(path, sample(12, False), syntax, **tags).read_bytes())
        made.append(jpeg_dicom(path)[0].read_bytes())
    return tuple(made)


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_files_raise_nothing_else(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    whole = bytearray(data.draw(st.sampled_from(samples())))
    if data.draw(st.booleans()):
        del whole[data.draw(st.integers(0, len(whole))) :]
    if whole:
        for _ in range(data.draw(st.integers(0, 8))):
            whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.dcm"
    path.write_bytes(whole)
    assert is_sound(outcome(path))

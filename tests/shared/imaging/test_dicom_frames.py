"""shared.imaging.dicom: frames of a file, bit-packed masks, colour, each against what was written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
)

from shared.imaging.dicom import dicom_frame_count, read_dicom
from tests.shared.imaging.dicom_files import (
    COMPRESSED,
    EXACT,
    NATIVE,
    code,
    each,
    header,
    item,
    linear_exact,
    sample,
    save,
    write,
)

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

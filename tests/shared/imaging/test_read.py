"""shared.imaging.read against arrays made in the test."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from shared.imaging.read import CODES, UnreadableImage, fit, frame_count, is_image_name, read_image

EXACT = 1e-6


def grey8(height: int = 12, width: int = 17) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width), dtype=np.uint8)


def grey16(low: int = 300, high: int = 4095) -> np.ndarray:
    values = np.random.default_rng(1).integers(low, high + 1, (12, 17)).astype(np.uint16)
    values.flat[:2] = low, high
    return values


def rgb8() -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, (12, 17, 3), dtype=np.uint8)


def stretched(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.float64)
    return (values - values.min()) / (values.max() - values.min())


def saved(path: Path, array: np.ndarray, **options: Any) -> Path:
    Image.fromarray(array).save(path, **options)
    return path


def outcome(path: Path) -> np.ndarray | UnreadableImage:
    """The picture or the exception; any other exception is the test's failure."""
    try:
        return read_image(path)
    except UnreadableImage as error:
        return error


def is_sound(found: np.ndarray | UnreadableImage) -> bool:
    """Whether it keeps what the reader promises: a picture in [0, 1], or a code and nothing else."""
    if isinstance(found, UnreadableImage):
        return found.code in CODES and str(found) == found.code
    shaped = found.dtype == np.float32 and found.ndim in (2, 3) and found.shape[2:] in ((), (3,))
    return shaped and bool(np.isfinite(found).all()) and found.min() >= 0 and found.max() <= 1


def code(path: Path, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(UnreadableImage) as caught:
        read_image(path, *args, **kwargs)
    assert caught.value.code in CODES
    assert str(caught.value) == caught.value.code
    return caught.value.code


# --- raster files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif"])
def test_8_bits_over_255(tmp_path: Path, suffix: str) -> None:
    for array in (grey8(), rgb8()):
        picture = read_image(saved(tmp_path / f"a.{suffix}", array))
        assert picture.dtype == np.float32
        assert picture.shape == array.shape
        assert np.allclose(picture, array / 255, atol=EXACT)


def test_jpeg(tmp_path: Path) -> None:
    smooth = np.add.outer(np.arange(64), np.arange(80)).astype(np.uint8)
    assert np.abs(read_image(saved(tmp_path / "a.jpg", smooth, quality=98)) - smooth / 255).max() < 4 / 255
    colour = np.stack([smooth, smooth[::-1], np.full_like(smooth, 90)], -1)
    path = saved(tmp_path / "b.jpg", colour, quality=98, subsampling=0)
    assert np.abs(read_image(path) - colour / 255).max() < 8 / 255


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_are_stretched(tmp_path: Path, suffix: str) -> None:
    path = saved(tmp_path / f"a.{suffix}", grey16())
    assert np.allclose(read_image(path), stretched(grey16()), atol=EXACT)
    assert not read_image(saved(tmp_path / f"b.{suffix}", np.full((3, 4), 777, np.uint16))).any()


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize(
    "kind", ["uint16", "int16", "uint32", "int32", "float32", "float64", "float16", "rgb", "planar", "alpha"]
)
def test_deep_tiff(tmp_path: Path, kind: str, byteorder: Any) -> None:
    path = tmp_path / "a.tif"
    base = grey16()
    if kind in ("rgb", "planar", "alpha"):
        colour = np.stack([base, base[::-1], base[:, ::-1]], -1)
        if kind == "planar":
            planes = np.moveaxis(colour, -1, 0)
            tifffile.imwrite(path, planes, photometric="rgb", planarconfig="separate", byteorder=byteorder)
        elif kind == "rgb":
            tifffile.imwrite(path, colour, photometric="rgb", byteorder=byteorder)
        else:
            alpha = np.zeros((12, 17, 1), np.uint16)
            alpha[6:] = 65535
            both = np.concatenate([colour, alpha], -1)
            tifffile.imwrite(path, both, photometric="rgb", extrasamples=["unassalpha"], byteorder=byteorder)
        wanted = stretched(colour)
        if kind == "alpha":
            wanted[:6] = 0
    else:
        values = (base / 4095).astype(kind) if "float" in kind else base.astype(kind)
        if kind == "int16":
            values = values - np.int16(2000)
        if kind == "uint32":
            values = values * np.uint32(1000000)
        tifffile.imwrite(path, values, byteorder=byteorder)
        wanted = values if "float" in kind else stretched(values)
    assert np.allclose(read_image(path), wanted, atol=EXACT)


def test_tiff_pages(tmp_path: Path) -> None:
    pages = np.stack([grey8(), 255 - grey8(), grey8() // 2])
    tifffile.imwrite(tmp_path / "a.tif", pages, photometric="minisblack")
    assert frame_count(tmp_path / "a.tif") == 3
    for frame, index in ((0, 0), (1, 1), ("2", 2), ("middle", 1)):
        assert np.allclose(read_image(tmp_path / "a.tif", frame), pages[index] / 255, atol=EXACT)
    assert code(tmp_path / "a.tif", 3) == code(tmp_path / "a.tif", -1) == "frame-out-of-range"
    deep = np.stack([grey16(), grey16()[::-1]])
    tifffile.imwrite(tmp_path / "b.tif", deep, photometric="minisblack")
    assert np.allclose(read_image(tmp_path / "b.tif", 1), stretched(deep[1]), atol=EXACT)
    path = saved(tmp_path / "c.png", grey8())
    assert frame_count(path) == 1
    assert code(path, 1) == "frame-out-of-range"


@pytest.mark.parametrize("values", [grey8(), grey16()], ids=["8", "16"])
def test_tiff_where_white_is_zero(tmp_path: Path, values: np.ndarray) -> None:
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="miniswhite")
    wanted = 1 - (values / 255 if values.dtype == np.uint8 else stretched(values))
    assert np.allclose(read_image(tmp_path / "a.tif"), wanted, atol=EXACT)


def test_tiff_compressions(tmp_path: Path) -> None:
    for compression in ("tiff_lzw", "tiff_deflate", "packbits"):
        path = saved(tmp_path / "a.tif", grey16(), compression=compression)
        assert np.allclose(read_image(path), stretched(grey16()), atol=EXACT)


def test_palette_one_bit_and_cmyk(tmp_path: Path) -> None:
    colours = rgb8()
    indexed = np.arange(204, dtype=np.uint8).reshape(12, 17)
    image = Image.fromarray(indexed)
    image = image.convert("P")
    image.putpalette(colours.tobytes())
    for name in ("a.png", "a.bmp", "a.tif"):
        image.save(tmp_path / name)
        assert np.allclose(read_image(tmp_path / name), colours / 255, atol=EXACT)
    mask = grey8() > 100
    Image.fromarray(mask).save(tmp_path / "b.png")
    assert np.array_equal(read_image(tmp_path / "b.png"), mask.astype(np.float32))
    Image.fromarray(rgb8()).convert("CMYK").save(tmp_path / "c.tif")
    assert np.allclose(read_image(tmp_path / "c.tif"), rgb8() / 255, atol=1.5 / 255)


def test_alpha_is_composited_on_black(tmp_path: Path) -> None:
    alpha = grey8()[..., None]
    for array in (np.concatenate([rgb8(), alpha], -1), np.concatenate([grey8()[::-1, :, None], alpha], -1)):
        picture = read_image(saved(tmp_path / "a.png", array))
        wanted = array[..., :-1] / 255 * alpha / 255
        assert np.allclose(picture, wanted if array.shape[2] == 4 else wanted[..., 0], atol=EXACT)
    key = int(grey8()[0, 0])
    path = saved(tmp_path / "b.png", grey8(), transparency=key)
    assert np.allclose(read_image(path), np.where(grey8() == key, 0, grey8() / 255), atol=EXACT)


#: EXIF orientation: how the stored rows and columns are turned to be upright (TIFF 6.0 page 36, EXIF 2.3 4.6.4 A).
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a.swapaxes(0, 1)[::-1],
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_orientation(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    path = saved(tmp_path / "a.png", grey8(), exif=exif)
    assert np.allclose(read_image(path), UPRIGHT[orientation](grey8()) / 255, atol=EXACT)
    for values in (grey8(), grey16()):
        tifffile.imwrite(tmp_path / "a.tif", values, extratags=[(274, "H", 1, orientation, True)])
        wanted = values / 255 if values.dtype == np.uint8 else stretched(values)
        assert np.allclose(read_image(tmp_path / "a.tif"), UPRIGHT[orientation](wanted), atol=EXACT)
    smooth = np.add.outer(np.arange(48) * 3, np.arange(64)).astype(np.uint8)
    path = saved(tmp_path / "a.jpg", smooth, exif=exif, quality=98)
    assert np.abs(read_image(path) - UPRIGHT[orientation](smooth) / 255).max() < 5 / 255


# --- arrays -----------------------------------------------------------------------------------------------------------


def test_npz(tmp_path: Path) -> None:
    stack = np.random.default_rng(0).integers(0, 256, (7, 28, 28), dtype=np.uint8)
    labels = np.zeros((7, 1), np.uint8)
    path = tmp_path / "a.npz"
    np.savez_compressed(path, train_images=stack, train_labels=labels)
    assert frame_count(path) == frame_count(path, key="train_images") == 7
    assert np.allclose(read_image(path, frame=5, key="train_images"), stack[5] / 255, atol=EXACT)
    assert np.allclose(read_image(path), stack[3] / 255, atol=EXACT)
    assert code(path, 7) == "frame-out-of-range"
    assert code(path, 0, key="nothing") == "no-such-array"
    np.savez(tmp_path / "b.npz", train_images=stack, test_images=255 - stack)
    assert code(tmp_path / "b.npz") == "no-such-array"
    np.savez(tmp_path / "c.npz", other=stack, images=255 - stack, labels=labels)
    assert np.allclose(read_image(tmp_path / "c.npz", 0), 1 - stack[0] / 255, atol=EXACT)


@pytest.mark.parametrize(
    ("shape", "frames", "picture"), [((9, 8), 1, (9, 8)), ((9, 8, 3), 1, (9, 8, 3)), ((5, 9, 8), 5, (9, 8)),
                               ((5, 9, 8, 1), 5, (9, 8)), ((5, 9, 8, 3), 5, (9, 8, 3)), ((5, 3, 9, 8), 5, (9, 8, 3)),
                               ((5, 1, 9, 8), 5, (9, 8))]
)  # fmt: skip
def test_shapes_of_npy(tmp_path: Path, shape: tuple[int, ...], frames: int, picture: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.save(tmp_path / "a.npy", values)
    assert frame_count(tmp_path / "a.npy") == frames
    read = read_image(tmp_path / "a.npy", frames - 1)
    assert read.shape == picture
    last = values[-1] if frames > 1 else values
    if shape[1:2] in ((3,), (1,)):
        last = np.moveaxis(last, 0, -1)
    assert np.allclose(read, last.reshape(picture) / 255, atol=EXACT)


def test_number_types_of_arrays(tmp_path: Path) -> None:
    def read(values: np.ndarray) -> np.ndarray:
        np.save(tmp_path / f"{time.monotonic_ns()}.npy", values)
        return read_image(max(tmp_path.glob("*.npy"), key=lambda p: int(p.stem)))

    inside = np.array([[0.25, 0.5], [0.5, 0.75]])
    assert np.array_equal(read(inside), inside)
    assert np.allclose(read(inside * 8 - 3), [[0, 0.5], [0.5, 1]], atol=EXACT)
    assert np.allclose(read(np.array([[np.nan, -1], [np.inf, 3]])), [[0, 0], [0, 1]], atol=EXACT)
    assert np.array_equal(read(np.array([[True, False]])), [[1, 0]])
    assert np.allclose(read(np.array([[-5, 0, 5]])), [[0, 0.5, 1]], atol=EXACT)
    assert np.array_equal(read(np.array([[1e308, -1e308]])), [[1, 0]])
    assert np.array_equal(read(np.zeros((2, 2), np.float16)), np.zeros((2, 2)))


def test_arrays_that_are_no_pictures(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert code(tmp_path / "a.npy") in ("corrupt", "unsupported-format")
    np.save(tmp_path / "b.npy", np.array([["a", "b"]]))
    assert code(tmp_path / "b.npy") == "unsupported-format"
    np.save(tmp_path / "c.npy", np.arange(5))
    assert code(tmp_path / "c.npy", 0) == "no-pixels"
    np.save(tmp_path / "d.npy", np.zeros((0, 5, 5)))
    assert code(tmp_path / "d.npy") == "frame-out-of-range"
    np.savez(tmp_path / "e.npz", labels=np.zeros((5, 1)))
    assert code(tmp_path / "e.npz") == "no-such-array"


def test_an_archive_is_loaded_once_and_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.npz"
    stack = np.stack([grey8()] * 4)
    np.savez(path, images=stack)
    loads = []
    original = np.load
    monkeypatch.setattr(np, "load", lambda *a, **k: (loads.append(k), original(*a, **k))[1])
    for index in (0, 1, 2, 3):
        read_image(path, index)
    assert loads == [{"allow_pickle": False}]
    np.savez(path, images=255 - stack)
    os.utime(path, ns=(1, 1))
    assert np.allclose(read_image(path, 0), 1 - stack[0] / 255, atol=EXACT)
    assert len(loads) == 2


# --- boxes, kinds, names ----------------------------------------------------------------------------------------------


def test_box(tmp_path: Path) -> None:
    array = grey8(20, 30)
    path = saved(tmp_path / "a.png", array)
    for box, wanted in {
        (2, 3, 10, 5): array[3:8, 2:12],
        (0, 0, 30, 20): array,
        (-5, -5, 10, 10): array[:5, :5],
        (25, 15, 100, 1e9): array[15:, 25:],
        (1.4, 1.6, 3.0, 2.0): array[2:4, 1:4],
    }.items():
        assert np.allclose(read_image(path, box=box), wanted / 255, atol=EXACT), box
    for box in (
        (30, 0, 5, 5),
        (0, 0, 0, 5),
        (0, 0, 5, -1),
        (-9, 0, 9, 9),
        (float("nan"), 0, 1, 1),
        (0, 0, 1, float("inf")),
    ):
        assert code(path, box=box) == "bad-crop", box
    path = saved(tmp_path / "b.png", rgb8())
    assert read_image(path, box=(1, 2, 3, 4)).shape == (4, 3, 3)


def test_kinds_are_told_by_bytes(tmp_path: Path) -> None:
    assert np.allclose(read_image(saved(tmp_path / "a.dcm", grey8(), format="PNG")), grey8() / 255, atol=EXACT)
    (tmp_path / "b.dcm").write_bytes(b"no picture at all" * 20)
    (tmp_path / "b.txt").write_bytes(b"no picture at all" * 20)
    (tmp_path / "c.png").write_bytes(b"")
    assert code(tmp_path / "b.dcm") == "not-dicom"
    assert code(tmp_path / "b.txt") == "unsupported-format"
    assert code(tmp_path / "c.png") == "empty-file"
    assert code(tmp_path / "d.png") == "not-found"
    assert code(tmp_path) == "unsupported-format"
    for name, image in (("e.png", grey8(99, 99)), ("e.jpg", grey8(99, 99)), ("e.tif", grey16()), ("e.bmp", rgb8())):
        data = saved(tmp_path / name, image).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        assert code(tmp_path / name) in ("truncated", "corrupt"), name


def test_too_large(tmp_path: Path) -> None:
    Image.new("1", (20000, 10000)).save(tmp_path / "a.png")
    assert code(tmp_path / "a.png") == "too-large"


def test_dicom_under_any_name(tmp_path: Path) -> None:
    from pydicom.dataset import Dataset, FileMetaDataset

    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"
    ds.SOPClassUID, ds.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", "1.2.3"
    ds.Rows, ds.Columns, ds.NumberOfFrames = 4, 5, 2
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME1"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    stored = np.arange(40, dtype="<u2").reshape(2, 4, 5)
    ds.PixelData = stored.tobytes()
    ds["PixelData"].VR = "OW"
    for name in ("a.dcm", "plain", "1.2.840.5", "a.png"):
        path = tmp_path / name
        ds.save_as(path, enforce_file_format=True)
        assert frame_count(path) == 2
        assert is_image_name(path)
        picture = read_image(path, 1, box=(1, 1, 3, 2))
        assert np.allclose(picture, 1 - (stored[1] - 20)[1:3, 1:4] / 19, atol=EXACT)
    ds.save_as(tmp_path / "a.txt", enforce_file_format=True)
    assert not is_image_name(tmp_path / "a.txt")  # another suffix means another kind of file


def test_is_image_name(tmp_path: Path) -> None:
    for name in ("a.dcm", "a.DICOM", "a.PNG", "a.jpg", "a.jpeg", "a.bmp", "a.tif", "a.TIFF"):
        assert is_image_name(name)
    (tmp_path / "README").write_bytes(b"text" * 100)
    (tmp_path / "short").write_bytes(b"DICM")
    (tmp_path / "folder").mkdir()
    for name in ("README", "short", "folder", "absent", "a.npz", "a.csv", ".DS_Store"):
        assert not is_image_name(tmp_path / name)


# --- fit --------------------------------------------------------------------------------------------------------------


def test_fit_keeps_the_aspect_and_pads_with_black() -> None:
    wide = fit(np.ones((10, 40), np.float32), 32, 32, 1)
    assert wide.shape == (1, 32, 32)
    assert wide.dtype == np.float32
    assert np.allclose(wide[0, 12:20], 1)
    assert not wide[0, :12].any()
    assert not wide[0, 20:].any()
    tall = fit(np.ones((90, 30, 3), np.float32), 45, 60, 3)
    assert np.allclose(tall[:, :, 22:37], 1)
    assert not tall[:, :, :22].any()
    assert not tall[:, :, 37:].any()
    assert fit(np.ones((1, 1000)), 8, 8, 1).sum() == 8  # never less than a row
    same = np.random.default_rng(0).random((16, 24)).astype(np.float32)
    assert np.allclose(fit(same, 16, 24, 1)[0], same, atol=EXACT)


def test_fit_shrinks_without_aliasing_and_enlarges_without_ringing() -> None:
    stripes = np.tile([0.0, 1.0], (64, 32))
    assert np.abs(fit(stripes, 16, 16, 1)[0, :, 1:-1] - 0.5).max() < 0.01  # every fourth pixel would be all 0 or all 1
    ramp = np.linspace(0, 1, 64)[None].repeat(64, 0)
    small = fit(ramp, 16, 16, 1)[0]
    assert np.abs(small[:, 1:-1] - ramp.reshape(64, 16, 4).mean(-1)[::4, 1:-1]).max() < 0.01
    step = np.zeros((4, 4))
    step[:, 2:] = 1
    large = fit(step, 40, 40, 1)[0]
    assert large.min() == 0
    assert large.max() == 1
    assert (np.diff(large, axis=1) >= 0).all()
    assert np.allclose(large[:, ::-1], 1 - large, atol=EXACT)  # centred


def test_fit_channels() -> None:
    colour = np.zeros((4, 4, 3))
    colour[..., 0], colour[..., 1], colour[..., 2] = 1.0, 0.5, 0.25
    assert np.allclose(fit(colour, 4, 4, 1), 0.299 + 0.587 / 2 + 0.114 / 4, atol=EXACT)
    grey = np.random.default_rng(0).random((4, 4))
    assert np.allclose(fit(grey, 4, 4, 3), np.stack([grey] * 3), atol=EXACT)
    assert np.allclose(fit(colour, 4, 4, 3), np.moveaxis(colour, -1, 0), atol=EXACT)
    for shape, channels in (((4, 4), 2), ((4, 4, 4), 3), ((4,), 1)):
        with pytest.raises(ValueError):
            fit(np.zeros(shape), 4, 4, channels)


def test_importing_is_light() -> None:
    probe = "import sys, shared.imaging.read; print(sorted({'torch', 'pydicom', 'PIL', 'tifffile'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# --- damaged files ----------------------------------------------------------------------------------------------------


def whole_files() -> list[bytes]:
    made = []
    for array, kind in ((grey16(), "PNG"), (rgb8(), "JPEG"), (grey8(), "BMP"), (grey16(), "TIFF"), (rgb8(), "TIFF")):
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, kind)
        made.append(buffer.getvalue())
    for save in (np.savez, np.savez_compressed):
        buffer = io.BytesIO()
        save(buffer, images=np.stack([grey8()] * 3))
        made.append(buffer.getvalue())
    buffer = io.BytesIO()
    np.save(buffer, np.stack([grey16()] * 3))
    made.append(buffer.getvalue())
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, np.stack([rgb8().astype(np.uint16)] * 2), photometric="rgb")
    made.append(buffer.getvalue())
    return made


WHOLE = whole_files()


@settings(max_examples=500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_files_raise_nothing_else(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    whole = bytearray(data.draw(st.sampled_from(WHOLE)))
    if data.draw(st.booleans()):
        del whole[data.draw(st.integers(0, len(whole))) :]
    if whole:
        for _ in range(data.draw(st.integers(0, 8))):
            whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(whole)
    assert is_sound(outcome(path))

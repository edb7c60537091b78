"""shared.imaging.sequences and .dynamic: films of other programs, the order of frames, one rule of grey values."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pydicom
import pytest
import SimpleITK
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shared.imaging.errors import CODES, UnreadableImage
from shared.imaging.read import read_dicom, read_image
from shared.imaging.sequences import is_film, pick, read_film

HALF_STEP = 0.51 / 65535


def read(path: Path, **options: Any) -> np.ndarray:
    return np.stack(read_film(path, lambda picture: picture, **options))


def problem(path: Path, **options: Any) -> UnreadableImage:
    with pytest.raises(UnreadableImage) as caught:
        read(path, **options)
    assert caught.value.code in CODES
    return caught.value


def values(frames: int = 5, high: int = 4000, seed: int = 0, shape: tuple[int, ...] = (6, 9)) -> np.ndarray:
    return np.random.default_rng(seed).integers(100, high, (frames, *shape)).astype(np.uint16)


def stretched(array: np.ndarray) -> np.ndarray:
    array = array.astype(np.float64)
    return (array - array.min()) / (array.max() - array.min())


def write_dicom(file: Path, frame: np.ndarray, **tags: object) -> Path:
    """One slice as ITK writes it, without a place in space; ``tags`` are added by their keywords."""
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(frame), str(file))
    ds = pydicom.dcmread(file)
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "InstanceNumber"):
        ds.pop(keyword, None)
    for keyword, value in ({"SeriesInstanceUID": "1.2.3"} | tags).items():
        setattr(ds, keyword, str(value).split("\\") if "\\" in str(value) else str(value))
    ds.save_as(file)
    return file


def write_series(folder: Path, frames: np.ndarray, tags: Callable[[int], dict[str, object]]) -> Path:
    """A file per frame, in names that sort backwards."""
    folder.mkdir()
    for number, frame in enumerate(frames):
        write_dicom(folder / f"{len(frames) - number:03d}.dcm", frame, **tags(number))
    return folder


def write_video(file: Path, frames: np.ndarray, codec: str = "ffv1") -> Path:
    with av.open(str(file), "w") as container:
        stream: Any = container.add_stream(codec, rate=Fraction(10))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "bgr0" if codec == "ffv1" else "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())
    return file


# --- how many and which -----------------------------------------------------------------------------------------------


@given(st.integers(1, 500), st.integers(0, 600))
def test_frames_are_picked_evenly(count: int, most: int) -> None:
    picked = pick(count, most)
    assert len(picked) == (min(count, most) or count)
    assert all(0 <= index < count for index in picked)
    gaps = np.diff([*picked, picked[0] + count])  # as on a ring: the ends are not crowded either
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1


def test_one_frame_is_the_middle_one() -> None:
    assert [pick(count, 1) for count in (1, 2, 5, 12)] == [[0], [1], [2], [6]]


# --- films of other programs ------------------------------------------------------------------------------------------


def test_every_film_of_the_shared_data_has_the_frames_pydicom_sees(shared_data: Callable[[str], Path]) -> None:
    root = shared_data("dicom_robustness")
    seen = 0
    for name in ("pydicom/examples_ybr_color.dcm", "highdicom/sm_image_grayscale.dcm", "pydicom/SC_rgb_rle_2frame.dcm"):
        file = root / name
        expected = pydicom.dcmread(file).pixel_array
        found = read(file, most=4)
        assert len(found) == min(4, len(expected))
        assert found.shape[1:3] == expected.shape[1:3]
        for picture, index in zip(found, pick(len(expected), 4), strict=True):
            shown = read_dicom(file, index)
            correlation = np.corrcoef(picture.ravel(), shown.ravel())[0, 1] if shown.std() else 1.0
            assert correlation > 0.999
            seen += 1
    assert seen == 4 + 4 + 2


@pytest.mark.parametrize("kind", ["", "_RLE", "_big_endian", "_jpeg_2k_lossless", "_jpeg_ls_lossless"])
def test_an_enhanced_mr_is_one_stretch_of_all_its_frames(shared_data: Callable[[str], Path], kind: str) -> None:
    file = shared_data("dicom_robustness") / f"pydicom-data/emri_small{kind}.dcm"
    expected = pydicom.dcmread(file).pixel_array
    found = read(file)
    assert found.shape == expected.shape
    assert np.abs(found - stretched(expected)).max() < HALF_STEP


def test_a_stack_written_by_itk_keeps_its_order(tmp_path: Path) -> None:
    frames = values()
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(frames), str(tmp_path / "film.dcm"))
    assert np.abs(read(tmp_path / "film.dcm") - stretched(frames)).max() < HALF_STEP


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="ffmpeg is not installed")
def test_a_film_of_ffmpeg(tmp_path: Path) -> None:
    file = tmp_path / "film.mp4"
    grey = "nullsrc=s=32x24:r=10:d=1,geq=lum='20*N+20':cb=128:cr=128"  # brighter from frame to frame
    subprocess.run(
        ["ffmpeg", "-v", "error", "-f", "lavfi", "-i", grey, "-c:v", "mpeg4", "-q:v", "1", str(file)], check=True
    )
    found = read(file)
    assert found.shape == (10, 24, 32, 3)
    assert np.allclose(np.diff(found.mean((1, 2, 3))) * 219 / 20, 1, atol=0.25)  # 16 to 235 is black to white
    assert np.array_equal(read(file, most=3), found[pick(10, 3)])


@pytest.mark.skipif(not shutil.which("img2dcm"), reason="dcmtk is not installed")
def test_a_folder_of_dcmtk_files_is_sorted_by_instance_number(tmp_path: Path) -> None:
    levels = [200, 40, 120, 90]
    for number, level in enumerate(levels, start=1):
        picture = tmp_path / f"{number}.jpg"
        Image.fromarray(np.full((16, 16), level, np.uint8)).save(picture, quality=100)
        (tmp_path / "film").mkdir(exist_ok=True)
        target = tmp_path / "film" / f"{chr(ord('z') - number)}.dcm"
        tags = [f"SeriesInstanceUID=1.2.{7}", "StudyInstanceUID=1.2", f"InstanceNumber={number}"]
        subprocess.run(["img2dcm", *(part for tag in tags for part in ("-k", tag)), picture, target], check=True)
    found = read(tmp_path / "film")
    assert np.argsort(np.argsort(found.mean((1, 2)))).tolist() == [3, 0, 2, 1]
    assert np.allclose(found.mean((1, 2)), stretched(np.array(levels)), atol=0.02)


# --- order ------------------------------------------------------------------------------------------------------------

ORDERS: dict[str, Callable[[int], dict[str, object]]] = {
    # What is right says 0, 1, 2 …; what is weaker says the opposite.
    "temporal position": lambda k: {
        "TemporalPositionIdentifier": k + 1,
        "AcquisitionTime": f"10{50 - k:02d}00",
        "InstanceNumber": 9 - k,
    },
    "acquisition date and time": lambda k: {
        "AcquisitionDate": "20200101" if k < 3 else "20200102",
        "AcquisitionTime": f"23595{k}.5" if k < 3 else f"00000{k}",
        "TriggerTime": 900 - k,
        "InstanceNumber": 9 - k,
    },
    "acquisition time with colons": lambda k: {"AcquisitionTime": f"10:0{k}:00", "InstanceNumber": 9 - k},
    "trigger time": lambda k: {"TriggerTime": 95 + 5 * k, "AcquisitionTime": "100000", "InstanceNumber": 9 - k},
    "instance number": lambda k: {"InstanceNumber": 8 + k, "AcquisitionTime": "100000"},  # 8, 9, 10: not as text
    "position along the normal": lambda k: {
        "ImagePositionPatient": f"5\\5\\{3 * k - 4}",
        "ImageOrientationPatient": "1\\0\\0\\0\\1\\0",
        "PixelSpacing": "1\\1",
        "InstanceNumber": 9 - k,
        "AcquisitionTime": f"10{50 - k:02d}00",
    },
}


@pytest.mark.filterwarnings("ignore:Invalid value for VR TM")
@pytest.mark.parametrize("kind", ORDERS)
def test_frames_of_a_series_come_in_order(tmp_path: Path, kind: str) -> None:
    frames = values()
    folder = write_series(tmp_path / "series", frames, ORDERS[kind])
    assert np.abs(read(folder) - stretched(frames)).max() < HALF_STEP
    some = pick(len(frames), 3)
    assert np.abs(read(folder, most=3) - stretched(frames[some])).max() < HALF_STEP


def test_a_series_that_does_not_say_its_order_is_refused(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "series", values(3), lambda k: {"InstanceNumber": 1, "AcquisitionTime": "10"})
    assert problem(folder).code == "no-order"
    assert "series" in problem(folder).detail


def test_two_series_in_a_folder_are_refused(tmp_path: Path) -> None:
    folder = write_series(
        tmp_path / "series", values(4), lambda k: {"InstanceNumber": k, "SeriesInstanceUID": f"1.2.{k // 2}"}
    )
    assert problem(folder).code == "mixed-series"


def test_several_times_at_several_places_are_refused(tmp_path: Path) -> None:
    folder = write_series(
        tmp_path / "series",
        values(6),
        lambda k: {
            "ImagePositionPatient": f"0\\0\\{k % 3}",
            "ImageOrientationPatient": "1\\0\\0\\0\\1\\0",
            "PixelSpacing": "1\\1",
            "InstanceNumber": k,
            "TemporalPositionIdentifier": k // 3 + 1,
        },
    )
    error = problem(folder)
    assert error.code == "mixed-series"
    assert "6 frames at 3 places" in error.detail


def test_a_slice_missing_from_a_stack_is_refused(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "series", values(5), ORDERS["position along the normal"])
    (folder / "003.dcm").unlink()
    assert problem(folder).code == "missing-slice"


def test_pictures_are_sorted_as_people_count(tmp_path: Path) -> None:
    frames = values(12, 256).astype(np.uint8)
    for number, frame in enumerate(frames, start=1):
        Image.fromarray(frame).save(tmp_path / f"frame{number}.png")
    (tmp_path / "notes.txt").write_text("no frame")
    (tmp_path / ".hidden.png").write_bytes(b"")
    assert np.abs(read(tmp_path) - frames / 255).max() < 1e-6


# --- grey values ------------------------------------------------------------------------------------------------------


def windowed(frame: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.clip((frame.astype(np.float64) - low) / (high - low), 0, 1)


def test_frames_that_share_a_window_are_shown_by_it(tmp_path: Path) -> None:
    window = {"WindowCenter": 1500, "WindowWidth": 1000}
    folder = write_series(tmp_path / "series", values(), lambda k: {"InstanceNumber": k} | window)
    expected = [read_dicom(folder / f"{5 - k:03d}.dcm") for k in range(5)]
    assert np.array_equal(read(folder), expected)


def test_differing_windows_become_one_that_spans_them(tmp_path: Path) -> None:
    frames = values()
    folder = write_series(
        tmp_path / "series",
        frames,
        lambda k: {"InstanceNumber": k, "WindowCenter": 1000 + 100 * k, "WindowWidth": 800},
    )
    assert np.abs(read(folder) - windowed(frames, 600, 1800)).max() < HALF_STEP


def test_a_window_of_the_job_goes_before_any_other(tmp_path: Path) -> None:
    frames = values()
    plain = write_series(tmp_path / "plain", frames, lambda k: {"InstanceNumber": k})
    assert np.abs(read(plain, window=(500.0, 900.0)) - windowed(frames, 500, 900)).max() < HALF_STEP
    shown = write_series(
        tmp_path / "shown", frames, lambda k: {"InstanceNumber": k, "WindowCenter": 1500, "WindowWidth": 1000}
    )
    assert np.abs(read(shown, window=(500.0, 900.0)) - windowed(frames, 500, 900)).max() < HALF_STEP


def test_values_are_rescaled_frame_by_frame_before_they_are_compared(tmp_path: Path) -> None:
    """As PET does: each frame with a slope of its own. In numbers stored the frames are alike, in activity not."""
    frames = values(4)
    folder = write_series(
        tmp_path / "series", frames, lambda k: {"InstanceNumber": k, "RescaleSlope": k + 1, "RescaleIntercept": 0}
    )
    measured = frames * np.arange(1, 5)[:, None, None]
    assert np.abs(read(folder) - stretched(measured)).max() < HALF_STEP


def test_inverted_and_padded_frames(tmp_path: Path) -> None:
    frames = values(3)
    frames[:, 0, 0] = 0
    folder = write_series(tmp_path / "series", frames, lambda k: {"InstanceNumber": k})
    for file in folder.iterdir():
        ds = pydicom.dcmread(file)
        ds.PhotometricInterpretation = "MONOCHROME1"
        ds.add_new("PixelPaddingValue", "US", 0)
        ds.save_as(file)
    inside = np.ones(frames.shape, bool)
    inside[:, 0, 0] = False
    expected = 1 - (frames - frames[inside].min()) / np.ptp(frames[inside])
    expected[~inside] = 0
    assert np.abs(read(folder) - expected).max() < HALF_STEP


@pytest.mark.parametrize("kind", ["png", "tif", "one.tif", "npy", "npz"])
def test_sixteen_bits_are_stretched_over_the_whole_film(tmp_path: Path, kind: str) -> None:
    frames = values()
    path = tmp_path / f"film.{kind}"
    if kind in ("png", "tif"):
        path = tmp_path / "film"
        path.mkdir()
        for number, frame in enumerate(frames):
            Image.fromarray(frame).save(path / f"{number}.{kind}")
    elif kind == "one.tif":
        tifffile.imwrite(path, frames, photometric="minisblack")
    elif kind == "npy":
        np.save(path, frames)
    else:
        np.savez(path, anything=frames)
    assert np.abs(read(path) - stretched(frames)).max() < HALF_STEP


def test_eight_bits_and_shares_keep_their_grey(tmp_path: Path) -> None:
    bytes_ = values(4, 200).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", bytes_, photometric="minisblack")
    np.save(tmp_path / "b.npy", bytes_)
    for name in ("a.tif", "b.npy"):
        assert np.abs(read(tmp_path / name) - bytes_ / 255).max() < 1e-6
    shares = (bytes_ / 400).astype(np.float32)
    np.save(tmp_path / "c.npy", shares)
    assert np.abs(read(tmp_path / "c.npy") - shares).max() < 1e-6
    np.save(tmp_path / "d.npy", shares * 3 - 0.8)
    assert np.abs(read(tmp_path / "d.npy") - stretched(shares)).max() < 1e-6


def test_white_is_zero_in_a_deep_tiff(tmp_path: Path) -> None:
    frames = values()
    tifffile.imwrite(tmp_path / "film.tif", frames, photometric="miniswhite")
    assert np.abs(read(tmp_path / "film.tif") - (1 - stretched(frames))).max() < HALF_STEP


def test_a_video_without_loss_is_read_exactly(tmp_path: Path) -> None:
    frames = values(7, 256, shape=(16, 16, 3)).astype(np.uint8)
    file = write_video(tmp_path / "film.mkv", frames)
    assert np.abs(read(file) - frames / 255).max() < 1e-6
    assert np.abs(read(file, most=3) - frames[pick(7, 3)] / 255).max() < 1e-6


def test_arrays_of_many_films_and_of_colour(tmp_path: Path) -> None:
    films = values(4, 256, shape=(5, 6, 7)).astype(np.uint8)
    np.savez(tmp_path / "many.npz", train_images=films, train_labels=np.zeros(4))
    assert np.abs(read(tmp_path / "many.npz", key="train_images", row=2) - films[2] / 255).max() < 1e-6
    colour = values(4, 256, shape=(6, 7, 3)).astype(np.uint8)
    np.save(tmp_path / "colour.npy", colour)
    np.save(tmp_path / "first.npy", np.moveaxis(colour, 3, 1))
    np.save(tmp_path / "one.npy", colour[..., :1])
    assert np.abs(read(tmp_path / "colour.npy") - colour / 255).max() < 1e-6
    assert np.array_equal(read(tmp_path / "first.npy"), read(tmp_path / "colour.npy"))
    assert np.abs(read(tmp_path / "one.npy") - colour[..., 0] / 255).max() < 1e-6


# --- bad input --------------------------------------------------------------------------------------------------------


def test_films_without_frames(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "none.npy", np.zeros((0, 4, 4), np.uint8))
    for name in ("empty", "none.npy"):
        assert problem(tmp_path / name).code == "no-frames"
        assert name in problem(tmp_path / name).detail
    (tmp_path / "void.png").write_bytes(b"")
    assert problem(tmp_path / "void.png").code == "empty-file"
    assert problem(tmp_path / "absent").code == "not-found"


def test_a_frame_of_another_size_or_depth_is_named(tmp_path: Path) -> None:
    for number, shape in enumerate([(4, 5), (4, 5), (5, 4)]):
        Image.fromarray(np.zeros(shape, np.uint8)).save(tmp_path / f"{number}.png")
    assert problem(tmp_path).code == "uneven-frames"
    assert str(tmp_path / "2.png") in problem(tmp_path).detail
    Image.fromarray(np.zeros((4, 5), np.uint16)).save(tmp_path / "2.png")
    assert problem(tmp_path).code == "uneven-frames"
    folder = write_series(tmp_path / "series", values(3), lambda k: {"InstanceNumber": k})
    write_dicom(folder / "000.dcm", values(1, shape=(4, 4))[0], InstanceNumber=9)
    assert problem(folder).code == "uneven-frames"
    assert str(folder / "000.dcm") in problem(folder).detail


def test_a_broken_frame_is_named(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "series", values(3), lambda k: {"InstanceNumber": k})
    whole = (folder / "002.dcm").read_bytes()
    (folder / "002.dcm").write_bytes(whole[:-20])
    assert problem(folder).code == "truncated"
    assert str(folder / "002.dcm") in problem(folder).detail
    (folder / "002.dcm").write_bytes(b"")
    assert problem(folder).code == "empty-file"
    for number in range(3):
        Image.fromarray(np.zeros((4, 5), np.uint8)).save(tmp_path / f"{number}.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:40])
    assert str(tmp_path / "1.png") in problem(tmp_path).detail


@pytest.mark.parametrize("shape", [(5,), (5, 6), (5, 6, 7, 2), (5, 0, 7), (2, 2, 2, 2, 2)])
def test_arrays_that_are_no_films(tmp_path: Path, shape: Sequence[int]) -> None:
    np.save(tmp_path / "a.npy", np.zeros(shape))
    assert problem(tmp_path / "a.npy").code == "no-pixels"
    assert "a.npy" in problem(tmp_path / "a.npy").detail


def test_archives_and_rows_that_are_not_there(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", one=np.zeros((2, 3, 4, 4)), two=np.zeros((2, 3, 4, 4)))
    assert problem(tmp_path / "a.npz").code == "no-such-array"
    assert problem(tmp_path / "a.npz", key="three").code == "no-such-array"
    assert problem(tmp_path / "a.npz", key="one", row=2).code == "frame-out-of-range"
    np.save(tmp_path / "text.npy", np.full((2, 3, 3), "x"))
    assert problem(tmp_path / "text.npy").code == "unsupported-format"


def test_what_is_a_film_by_itself(tmp_path: Path) -> None:
    frames = values(2, 256).astype(np.uint8)
    Image.fromarray(frames[0]).save(tmp_path / "one.png")
    tifffile.imwrite(tmp_path / "one.tif", frames[0])
    tifffile.imwrite(tmp_path / "two.tif", frames, photometric="minisblack")
    np.save(tmp_path / "a.npy", frames)
    write_video(tmp_path / "v.mkv", values(2, 256, shape=(16, 16, 3)).astype(np.uint8))
    write_dicom(tmp_path / "one.dcm", values(1)[0])
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(values(3)), str(tmp_path / "three.dcm"))
    (tmp_path / "x.txt").write_text("x")
    films = {path.name for path in tmp_path.iterdir() if is_film(path)}
    assert films == {"two.tif", "a.npy", "v.mkv", "three.dcm"}


def test_a_single_picture_is_a_film_of_one_frame(tmp_path: Path) -> None:
    Image.fromarray(values(1, 256)[0].astype(np.uint8)).save(tmp_path / "one.png")
    assert np.array_equal(read(tmp_path / "one.png")[0], read_image(tmp_path / "one.png"))

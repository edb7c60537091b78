"""Films made by the ffmpeg program, frame by frame against its own PNG files; and films that are damaged."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared.imaging import video
from shared.imaging.errors import CODES, UnreadableImage
from shared.imaging.read import frame_count, is_image_name, read_image
from shared.imaging.video import container_of, frames, is_video, read_frame

# container and codec -> ffmpeg's arguments
KINDS = {
    "h264.mp4": ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-bf", "2", "-g", "8"],
    "h264.mov": ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-movflags", "faststart"],
    "mpeg4.avi": ["-c:v", "mpeg4", "-bf", "2"],
    "mjpeg.avi": ["-c:v", "mjpeg"],
    "ffv1.mkv": ["-c:v", "ffv1", "-pix_fmt", "bgr0"],
    "vp9.webm": ["-c:v", "libvpx-vp9"],
    "mpeg2.mpg": ["-c:v", "mpeg2video", "-r", "25"],
    "h264.ts": ["-c:v", "libx264", "-pix_fmt", "yuv420p"],
    "wmv2.wmv": ["-c:v", "wmv2"],
}


@pytest.fixture(scope="session")
def ffmpeg() -> Callable[..., None]:
    """Runs the ffmpeg program; skips where there is none."""
    program = shutil.which("ffmpeg")
    if program is None:
        pytest.skip("the ffmpeg program is not installed (apt-get install ffmpeg)")

    def run(*arguments: str | Path) -> None:
        subprocess.run([program, "-v", "error", "-y", *map(str, arguments)], check=True)

    return run


@pytest.fixture(scope="session")
def films(ffmpeg: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a film of each of KINDS, about 20 frames of 96 x 64 pixels."""
    folder = tmp_path_factory.mktemp("films")
    for name, arguments in KINDS.items():
        ffmpeg("-f", "lavfi", "-i", "testsrc2=size=96x64:rate=10:duration=2", *arguments, folder / name)
    return folder


def pngs(ffmpeg: Callable[..., None], film: Path, out: Path) -> list[np.ndarray]:
    """What the ffmpeg program makes of every frame, uint8 (H, W, 3)."""
    out.mkdir()
    ffmpeg("-i", film, "-vsync", "passthrough", out / "%04d.png")
    return [np.asarray(Image.open(path).convert("RGB")) for path in sorted(out.iterdir())]


@pytest.mark.parametrize("name", KINDS)
def test_every_frame_is_what_ffmpeg_writes(name: str, films: Path, ffmpeg: Callable[..., None], tmp_path: Path) -> None:
    wanted = pngs(ffmpeg, films / name, tmp_path / "png")
    found = list(frames(films / name))
    assert len(found) == len(wanted) == frame_count(films / name) >= 20
    for picture, expected in zip(found, wanted, strict=True):
        assert picture.dtype == np.float32
        assert picture.flags.c_contiguous
        # The ffmpeg program brings its own version of the libraries: the last bit of a colour may differ.
        assert np.abs(np.rint(picture * 255) - expected).max() <= 2
    assert not np.array_equal(found[0], found[-1])


@pytest.mark.parametrize("name", KINDS)
def test_frames_in_any_order_are_those_in_order(name: str, films: Path) -> None:
    whole = list(frames(films / name))
    for k in (3, 3, 4, 11, 2, 0, 19, 19, 7):
        assert np.array_equal(read_image(films / name, k), whole[k])
    assert np.array_equal(read_image(films / name), whole[len(whole) // 2])
    cut = read_image(films / name, 5, box=(10, 20, 30, 15))
    assert np.array_equal(cut, whole[5][20:35, 10:40])


def test_a_process_forked_while_a_film_is_open_reads_it_too(films: Path) -> None:
    """The worker processes of a simulation are forked; the threads that decode the film stay behind."""
    film = films / "h264.mp4"
    expected = [read_frame(film, k) for k in (0, 3)]
    worker = multiprocessing.get_context("fork").Process(target=_exits_well_if_equal, args=(film, expected[1]))
    worker.start()
    worker.join(60)
    if worker.exitcode is None:
        worker.kill()
    assert worker.exitcode == 0
    np.testing.assert_array_equal(read_frame(film, 0), expected[0])


def _exits_well_if_equal(film: Path, expected: np.ndarray) -> None:
    os._exit(0 if np.array_equal(read_frame(film, 3), expected) else 1)


def test_frames_in_rising_order_cost_one_pass_and_few_films_stay_open(
    films: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    decoded = []
    make, advance = video._Film.__init__, video._Film.advance

    def noted(self: video._Film, path: str) -> None:
        opened.append(path)
        make(self, path)

    def counted(self: video._Film) -> object:
        decoded.append(self.read)
        return advance(self)

    monkeypatch.setattr(video._Film, "__init__", noted)
    monkeypatch.setattr(video._Film, "advance", counted)
    monkeypatch.setattr(video, "_open", video.OrderedDict())
    for k in (0, 2, 2, 5, 17):
        read_frame(films / "h264.mp4", k)
    assert len(opened) == 1
    assert len(decoded) == 18
    for name in KINDS:
        read_frame(films / name, 1)
    assert len(video._open) == 2


def test_a_film_turned_by_its_header_is_turned(films: Path, ffmpeg: Callable[..., None], tmp_path: Path) -> None:
    for angle in (90, 180, 270):
        film = tmp_path / f"{angle}.mp4"
        ffmpeg("-i", films / "h264.mp4", "-c", "copy", "-metadata:s:v", f"rotate={angle}", film)
        (first, *_) = pngs(ffmpeg, film, tmp_path / str(angle))
        picture = read_frame(film, 0)
        if np.array_equal(np.rint(picture * 255), np.rint(read_frame(films / "h264.mp4", 0) * 255)):
            pytest.skip("this ffmpeg no longer writes the angle this way")
        assert picture.shape == first.shape
        assert np.abs(np.rint(picture * 255) - first).max() <= 2


def test_frames_that_are_not_to_be_shown_are_not_counted(
    films: Path, ffmpeg: Callable[..., None], tmp_path: Path
) -> None:
    film = tmp_path / "trimmed.mp4"
    ffmpeg("-ss", "1.25", "-i", films / "h264.mp4", "-c", "copy", film)
    wanted = pngs(ffmpeg, film, tmp_path / "png")
    assert frame_count(film) == len(wanted) < 20
    assert np.abs(np.rint(read_frame(film, 0) * 255) - wanted[0]).max() <= 2


def code_of(call: Callable[[], object]) -> str:
    with pytest.raises(UnreadableImage) as caught:
        call()
    assert caught.value.code in CODES
    assert str(caught.value) == caught.value.code
    return caught.value.code


def everything(path: Path) -> list[str]:
    """The codes of every way to read a film."""
    return [
        code_of(lambda: frame_count(path)),
        code_of(lambda: read_image(path)),
        code_of(lambda: list(frames(path))),
    ]


@pytest.mark.parametrize("name", KINDS)
def test_a_frame_beyond_the_end_is_out_of_range(name: str, films: Path) -> None:
    count = frame_count(films / name)
    assert code_of(lambda: read_image(films / name, count)) == "frame-out-of-range"
    assert code_of(lambda: read_image(films / name, -1)) == "frame-out-of-range"
    assert read_image(films / name, count - 1).shape == (64, 96, 3)


def test_a_film_without_bytes_or_without_a_picture_or_not_there(
    films: Path, ffmpeg: Callable[..., None], tmp_path: Path
) -> None:
    empty = tmp_path / "empty.mp4"
    empty.touch()
    assert everything(empty) == ["empty-file"] * 3
    sound = tmp_path / "sound.mp4"
    ffmpeg("-f", "lavfi", "-i", "sine=duration=0.2", sound)
    assert everything(sound) == ["no-frames"] * 3
    header = tmp_path / "header.mkv"
    header.write_bytes((films / "ffv1.mkv").read_bytes()[:600])
    assert set(everything(header)) <= {"no-frames", "corrupt", "truncated"}
    assert everything(tmp_path / "gone.mp4") == ["not-found"] * 3


@pytest.mark.parametrize("name", ["h264.mov", "mpeg4.avi", "mjpeg.avi"])
def test_a_film_cut_off_is_truncated_but_its_first_frames_can_be_read(name: str, films: Path, tmp_path: Path) -> None:
    content = (films / name).read_bytes()
    cut = tmp_path / name
    cut.write_bytes(content[: len(content) // 2])
    assert everything(cut) == ["truncated"] * 3
    assert code_of(lambda: read_image(cut, 19)) == "truncated"
    assert np.array_equal(read_image(cut, 1), read_image(films / name, 1))


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_a_film_cut_within_a_frame_is_truncated(share: float, films: Path, tmp_path: Path) -> None:
    """Wherever the cut goes: the decoder stumbles over what is left of the frame before the film's end is reached."""
    import av

    with av.open(str(films / "h264.mov")) as film:
        entries = film.streams.video[0].index_entries
        entry = entries[int(len(entries) * share)]
    cut = tmp_path / "cut.mov"
    cut.write_bytes((films / "h264.mov").read_bytes()[: entry.pos + entry.size // 2])
    assert everything(cut) == ["truncated"] * 3


ODD = {
    "odd sides": ["-vf", "crop=95:63", "-pix_fmt", "yuv444p"],
    "variable rate": [
        "-vf",
        "select=not(mod(n\\,3))+eq(n\\,4),setpts=N*N/TB/20",
        "-vsync",
        "vfr",
        "-pix_fmt",
        "yuv420p",
    ],
}


@pytest.mark.parametrize("name", ODD)
def test_odd_films_are_what_ffmpeg_writes(name: str, films: Path, ffmpeg: Callable[..., None], tmp_path: Path) -> None:
    film = tmp_path / "odd.mp4"
    ffmpeg("-i", films / "ffv1.mkv", *ODD[name], "-c:v", "libx264", film)
    wanted = pngs(ffmpeg, film, tmp_path / "png")
    found = list(frames(film))
    assert len(found) == len(wanted) > 5
    for picture, other in zip(found, wanted, strict=True):
        assert picture.shape == other.shape
        assert np.abs(np.rint(picture * 255) - other).max() <= 3


def test_a_film_whose_index_is_missing_is_corrupt(films: Path, tmp_path: Path) -> None:
    content = (films / "h264.mp4").read_bytes()  # its index is at the end
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(content[: len(content) // 2])
    assert everything(cut) == ["corrupt"] * 3


def test_whatever_bytes_a_film_has_nothing_but_an_unreadable_image_is_raised(films: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in KINDS:
        content = bytearray((films / name).read_bytes())
        for run in range(4):
            damaged = bytearray(content)
            for place in rng.integers(0, len(content), 40 * (run + 1)):
                damaged[place] = rng.integers(0, 256)
            path = tmp_path / f"{run}-{name}"
            path.write_bytes(damaged)
            for call in (frame_count, read_image, lambda film: list(frames(film))):
                with contextlib.suppress(UnreadableImage):
                    call(path)
    # Any other exception, or a crash, ends the test.


def test_a_film_is_told_by_its_bytes_or_else_by_its_name(films: Path, tmp_path: Path) -> None:
    for name in KINDS:
        assert is_video(films / name)
        bare = tmp_path / "bare"
        shutil.copy(films / name, bare)
        assert is_video(bare)
        assert np.array_equal(read_image(bare, 2), read_image(films / name, 2))
        bare.unlink()
        assert not is_image_name(films / name)
    text = tmp_path / "text.mp4"
    text.write_text("no film")
    assert is_video(text)
    assert everything(text) == ["corrupt"] * 3
    assert not is_video(tmp_path / "gone.mp4")
    picture = tmp_path / "a.png"
    Image.new("L", (4, 4)).save(picture)
    assert not is_video(picture)
    photograph = b"\0\0\0\x1cftypavif\0\0\0\0"
    assert container_of(photograph) == ""


def test_a_list_of_other_files_is_not_followed(films: Path, tmp_path: Path) -> None:
    """FFmpeg would read what an HLS play list or a concat script names: a site's file must not lead elsewhere."""
    target = films / "mpeg2.mpg"
    for name, content in {
        "list.mp4": f"#EXTM3U\n#EXTINF:1,\n{target}\n#EXT-X-ENDLIST\n",
        "script.mp4": f"ffconcat version 1.0\nfile '{target}'\n",
    }.items():
        path = tmp_path / name
        path.write_text(content)
        assert everything(path) == ["corrupt"] * 3


def test_a_changed_film_is_read_anew(films: Path, tmp_path: Path) -> None:
    path = tmp_path / "film.mkv"
    shutil.copy(films / "ffv1.mkv", path)
    first = read_frame(path, 0)
    shutil.copy(films / "h264.mp4", path)
    os.utime(path, ns=(1, 1))
    assert not np.array_equal(read_frame(path, 0), first)
    assert frame_count(path) == frame_count(films / "h264.mp4")

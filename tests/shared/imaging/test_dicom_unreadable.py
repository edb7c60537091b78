"""shared.imaging.dicom: decoders, files that cannot be read, damaged files; a code leaves and no word of the header."""

from __future__ import annotations

import functools
import logging
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
from pydicom.encaps import encapsulate
from pydicom.pixels.decoders.base import get_decoder
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
)

from shared.imaging import apart, dicom, stored
from shared.imaging.dicom import read_dicom
from shared.imaging.errors import MAX_PIXELS, UnreadableImage
from shared.imaging.stored import DECODERS
from tests.shared.imaging.dicom_files import (
    COMPRESSED,
    EXACT,
    code,
    header,
    is_sound,
    item,
    jpeg_dicom,
    lut,
    outcome,
    sample,
    save,
    write,
)

# --- decoders ---------------------------------------------------------------------------------------------------------


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
        forks.close()  # ended by a signal, one may wait for ever: another library's handler of it is inherited
        forks.join()


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

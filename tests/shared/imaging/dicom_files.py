"""What the tests of shared.imaging.dicom share: files of every kind, written on the spot, and the closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
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

from shared.imaging.dicom import read_dicom
from shared.imaging.errors import CODES, UnreadableImage

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

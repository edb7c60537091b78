"""Any picture file a site may hold, read as a float picture in [0, 1], cropped, and fitted to a model's input.

The kind of file is told from its first bytes, not from its name. One rule gives the range of every file that is not
DICOM: 8 bits are divided by 255; floats that lie within [0, 1] stay; everything else (16-bit above all) is stretched
from the least to the largest value of the picture. 16-bit files say nowhere how many of their bits are used: divided by
65535 a 12-bit picture would be all but black. It is also what read_dicom does for a file without a window.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from shared.imaging import video
from shared.imaging.arrays import pictures
from shared.imaging.dicom import dicom_frame_count, frame_index, read_dicom
from shared.imaging.display import Picture, min_max
from shared.imaging.errors import CODES, MAX_PIXELS, UnreadableImage, only_unreadable, require_bytes, silence

__all__ = [
    "CODES",
    "Picture",
    "UnreadableImage",
    "crop",
    "fit",
    "frame_count",
    "is_image_name",
    "read_dicom",
    "read_image",
]

Array = npt.NDArray[Any]
Box = tuple[float, float, float, float]
Name = str | os.PathLike[str]

_SUFFIXES: Final = frozenset({".dcm", ".dicom", ".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"})
_MAGIC: Final = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
)


class Reader(NamedTuple):
    """A kind of file that holds pictures on end.

    ``magic`` are its first bytes, several where they differ from file to file; ``suffixes`` those by which a walk
    through a folder takes it; ``pictures(path, key)`` gives them all: (n, height, width) or (n, height, width,
    channels), of any number type. It raises UnreadableImage, or ValueError for a file that is damaged.
    """

    magic: bytes | tuple[bytes, ...]
    suffixes: tuple[str, ...]
    pictures: Callable[[Name, str | None], Array]


#: To read another kind of file: one line here; see docs/extending.md.
READERS: dict[str, Reader] = {
    "npz": Reader(b"PK\x03\x04", (), lambda path, key: pictures(path, "npz", key)),
    "npy": Reader(b"\x93NUMPY", (), lambda path, key: pictures(path, "npy", key)),
}
_ITU_R_BT601 = np.array([0.299, 0.587, 0.114], np.float32)


@only_unreadable
def read_image(path: Name, frame: int | str = "middle", box: Box | None = None, key: str | None = None) -> Picture:
    """Read one picture of a DICOM, PNG, JPEG, BMP, TIFF, .npz or .npy file, or of a film.

    Args:
        path: the file; its suffix does not matter.
        frame: number from 0, or "middle" (count // 2): frame of a DICOM file or a film, page of a TIFF, place along
            the first axis of an array. Other files have frame 0 only.
        box: (x, y, width, height) in pixels from the top left, after orientation; clipped to the picture, to whole
            pixels at the nearest edges.
        key: array of an .npz file; left out, "images" or else the only array that looks like pictures.

    Returns:
        float32 (H, W) or (H, W, 3) in [0, 1]; see the module for the range and read_dicom for DICOM. EXIF orientation
        is applied, alpha is composited on black, palettes become colour. Colour PNG of 16 bits keeps its upper 8.

    Raises:
        UnreadableImage: whatever is wrong with the file; code from CODES.
    """
    kind = _kind(path)
    if kind == "DICOM":
        picture = read_dicom(path, frame)
    elif kind in READERS:
        found = READERS[kind].pictures(path, key)
        picture = _ranged(found[frame_index(frame, len(found))])
    elif kind == "film":
        picture = video.read_frame(path, frame)
    else:
        picture = _raster(path, kind, frame)
    return picture if box is None else crop(picture, box)


@only_unreadable
def frame_count(path: Name, key: str | None = None) -> int:
    """Number of frames read_image can address in the file. Raises UnreadableImage as read_image does."""
    kind = _kind(path)
    if kind == "DICOM":
        return dicom_frame_count(path)
    if kind in READERS:
        return len(READERS[kind].pictures(path, key))
    if kind == "film":
        return video.frame_count(path)
    if kind == "TIFF":
        silence("tifffile")
        import tifffile

        with tifffile.TiffFile(path) as file:
            return len(file.pages)
    return 1


def is_image_name(path: Name) -> bool:
    """Whether a walk through a folder should take the file: by suffix, else (no suffix, or digits as in a UID) by DICM.

    Never raises: a file that cannot be opened is no picture. Arrays (.npz, .npy) are not taken: they are named one by
    one, with a frame.
    """
    suffix = Path(path).suffix.lower()
    if suffix in _SUFFIXES or any(suffix in reader.suffixes for reader in READERS.values()):
        return True
    if suffix and not suffix[1:].isdecimal():
        return False
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def fit(image: npt.ArrayLike, height: int, width: int, channels: int) -> Picture:
    """Resize to a model's input: aspect kept, bilinear with antialiasing, centred on black.

    Args:
        image: (H, W) or (H, W, 3) in [0, 1], larger or smaller than asked.
        height, width: of the result, in pixels.
        channels: 1 (colour becomes grey by ITU-R BT.601 weights) or 3 (grey is repeated).

    Returns:
        float32 (channels, height, width) in [0, 1].

    Raises:
        ValueError: for another number of channels or shape of image.
    """
    import torch
    from torch.nn.functional import interpolate

    picture = np.asarray(image, np.float32)
    if channels not in (1, 3) or picture.ndim not in (2, 3) or picture.shape[2:] not in ((), (3,)):
        raise ValueError(f"cannot fit an image of shape {picture.shape} to {channels} channels")
    if channels == 1 and picture.ndim == 3:
        picture = picture @ _ITU_R_BT601
    planes = picture[None] if picture.ndim == 2 else np.moveaxis(picture, -1, 0)
    scale = min(height / planes.shape[1], width / planes.shape[2])
    size = [
        max(1, min(limit, round(side * scale))) for side, limit in zip(planes.shape[1:], (height, width), strict=True)
    ]
    tensor = torch.from_numpy(np.ascontiguousarray(planes))[None]
    small = interpolate(tensor, size=size, mode="bilinear", align_corners=False, antialias=True)[0]
    result = np.zeros((channels, height, width), np.float32)
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    result[:, top : top + size[0], left : left + size[1]] = small.clamp(0, 1).numpy()
    return result


def _kind(path: Name) -> str:
    """ "DICOM", a Pillow format name, one of ``READERS`` or "film"; UnreadableImage or OSError for anything else."""
    require_bytes(path)
    with open(path, "rb") as file:
        head = file.read(400)
    if head[128:132] == b"DICM":  # first, because a DICOM file may also be a TIFF: its first 128 bytes are free
        return "DICOM"
    for magic, kind in (*_MAGIC, *((reader.magic, kind) for kind, reader in READERS.items())):
        if head.startswith(magic):
            return kind
    if video.container_of(head) or video.is_video_name(path):
        return "film"
    suffix = Path(path).suffix.lower()
    raise UnreadableImage("not-dicom" if suffix in (".dcm", ".dicom") else "unsupported-format", f"suffix {suffix!r}")


def _ranged(values: Array) -> Picture:
    """(H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of any number type as a picture, by the rule of this module."""
    if values.size == 0 or values.ndim not in (2, 3) or values.shape[2:] not in ((), (1,), (3,), (4,)):
        raise UnreadableImage("no-pixels", f"an array of shape {values.shape} is no picture")
    if values.dtype.kind not in "buif":
        raise UnreadableImage("unsupported-format", f"numbers of type {values.dtype}")
    alpha: Array | None = None
    picture: Array
    if values.shape[2:] == (4,):
        values, alpha = values[..., :3], values[..., 3:]
    elif values.shape[2:] == (1,):
        values = values[..., 0]
    if values.dtype == np.uint8 or values.dtype == bool:
        picture = values.astype(np.float32) / np.float32(255 if values.dtype == np.uint8 else 1)
    elif values.dtype.kind == "f" and values.min() >= 0 and values.max() <= 1:  # false if any is NaN
        picture = values.astype(np.float32)
    else:
        picture = min_max(values)
    if alpha is not None:
        full = np.iinfo(alpha.dtype).max if alpha.dtype.kind in "ui" else 1
        picture = picture * np.clip(np.nan_to_num(alpha.astype(np.float32)) / full, 0, 1)
    return picture.astype(np.float32)


def crop(picture: Picture, box: Box) -> Picture:
    """The part of a picture inside ``box`` = (x, y, width, height) in pixels.

    Raises:
        UnreadableImage: "bad-crop" if nothing is inside.
    """
    x, y, width, height = (float(value) for value in box)
    if not all(map(math.isfinite, (x, y, width, height))) or width <= 0 or height <= 0:
        raise UnreadableImage("bad-crop", f"box {box}")
    left, top, right, bottom = (max(0, math.floor(edge + 0.5)) for edge in (x, y, x + width, y + height))
    part = picture[top:bottom, left:right]
    if part.size == 0:
        raise UnreadableImage("bad-crop", f"box {box} in {picture.shape}")
    return part.copy()  # a view would keep the whole picture in memory


# --- PNG, JPEG, BMP, TIFF ---------------------------------------------------------------------------------------------


def _raster(path: Name, kind: str, frame: int | str) -> Picture:
    from PIL import Image, UnidentifiedImageError

    if kind == "TIFF":
        index = frame_index(frame, frame_count(path))
        deep = _deep_page(path, index)
        if deep is not None:
            return _ranged(deep)
    else:
        index = frame_index(frame, 1)
    try:
        # Not by name: Pillow 13 maps a named uncompressed TIFF into memory, and scrambles it if it is to be turned.
        with open(path, "rb") as file, Image.open(file, formats=(kind,)) as image:
            if index:
                image.seek(index)
            if image.width * image.height > MAX_PIXELS:
                raise UnreadableImage("too-large", f"{image.size}")
            return _pillow(image)
    except Image.DecompressionBombError as error:
        raise UnreadableImage("too-large", str(error)) from None
    except UnidentifiedImageError as error:
        raise UnreadableImage("corrupt", str(error)) from None


def _pillow(image: Any) -> Picture:
    """A Pillow image, upright, as a picture."""
    from PIL import ImageOps

    mode, inverted = image.mode, image.format == "TIFF" and image.tag_v2.get(262) == 0
    upright = ImageOps.exif_transpose(image)
    if mode.startswith(("I", "F")):
        values = np.asarray(upright)
        # Pillow inverts "white is zero" for 8 bits only.
        return 1 - _ranged(values) if inverted else _ranged(values)
    if mode == "1":
        upright = upright.convert("L")
    has_alpha = mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
    grey = mode in ("1", "L", "LA", "La")
    return _ranged_alpha(np.asarray(upright.convert("RGBA" if has_alpha else "L" if grey else "RGB")), grey)


def _ranged_alpha(values: Array, grey: bool) -> Picture:
    picture = _ranged(values)
    return picture[..., 0].copy() if grey and picture.ndim == 3 else picture


def _deep_page(path: Name, index: int) -> Array | None:
    """A TIFF page that Pillow would cut to 8 bits or refuse, by tifffile; None where Pillow reads the page right.

    Its orientation tag is not applied: such files come from microscopes and scanners, which do not turn them.
    """
    import tifffile

    with tifffile.TiffFile(path) as file:
        page: Any = file.pages[index]
        bits = np.max(page.bitspersample)
        if math.prod(page.shape) > MAX_PIXELS:
            raise UnreadableImage("too-large", f"{page.shape}")
        if bits <= 8 or (page.samplesperpixel == 1 and bits == 16 and page.sampleformat == 1):
            return None
        try:
            values: Array = page.asarray()
        except (ValueError, ImportError) as error:
            if "imagecodecs" in str(error):
                raise UnreadableImage("codec-missing", str(error)) from None
            raise
        return np.moveaxis(values, 0, -1) if page.axes.startswith("S") else values

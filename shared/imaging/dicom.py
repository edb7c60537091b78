"""DICOM pictures as a radiologist sees them: one frame, decoded, through its Modality and VOI look-up tables."""

from __future__ import annotations

import os

from shared.imaging.display import Picture, display
from shared.imaging.errors import UnreadableImage, only_unreadable, require_bytes, silence
from shared.imaging.stored import decode, open_dicom


@only_unreadable
def read_dicom(path: str | os.PathLike[str], frame: int | str = "middle") -> Picture:
    """Read one frame of a DICOM file as it is displayed.

    Args:
        path: a file with the DICM mark at byte 128 (PS3.10 7.1); others are not guessed at.
        frame: number from 0, or "middle" (frame count // 2). Only this frame is decoded.

    Returns:
        float32 (H, W) for grey or (H, W, 3) for colour, in [0, 1]; 0 is black. Grey goes through the first VOI LUT,
        else the first window, else from the least to the largest value of this frame without its padding (a constant
        frame is 0; one-bit masks stay 0 and 1). Padding (PS3.3 C.7.5.1.1.2) is black. Colour is scaled by bit depth.

    Raises:
        UnreadableImage: with any of CODES but "unsupported-format" for files that are not DICOM ("not-dicom").
    """
    require_bytes(path)
    with open(path, "rb") as file:
        opened = open_dicom(file)
        index = frame_index(frame, opened.frames)
        stored, photometric = decode(opened, index)
        return display(stored, photometric, opened, index)


@only_unreadable
def dicom_frame_count(path: str | os.PathLike[str]) -> int:
    """Number of frames the header names, 1 if it names none. Raises UnreadableImage as read_dicom does."""
    require_bytes(path)
    with open(path, "rb") as file:
        return open_dicom(file).frames


def frame_index(frame: int | str, frames: int) -> int:
    """The number, from 0, of the asked frame among `frames`; UnreadableImage("frame-out-of-range") if not there."""
    if isinstance(frame, str) and frame != "middle" and not frame.isdecimal():
        raise UnreadableImage("frame-out-of-range", f"frame {frame!r}")
    index = frames // 2 if frame == "middle" else int(frame)
    if not 0 <= index < frames:
        raise UnreadableImage("frame-out-of-range", f"frame {index} of {frames}")
    return index


def patient_id(path: str | os.PathLike[str]) -> str:
    """The PatientID of a DICOM file, by which its images are kept together; "" where it has none or is not DICOM.

    It stays at the site: it decides the split and goes nowhere else.
    """
    try:
        return _patient_id(path)
    except UnreadableImage:
        return ""


@only_unreadable
def _patient_id(path: str | os.PathLike[str]) -> str:
    with open(path, "rb") as file:
        if file.read(132)[128:] != b"DICM":
            return ""
    from pydicom import dcmread

    silence("pydicom")
    return str(dcmread(path, stop_before_pixels=True, specific_tags=["PatientID"]).get("PatientID") or "").strip()


_WORDS = {"sex": ("PatientSex",), "age": ("PatientAge",), "scanner": ("Manufacturer", "ManufacturerModelName")}


def patient_words(path: str | os.PathLike[str]) -> dict[str, str]:
    """``sex`` (M, F, O), ``age`` (as in 045Y) and ``scanner`` of a DICOM file's header; nothing where it is not DICOM.

    They stay at the site: by them it puts its test images into groups.
    """
    try:
        return _patient_words(path)
    except UnreadableImage:
        return {}


@only_unreadable
def _patient_words(path: str | os.PathLike[str]) -> dict[str, str]:
    with open(path, "rb") as file:
        if file.read(132)[128:] != b"DICM":
            return {}
    from pydicom import dcmread

    silence("pydicom")
    header = dcmread(path, stop_before_pixels=True, specific_tags=[tag for tags in _WORDS.values() for tag in tags])
    return {name: " ".join(str(header.get(tag) or "").strip() for tag in tags).strip() for name, tags in _WORDS.items()}

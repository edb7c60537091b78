"""DICOM segmentations (SEG, PS3.3 A.51 and Label Map, A.90): read onto an image's grid, written for an image.

A frame of a SEG is matched to the image by where it lies in space (volumes) or by the image it names (single pictures),
never by its number: writers leave out empty frames and sort the others as they like.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from shared import __version__
from shared.imaging.display import functional_group
from shared.imaging.errors import UnreadableImage, silence
from shared.imaging.grid import LPS_TO_RAS, TOLERANCE, Affine, Array, as_in_file
from shared.imaging.series import affine_of, plane_of, sorted_planes
from shared.imaging.stored import Opened, decode, open_dicom
from shared.imaging.volumes import Volume

_SEGMENTATION: Final = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
_ABNORMAL: Final = {"Lesion", "Neoplasm", "Mass", "Nodule", "Cyst", "Metastasis", "Polyp", "Edema", "Hemorrhage"}
_WANTED: Final = (
    "AccessionNumber", "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate",
    "StudyTime", "ReferringPhysicianName",
)  # fmt: skip


def segment_labels(path: Path) -> dict[int, str] | None:
    """SegmentNumber and SegmentLabel of each segment of a DICOM file; None where it is no segmentation."""
    with open(path, "rb") as file:
        header = open_dicom(file).header
    if not str(header.get("SOPClassUID", "")).startswith(_SEGMENTATION):
        return None
    labels = {int(item.SegmentNumber): str(item.SegmentLabel) for item in header.SegmentSequence}
    if header.SegmentationType == "LABELMAP":
        labels.pop(0, None)  # the background, which label maps list as a segment
    return labels


def read_segments(
    path: Path, shape: tuple[int, ...], values: Mapping[int, int], like: Volume | None, image: Path | None
) -> Array:
    """A SEG as a label map int32 of ``shape``, (d, h, w) on the grid of ``like`` or (h, w) of one picture.

    Args:
        values: what to write for each SegmentNumber; a segment that is missing or 0 here is passed over.
        like: the volume that was segmented.
        image: the picture's DICOM file, by which its frames are known; without it, or where it is no DICOM, the SEG
            must be about one picture.

    Where segments overlap, the one of the larger SegmentNumber wins. FRACTIONAL segments count from half their maximum.

    Raises:
        UnreadableImage: "mask-size", "mask-position", "unsupported-format" (tiled slides), or what is wrong with it.
    """
    with open(path, "rb") as file:
        opened = open_dicom(file)
        if "TotalPixelMatrixRows" in opened.header:
            raise UnreadableImage("unsupported-format", f"{path}: a segmentation in tiles")
        mask = np.zeros(shape, np.int32)
        frames = [(_segment(opened, index), index) for index in range(opened.frames)]
        if len(shape) == 2:
            kept = _frames_of(path, opened, image)
            frames = [frame for frame in frames if frame[1] in kept]
        for number, index in sorted(frames):
            marked = _marked(decode(opened, index)[0], opened, number, values)
            if len(shape) == 3:
                assert like is not None
                _place(path, opened, index, marked, like, mask)
            elif marked.shape != mask.shape:
                raise UnreadableImage("mask-size", f"{path}: frames of {marked.shape}, the image has {mask.shape}")
            else:
                mask[marked > 0] = marked[marked > 0]
    return mask


def _segment(opened: Opened, index: int) -> int:
    """The SegmentNumber of a frame; 0 for label maps, whose values are the numbers."""
    if opened.header.SegmentationType == "LABELMAP":
        return 0
    return int(functional_group(opened, index, "SegmentIdentificationSequence").ReferencedSegmentNumber)


def _marked(stored: Array, opened: Opened, number: int, values: Mapping[int, int]) -> Array:
    """One frame with ``values`` in place of what the file stores."""
    if number == 0:
        table = np.zeros(max(int(stored.max(initial=0)), *values, 0) + 1, np.int32)
        table[list(values)] = list(values.values())
        return table[stored]
    least = 1.0
    if opened.header.SegmentationType == "FRACTIONAL":
        least = 0.5 * float(opened.header.MaximumFractionalValue)
    return np.where(stored >= least, np.int32(values.get(number, 0)), np.int32(0))


def _place(path: Path, opened: Opened, index: int, marked: Array, like: Volume, mask: Array) -> None:
    """Write one frame into the volume's mask, where it lies; voxels outside of it, or between its own, are refused."""
    if not marked.any():
        return
    rows, columns = np.nonzero(marked)
    if like.spacing is None:  # nothing says where the volume lies: its frames are numbered
        places = np.stack([np.full(rows.shape, _source_frame(path, opened, index)), rows, columns], axis=1)
    else:
        plane = plane_of(path, opened, index)
        if plane.position is None:
            raise UnreadableImage("mask-position", f"{path}: does not say where its frames lie")
        if plane.reference and like.reference and plane.reference != like.reference:
            raise UnreadableImage("mask-position", f"{path}: in another frame of reference than the image")
        to_index = np.linalg.inv(LPS_TO_RAS @ like.affine)
        origin = to_index[:3, :3] @ plane.position + to_index[:3, 3]
        steps = np.stack([to_index[:3, :3] @ plane.down, to_index[:3, :3] @ plane.across])
        exact = origin + np.stack([rows, columns], axis=1) @ steps
        places = np.rint(exact).astype(np.int64)
        if np.abs(exact - places).max() > TOLERANCE:
            raise UnreadableImage("mask-position", f"{path}: its pixels lie between those of the image")
    if (places < 0).any() or (places >= mask.shape).any():
        raise UnreadableImage("mask-position", f"{path}: frame {index} lies outside the image of {mask.shape}")
    mask[tuple(places.T)] = marked[rows, columns]


def _sources(opened: Opened, index: int) -> set[tuple[str, int]]:
    """SOPInstanceUID and frame number of the images a frame of the SEG was drawn on, as far as it says."""
    derivations = functional_group(opened, index, "DerivationImageSequence").get("SourceImageSequence") or []
    return {(str(item.ReferencedSOPInstanceUID), int(item.get("ReferencedFrameNumber") or 1)) for item in derivations}


def _source_frame(path: Path, opened: Opened, index: int) -> int:
    frames = {frame for _, frame in _sources(opened, index)}
    if len(frames) != 1:
        raise UnreadableImage("mask-position", f"{path}: frame {index} does not name one frame of the image")
    return frames.pop() - 1


def _frames_of(path: Path, opened: Opened, image: Path | None) -> set[int]:
    """The frames that belong to a single picture."""
    sources = {index: _sources(opened, index) for index in range(opened.frames)}
    named = set().union(*sources.values())
    wanted = _instance(image)
    if wanted:
        for series in opened.header.get("ReferencedSeriesSequence") or []:
            named |= {(str(item.ReferencedSOPInstanceUID), 1) for item in series.ReferencedInstanceSequence}
        if named and not any(uid == wanted for uid, _ in named):
            raise UnreadableImage("mask-position", f"{path}: belongs to other images than {image}")
        sources = {index: {one for one in refs if one[0] == wanted} if refs else refs for index, refs in sources.items()
                   if not refs or any(uid == wanted for uid, _ in refs)}  # fmt: skip
    if len(set().union(*sources.values())) > 1:
        raise UnreadableImage("mask-position", f"{path}: belongs to several pictures or frames of one")
    return set(sources)


def _instance(image: Path | None) -> str:
    """The SOPInstanceUID of a DICOM file; "" for other files."""
    if image is None:
        return ""
    try:
        with open(image, "rb") as file:
            return str(open_dicom(file).header.get("SOPInstanceUID", ""))
    except UnreadableImage:
        return ""


# --- writing ----------------------------------------------------------------------------------------------------------


def write_segmentation(mask: Array, classes: Sequence[str], source_files: Sequence[Path], out: Path) -> None:
    """Write a mask as a binary DICOM SEG that belongs to the images it was drawn on.

    Args:
        mask: whole numbers (d, h, w) in the canonical order of axes, or (h, w) of one picture; 0 is background, k is
            ``classes[k - 1]``.
        source_files: the slices of the series in any order, or one file of one or many frames. Patient and study are
            copied from them, so the result stays at the site.
        out: written under a temporary name and renamed.

    Raises:
        UnreadableImage: the source files are no series; ValueError: the mask has not their shape.
    """
    from highdicom.seg import Segmentation, SegmentationTypeValues
    from pydicom import dcmread
    from pydicom.uid import generate_uid

    silence("pydicom", "highdicom")
    thickness = 1.0  # mm, where neither the file nor another slice says
    if mask.ndim == 2:
        files, frames = [Path(source_files[0])], mask[None]
    else:
        files, frames, thickness = _frames_in_source(mask, source_files)
    sources = [dcmread(file, stop_before_pixels=True) for file in files]
    if frames.shape[1:] != (sources[0].Rows, sources[0].Columns):
        raise ValueError(f"a mask of {frames.shape} for images of {sources[0].Rows} x {sources[0].Columns}")
    for source in sources:
        for keyword in _WANTED:
            if keyword not in source:
                setattr(source, keyword, "")
        for item in (source, *_measures(source)):  # highdicom wants it, and reads no SEG without it
            item.SliceThickness = item.get("SliceThickness") or thickness
            if mask.ndim == 3:
                item.SpacingBetweenSlices = thickness  # as the positions say; headers say otherwise at times
    segmentation = Segmentation(
        source_images=sources,
        pixel_array=np.ascontiguousarray(frames, dtype=np.uint8 if len(classes) < 256 else np.uint16),
        segmentation_type=SegmentationTypeValues.BINARY,
        segment_descriptions=[_description(number, name) for number, name in enumerate(classes, start=1)],
        series_instance_uid=generate_uid(),
        series_number=9000,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="Consilium",
        manufacturer_model_name="Consilium",
        software_versions=__version__,
        device_serial_number="0",
        series_description="Segmentation by Consilium",
    )
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    segmentation.save_as(partial)
    partial.replace(out)


def _measures(source: Any) -> list[Any]:
    """The items of a multi-frame file that hold its pixel spacing."""
    groups = [
        *(source.get("SharedFunctionalGroupsSequence") or []),
        *(source.get("PerFrameFunctionalGroupsSequence") or []),
    ]
    return [item for group in groups for item in group.get("PixelMeasuresSequence") or []]


def _frames_in_source(mask: Array, source_files: Sequence[Path]) -> tuple[list[Path], Array, float]:
    """The source files in order, the mask's planes as they belong to them (or to one file's frames), and mm apart."""
    planes = sorted_planes(list(source_files))
    affine = affine_of(planes)
    frames = mask if affine is None else as_in_file(mask, affine)
    if frames.shape != (len(planes), *planes[0].shape):
        raise ValueError(f"a mask of {frames.shape} for {len(planes)} slices of {planes[0].shape}")
    apart = 1.0 if affine is None else _apart(affine)
    if len(source_files) == 1:
        order = np.argsort([plane.frame for plane in planes])
        return [planes[0].path], frames[order], apart
    return [plane.path for plane in planes], frames, apart


def _apart(affine: Affine) -> float:
    """Distance of two slices in mm, across the slices even where the stack is tilted."""
    normal = np.cross(affine[:3, 1], affine[:3, 2])
    return float(abs(normal @ affine[:3, 0]) / np.linalg.norm(normal))


def _description(number: int, name: str) -> Any:
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.seg import SegmentAlgorithmTypeValues, SegmentDescription
    from pydicom.sr.codedict import codes

    category, kind = _concepts(name)
    return SegmentDescription(
        segment_number=number,
        segment_label=name[:64],
        segmented_property_category=category,
        segmented_property_type=kind,
        algorithm_type=SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=AlgorithmIdentificationSequence(
            name="Consilium", version=__version__, family=codes.DCM.ArtificialIntelligence
        ),
    )


def _concepts(name: str) -> tuple[Any, Any]:
    """SNOMED CT category and type for a class name in English; "tissue" for what the dictionary does not know."""
    from pydicom.sr.codedict import codes

    words = [word.capitalize() for word in re.findall("[A-Za-z]+", name)]
    for guess in ("".join(words), *words[::-1]):
        for spelling in (guess, guess.removesuffix("s"), guess.removesuffix("es")):
            kind = getattr(codes.SCT, spelling, None) if spelling else None
            if kind is not None:
                abnormal = spelling in _ABNORMAL or kind.meaning in _ABNORMAL
                category = codes.SCT.MorphologicallyAbnormalStructure if abnormal else codes.SCT.AnatomicalStructure
                return category, kind
    return codes.SCT.Tissue, codes.SCT.Tissue

"""CT phantoms as files: a DICOM series, an Enhanced CT of many frames, or NIfTI, each with its mask.

The same scan gives the same bytes: UIDs and dates come from what names the scan.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    JPEGLSLossless,
    generate_uid,
)

GENERATOR = "abdomen phantom 1"  # goes into README.txt and the headers; raise it when the scans change
_PADDING = -2000  # HU outside of the round field of view
_CODES = {
    "liver": ("10200004", "Liver"),
    "lesion": ("52988006", "Lesion"),
    "spleen": ("78961009", "Spleen"),
    "kidneys": ("64033007", "Kidney"),
    "spine": ("421060004", "Spine"),
}


class Scan(NamedTuple):
    """What is written: HU and classes (d, h, w), slices from feet to head, rows from front to back."""

    hu: NDArray[np.int16]
    labels: NDArray[np.uint8]
    spacing: tuple[float, float, float]  # mm
    identity: str
    hospital: str
    model: str
    key: tuple[int, int, int]

    def uid(self, *words: object) -> str:
        """A UID that depends on the scan and on ``words`` alone."""
        return str(generate_uid(entropy_srcs=[GENERATOR, *map(str, (*self.key, *words))]))

    @property
    def origin(self) -> tuple[float, float, float]:
        """DICOM's position (x, y, z) of the first voxel in mm: the middle of the scan lies at (0, 0, table)."""
        d, h, w = (-(count - 1) / 2 * step for count, step in zip(self.hu.shape, self.spacing, strict=True))
        return round(w, 3), round(h, 3), round(d + 1000 + 10 * (self.key[2] % 50), 3)


# --- NIfTI ------------------------------------------------------------------------------------------------------------


def write_nifti_pair(folder: Path, scan: Scan, values: NDArray[np.uint8]) -> tuple[str, str]:
    """Scan and mask as .nii.gz; ``values`` are what the mask holds for background and each class. Paths in ``folder``.

    Axes run to the right, to the front and upwards, as research programs like them: two are against DICOM's.
    """
    import nibabel

    dz, dy, dx = scan.spacing
    x, y, z = scan.origin
    far = -(x + (scan.hu.shape[2] - 1) * dx), -(y + (scan.hu.shape[1] - 1) * dy)  # the last voxel of both, RAS
    affine = np.array([[dx, 0, 0, far[0]], [0, dy, 0, far[1]], [0, 0, dz, z], [0, 0, 0, 1]])
    paths = f"ct/{scan.identity}.nii.gz", f"masks/{scan.identity}.nii.gz"
    arrays: tuple[NDArray[Any], NDArray[Any]] = (scan.hu, values[scan.labels])
    for path, array in zip(paths, arrays, strict=True):
        (folder / path).parent.mkdir(exist_ok=True)
        image: Any = nibabel.Nifti1Image(np.ascontiguousarray(array.transpose(2, 1, 0)[::-1, ::-1]), affine)
        image.header.set_xyzt_units("mm")
        nibabel.save(image, folder / path)
    return paths


# --- DICOM ------------------------------------------------------------------------------------------------------------


def write_series(folder: Path, scan: Scan, names: Sequence[str]) -> tuple[str, str]:
    """One file per slice, numbered from the head and named at random, round field of view; and a DICOM SEG."""
    path = f"ct/{scan.identity}"
    (folder / path).mkdir(parents=True)
    count, rows, columns = scan.hu.shape
    order = np.random.default_rng(scan.key).permutation(count)
    y, x = np.ogrid[:rows, :columns]
    outside = np.hypot(y - (rows - 1) / 2, x - (columns - 1) / 2) > max(rows, columns) / 2 + 2
    written = []
    for index in range(count):
        ds = _header(scan, CTImageStorage, ("slice", index))
        ds.ImageType, ds.InstanceNumber = ["ORIGINAL", "PRIMARY", "AXIAL"], count - index
        ds.ImagePositionPatient = list(_position(scan, index))
        ds.ImageOrientationPatient, ds.PixelSpacing = [1, 0, 0, 0, 1, 0], [scan.spacing[1], scan.spacing[2]]
        ds.SliceThickness, ds.KVP, ds.PatientPosition = scan.spacing[0], "120", "HFS"
        ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = "1", "-1024", "HU"
        stored = np.where(outside, _PADDING, scan.hu[index] + 1024).astype("<i2")
        _add_pixels(ds, stored, signed=True)
        ds.PixelPaddingValue = _PADDING
        ds.save_as(folder / path / f"IM{order[index]:04d}.dcm", enforce_file_format=True)
        written.append(ds)
    return path, _write_segmentation(folder, scan, written, names)


def write_frames(folder: Path, scan: Scan, names: Sequence[str]) -> tuple[str, str]:
    """One Enhanced CT file (PS3.3 A.38), frames from the head down, JPEG-LS; and a DICOM SEG."""
    path = f"ct/{scan.identity}.dcm"
    (folder / path).parent.mkdir(exist_ok=True)
    count = scan.hu.shape[0]
    ds = _header(scan, EnhancedCTImageStorage, ("frames",))
    ds.ImageType, ds.InstanceNumber = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"], 1
    ds.NumberOfFrames, ds.ContentQualification = count, "RESEARCH"
    ds.AcquisitionContextSequence = []
    shared = Dataset()
    shared.PlaneOrientationSequence = [_item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])]
    shared.PixelMeasuresSequence = [
        _item(PixelSpacing=[scan.spacing[1], scan.spacing[2]], SliceThickness=scan.spacing[0])
    ]
    shared.PixelValueTransformationSequence = [_item(RescaleSlope="0.5", RescaleIntercept="-1024", RescaleType="HU")]
    ds.SharedFunctionalGroupsSequence = [shared]
    organization = scan.uid("dimensions")
    ds.DimensionOrganizationSequence = [_item(DimensionOrganizationUID=organization)]
    ds.DimensionIndexSequence = [
        _item(
            DimensionOrganizationUID=organization,
            DimensionIndexPointer=0x00200032,
            FunctionalGroupPointer=0x00209113,
        )
    ]
    ds.PerFrameFunctionalGroupsSequence = [
        _item(
            FrameContentSequence=[
                _item(StackID="1", InStackPositionNumber=number + 1, DimensionIndexValues=[number + 1])
            ],
            PlanePositionSequence=[_item(ImagePositionPatient=list(_position(scan, count - 1 - number)))],
        )
        for number in range(count)
    ]
    _add_pixels(ds, ((scan.hu[::-1].astype(np.int32) + 1024) * 2).astype("<u2"), signed=False)
    ds.compress(JPEGLSLossless, generate_instance_uid=False)
    ds.save_as(folder / path, enforce_file_format=True)
    return path, _write_segmentation(folder, scan, [ds], names, first_is_top=True)


def _position(scan: Scan, index: int) -> tuple[float, float, float]:
    x, y, z = scan.origin
    return x, y, round(z + index * scan.spacing[0], 3)


def _item(**values: Any) -> Dataset:
    item = Dataset()
    for keyword, value in values.items():
        setattr(item, keyword, value)
    return item


def _header(scan: Scan, kind: str, name: tuple[object, ...]) -> Dataset:
    """What all images of a scan share; all invented."""
    rng = np.random.default_rng([*scan.key, 9])
    day = date(2019, 1, 1) + timedelta(days=int(rng.integers(0, 1800)))
    born = day - timedelta(days=int(rng.integers(20 * 365, 88 * 365)))
    ds = Dataset()
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.SOPClassUID, ds.SOPInstanceUID = kind, scan.uid(*name)
    ds.StudyInstanceUID, ds.SeriesInstanceUID = scan.uid("study"), scan.uid("series")
    ds.FrameOfReferenceUID, ds.PositionReferenceIndicator = scan.uid("frame of reference"), ""
    ds.StudyDate = ds.SeriesDate = ds.AcquisitionDate = ds.ContentDate = day.strftime("%Y%m%d")
    ds.StudyTime = ds.SeriesTime = ds.AcquisitionTime = ds.ContentTime = "101500"
    ds.AccessionNumber = ds.ReferringPhysicianName = ""
    ds.StudyID, ds.SeriesNumber, ds.AcquisitionNumber = scan.identity, 2, 1
    ds.Modality, ds.BodyPartExamined = "CT", "ABDOMEN"
    ds.Manufacturer, ds.ManufacturerModelName = "Phantom Works (fictitious)", scan.model
    ds.DeviceSerialNumber, ds.SoftwareVersions = "0", GENERATOR
    ds.InstitutionName, ds.StudyDescription = scan.hospital, "Synthetic CT of the abdomen"
    ds.PatientName, ds.PatientID = f"Phantom^{scan.identity}", scan.identity
    ds.PatientBirthDate, ds.PatientSex = born.strftime("%Y%m%d"), str(rng.choice(["F", "M"]))
    ds.BurnedInAnnotation, ds.LossyImageCompression = "NO", "00"
    return ds


def _add_pixels(ds: Dataset, stored: NDArray[Any], signed: bool) -> None:
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", int(signed)
    ds.Rows, ds.Columns = stored.shape[-2:]
    ds.BitsAllocated = ds.BitsStored = 16
    ds.HighBit = 15
    ds.WindowCenter, ds.WindowWidth = "40", "400"
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.PixelData = stored.tobytes()
    ds["PixelData"].VR = "OW"


def _write_segmentation(
    folder: Path, scan: Scan, images: list[Dataset], names: Sequence[str], first_is_top: bool = False
) -> str:
    """The classes as a DICOM SEG by highdicom."""
    from highdicom.seg import Segmentation, SegmentationTypeValues, SegmentDescription
    from highdicom.sr import CodedConcept

    path = f"masks/{scan.identity}.dcm"
    (folder / path).parent.mkdir(exist_ok=True)
    structure = CodedConcept("123037004", "SCT", "Anatomical Structure")
    descriptions = [
        SegmentDescription(number, name, structure, CodedConcept(code, "SCT", meaning), "MANUAL")
        for number, (name, (code, meaning)) in enumerate(zip(names, _CODES.values(), strict=True), start=1)
    ]
    labels = scan.labels[::-1] if first_is_top else scan.labels
    seg = Segmentation(
        images,
        np.ascontiguousarray(labels),
        SegmentationTypeValues.BINARY,
        descriptions,
        scan.uid("segmentation series"),
        100,
        scan.uid("segmentation"),
        1,
        "Phantom Works (fictitious)",
        scan.model,
        GENERATOR,
        "0",
    )
    # What highdicom takes from the clock and from chance.
    seg.ContentDate = seg.InstanceCreationDate = images[0].StudyDate
    seg.ContentTime = seg.InstanceCreationTime = images[0].StudyTime
    for item in seg.get("ContributingEquipmentSequence") or []:
        item.ContributionDateTime = images[0].StudyDate + images[0].StudyTime
    organization = scan.uid("segmentation dimensions")
    for item in (*seg.DimensionOrganizationSequence, *seg.DimensionIndexSequence):
        item.DimensionOrganizationUID = organization
    seg.save_as(folder / path)
    return path

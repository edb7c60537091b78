"""The phantom CT cohort: reproducible to the byte, read alike by every reader, and as its description says it is."""

from __future__ import annotations

import csv
import shutil
import subprocess
import tomllib
from pathlib import Path

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from scipy.ndimage import binary_dilation, label
from scipy.stats import binom

from shared.config import load_job
from shared.imaging.masks import read_mask
from shared.imaging.volumes import Volume, read_stack, read_volume
from simulations.cohorts import body, ct, ct_files

SITES, PATIENTS, SEED = 4, 2, 2


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cohort for the tests that only look."""
    folder = tmp_path_factory.mktemp("cohort") / "ct"
    ct.make(folder, SITES, PATIENTS, SEED)
    return folder


def rows(site: Path) -> list[dict[str, str]]:
    """The site's labels.csv."""
    with (site / "labels.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def label_map(site: Path) -> dict[str, str]:
    """The label map of the site's own file."""
    found: dict[str, str] = tomllib.loads((site / "site.toml").read_text(encoding="utf-8")).get("label_map", {})
    return found


def read(site: Path, row: dict[str, str]) -> tuple[Volume, np.ndarray]:
    """One case as a site reads it for the job."""
    volume = read_volume(site / row["path"], "-160 240")
    return volume, read_mask(site / row["mask"], volume.values.shape, body.CLASSES, label_map(site), like=volume)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below the folder, by relative path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def folders(cohort: Path) -> list[Path]:
    """The hospitals' folders in order."""
    return [cohort / ct.scanner(number, SEED).name for number in range(SITES)]


def test_same_arguments_give_the_same_bytes_and_more_leave_them(cohort: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    ct.make(tmp_path / "few", 3, 1, SEED, lambda done, total: seen.append((done, total)))
    assert seen == [(done, 3) for done in range(1, 4)]
    few, many = contents(tmp_path / "few"), contents(cohort)
    for name, data in few.items():
        if name.endswith("labels.csv"):
            assert many[name].startswith(data)
        elif name != "README.txt":
            assert many[name] == data, name
    ct.make(tmp_path / "other", 1, 1, SEED + 1)
    other = contents(tmp_path / "other")
    assert not [name for name, data in other.items() if name.endswith(".dcm") and data == many[name]]
    stamp = (tmp_path / "few" / "hospital-hill" / "labels.csv").stat().st_mtime_ns
    assert ct.make(tmp_path / "few", 3, 1, SEED) == [
        tmp_path / "few" / f"hospital-{n}" for n in ("north", "river", "hill")
    ]
    assert (tmp_path / "few" / "hospital-hill" / "labels.csv").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match=r"--kind ct --sites 3 --patients 2 --seed 2: name a new folder"):
        ct.make(tmp_path / "few", 3, 2, SEED)
    with pytest.raises(ValueError, match="at least 1"):
        ct.make(tmp_path / "none", 0, 1)


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ct.make(tmp_path / "demo", 1, 2, 0, stop)
    assert list(tmp_path.iterdir()) == []


def test_every_kind_of_file_gives_back_what_was_drawn(cohort: Path) -> None:
    """Series with SEG, NIfTI with other numbers and axes, many frames with SEG in German: one array each."""
    kinds = set()
    for number, site in enumerate(folders(cohort)):
        machine = ct.scanner(number, SEED)
        for patient, row in enumerate(rows(site)):
            case = ct.draw(number, patient, SEED)
            volume, mask = read(site, row)
            stack = read_stack(site / row["path"])
            assert np.array_equal(mask, case.labels)
            valid = np.ones(case.hu.shape, bool) if stack.valid is None else stack.valid
            assert np.array_equal(stack.values[valid], case.hu[valid])
            assert valid.mean() > 0.7
            assert (volume.values[~valid] == 0).all()
            assert np.allclose(volume.values[valid], np.clip((case.hu[valid] + 160) / 400, 0, 1), atol=1e-6)
            assert volume.spacing == pytest.approx((machine.thickness, machine.pixel, machine.pixel), abs=1e-4)
            kinds.add((Path(row["path"]).suffix, Path(row["mask"]).suffix, bool(volume.reference)))
    assert kinds == {("", ".dcm", True), (".gz", ".gz", False), (".dcm", ".dcm", True)}


def test_other_programs_read_the_same(cohort: Path) -> None:
    north, river, hill, _ = folders(cohort)
    reader = sitk.ImageSeriesReader()
    for site, patient in ((north, 1), (river, 0), (hill, 1)):
        row = rows(site)[patient]
        path = site / row["path"]
        if path.is_dir():
            names = sorted(path.iterdir())
            places = [pydicom.dcmread(name, stop_before_pixels=True).ImagePositionPatient[2] for name in names]
            assert places != sorted(places)
            assert places != sorted(places, reverse=True)
            reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(path)))
            image = reader.Execute()
        else:
            image = sitk.ReadImage(str(path))
        hu = sitk.GetArrayFromImage(sitk.DICOMOrient(image, "LPS"))
        stack = read_stack(path)
        valid = True if stack.valid is None else stack.valid
        assert np.array_equal(np.where(valid, hu, 0), np.where(valid, stack.values, 0)), site.name
        assert image.GetSpacing() == pytest.approx(read_volume(path).spacing[::-1], abs=1e-4)  # type: ignore[index]
    for site in (north, hill):
        row = rows(site)[0]
        seg = highdicom.seg.segread(site / row["mask"])
        names = [seg.get_segment_description(k).segment_label for k in seg.segment_numbers]
        assert names == [
            ct.scanner((north, hill).index(site) * 2, SEED).labels.get(name, name) for name in body.CLASSES
        ]
        found = seg.get_volume(combine_segments=True, allow_missing_positions=True).array
        _, mask = read(site, row)
        assert np.array_equal(np.bincount(found.ravel(), minlength=6)[1:], np.bincount(mask.ravel(), minlength=6)[1:])
    assert nibabel.aff2axcodes(nibabel.load(river / rows(river)[0]["path"]).affine) == ("R", "A", "S")


@pytest.mark.skipif(shutil.which("dcmdump") is None, reason="dcmtk is not installed here (apt: dcmtk)")
def test_dcmtk_reads_every_kind_of_dicom(cohort: Path) -> None:
    north, _, hill, _ = folders(cohort)
    files = [next((north / "ct" / "C1-0001").iterdir()), hill / rows(hill)[0]["path"], hill / rows(hill)[0]["mask"]]
    for file, kind in zip(files, ("CTImageStorage", "EnhancedCTImageStorage", "SegmentationStorage"), strict=True):
        done = subprocess.run(["dcmdump", "-q", "+P", "SOPClassUID", file], capture_output=True, text=True, check=True)
        assert f"={kind}" in done.stdout
        assert not done.stderr


def test_tables_headers_and_splits(cohort: Path) -> None:
    patients = set()
    for number, site in enumerate(folders(cohort)):
        table = rows(site)
        assert list(table[0]) == ["path", "mask", "patient", "split"]
        assert [row["split"] for row in table] == ["train", "test"]
        patients |= {row["patient"] for row in table}
        machine = ct.scanner(number, SEED)
        if machine.storage != "nifti":
            path = site / table[0]["path"]
            ds = pydicom.dcmread(next(path.iterdir()) if path.is_dir() else path, stop_before_pixels=True)
            assert (ds.PatientID, str(ds.PatientName)) == (table[0]["patient"], f"Phantom^{table[0]['patient']}")
            assert (ds.InstitutionName, ds.SoftwareVersions) == (site.name, ct_files.GENERATOR)
    assert len(patients) == SITES * PATIENTS
    assert label_map(folders(cohort)[2])["Leber"] == "liver"
    assert set(label_map(folders(cohort)[1]).values()) == set(body.CLASSES)


def test_the_anatomy_is_as_described() -> None:
    """Lesions lie in the liver, at the share of patients said; organs have the volume, HU and side they should."""
    with_lesion = [0, 0, 0]
    for number in range(3):
        machine = ct.scanner(number, SEED)
        voxel = machine.thickness * machine.pixel**2 / 1000  # ml
        level = body.PHASES[machine.phase]
        for patient in range(12):
            case = ct.draw(number, patient, SEED)
            of = {name: case.labels == index for index, name in enumerate(body.CLASSES, start=1)}
            with_lesion[number] += len(case.patient.lesions.centres) > 0
            assert of["lesion"].any() == (len(case.patient.lesions.centres) > 0)
            ring = binary_dilation(of["lesion"]) & ~of["lesion"]
            assert not ring.any() or of["liver"][ring].mean() > 0.6
            assert 600 < of["liver"].sum() * voxel < 2900
            assert 60 < of["spleen"].sum() * voxel < 420
            assert 120 < of["kidneys"].sum() * voxel < 480
            assert label(of["kidneys"])[1] >= 2
            middle = case.labels.shape[2] / 2
            assert np.nonzero(of["liver"])[2].mean() < middle < np.nonzero(of["spleen"])[2].mean()
            assert np.nonzero(of["spine"])[1].mean() > np.nonzero(of["liver"])[1].mean()
            assert np.nonzero(of["liver"])[0].mean() > np.nonzero(of["kidneys"])[0].mean()
            assert abs(np.median(case.hu[of["liver"]]) - level["liver"]) < 0.3 * level["liver"] + 15
    assert all(
        low <= count <= high
        for number, count in enumerate(with_lesion)
        for low, high in [binom.interval(0.9999, 12, ct.scanner(number, SEED).build.lesions)]
    )


def test_hu_alone_do_not_tell_the_organs() -> None:
    """The best that any rule on single voxels can do, even one made for each hospital and scored on its own images."""
    for number in range(3):
        cases = [ct.draw(number, patient, SEED) for patient in range(4)]
        hu = np.concatenate([np.clip(case.hu // 8 + 128, 0, 511).ravel() for case in cases])
        labels = np.concatenate([case.labels.ravel() for case in cases]).astype(int)
        counts = np.stack([np.bincount(hu[labels == k], minlength=512) for k in range(6)])
        guess = counts.argmax(0)[hu]
        for k, name in enumerate(body.CLASSES, start=1):
            dice = 2 * np.sum((guess == k) & (labels == k)) / (np.sum(guess == k) + np.sum(labels == k))
            assert dice < (0.8 if name == "liver" else 0.65), (ct.scanner(number, SEED).name, name, dice)


def test_the_job_names_the_classes_of_the_cohort(root: Path) -> None:
    job = load_job(root / "simulations" / "jobs" / "ct-organs-3d.toml")
    assert job.classes == body.CLASSES
    assert job.model.name == "unet3d"

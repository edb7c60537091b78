"""The check before joining: every unreadable file is named, and the decision at the limit is exact."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.sr.codedict import codes

from client.check import Report, check_site
from shared.config import Job, load_job
from shared.errors import SiteRefusal, UserError
from shared.imaging.dataset import load_dataset
from shared.imaging.errors import CODES, UnreadableImage, explained
from shared.imaging.read import read_dicom
from shared.samples import read_samples
from shared.sitefile import read_site
from tests.shared.imaging.test_video import ffmpeg  # noqa: F401
from tests.shared.imaging.test_volumes import phantom, write_series


def site(folder: Path, good: int, bad: int, limit: str = "0.05", form: str = "csv") -> Path:
    """A site with images of both classes and as many files that are no images."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = ["path,label,patient,split"]
    for number in range(good + bad):
        path = folder / f"{number}.png"
        if number < good:
            Image.new("L", (4, 4), number % 256).save(path)
        else:
            path.write_bytes(b"no picture")
        rows.append(f"{path.name},{('left', 'right')[number % 2]},p{number},train")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    text = f'name = "s"\n[data]\nformat = "{form}"\n[limits]\nmax_unreadable = {limit}\n'
    (folder / "site.toml").write_text(text)
    return folder / "site.toml"


@pytest.fixture
def job_file(tiny_job: Job, tmp_path: Path) -> Path:
    (tmp_path / "tiny.toml").write_text(tiny_job.toml())
    return tmp_path / "tiny.toml"


def check(file: Path | None = None, data: Path | None = None, form: str = "auto", **more: Any) -> Report:
    return check_site(file, data, form, more.get("job_file"), more.get("limit"))


@pytest.mark.parametrize(
    ("good", "bad", "limit", "fit"),
    [
        (9, 1, "0.1", True),
        (9, 1, "0.09", False),
        (3, 0, "0", True),
        (2, 1, "0.0", False),
        (0, 3, "1", True),
        (21, 29, "0.58", True),
        (71, 29, "0.29", True),
        (71, 29, "0.28", False),
    ],
)
def test_a_site_is_fit_up_to_its_limit_and_not_beyond(
    tmp_path: Path, good: int, bad: int, limit: str, fit: bool
) -> None:
    report = check(site(tmp_path / "s", good, bad, limit))
    assert (report.read, len(report.unreadable)) == (good, bad)
    assert report.fit is fit
    assert list(report.lines())[-1].startswith("FIT" if fit else "REFUSED")


def test_the_limit_of_the_command_wins_over_the_sites(tmp_path: Path) -> None:
    file = site(tmp_path / "s", 3, 1, "0.05")
    assert not check(file).fit
    assert check(file, limit=0.25).fit
    assert not check(file, limit=0.2).fit


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 6), st.integers(0, 6), st.integers(0, 100))
def test_the_decision_is_that_of_whole_numbers(
    tmp_path_factory: pytest.TempPathFactory, good: int, bad: int, percent: int
) -> None:
    report = check(site(tmp_path_factory.mktemp("s"), good, bad), limit=percent / 100)
    assert report.fit == (good + bad > 0 and 100 * bad <= percent * (good + bad))


def test_every_unreadable_file_is_named_with_its_reason(tmp_path: Path) -> None:
    file = site(tmp_path / "s", 3, 2)
    (tmp_path / "s" / "deep").mkdir()
    (tmp_path / "s" / "deep" / "x.dcm").write_bytes(b"")
    report = check(file)
    found = [(case.path, case.code) for case in report.unreadable]
    expected = [("3.png", "unsupported-format"), ("4.png", "unsupported-format"), ("deep/x.dcm", "empty-file")]
    assert found == expected
    lines = list(report.lines())
    assert f"{file}: 6 files looked at, 3 images can be read" == lines[0]
    for (path, code), line in zip(expected, lines[1:4], strict=True):
        assert path in line
        assert CODES[code] in line
    assert "3 of 6 images (50%)" in lines[-1]
    assert any("labels were not looked at" in line for line in list(check(file, limit=1.0).lines()))


def test_labels_and_splits_are_counted_with_a_job(tmp_path: Path, job_file: Path, three_sites: Path) -> None:
    report = check(three_sites / "a" / "site.toml", job_file=job_file)
    assert report.fit
    counts = {split: dict(counter) for split, counter in report.counts.items()}
    assert counts == {"train": {"left": 6, "right": 6}, "val": {"left": 3, "right": 3}, "test": {"left": 3, "right": 3}}
    assert "  train: 12 images (left 6, right 6)" in list(report.lines())


def test_unreadable_images_are_not_counted(tmp_path: Path, job_file: Path) -> None:
    report = check(site(tmp_path / "s", 3, 2, "1"), job_file=job_file)
    assert dict(report.counts["train"]) == {"left": 2, "right": 1}


def test_the_check_decides_as_training_does(tmp_path: Path, job_file: Path) -> None:
    """A file that labels name counts whatever it is; and that no image is left to train on is not the reason given."""
    file = site(tmp_path / "s", 2, 2)
    for number in (2, 3):
        file.with_name(f"{number}.png").rename(file.with_name(f"{number}.dcm"))
    table = file.with_name("labels.csv")
    table.write_text(table.read_text().replace("2.png", "2.dcm").replace("3.png", "3.dcm"))
    report = check(file, job_file=job_file)
    assert {case.code for case in report.unreadable} == {"not-dicom"}
    assert "2 of 4 images (50%) cannot be read" in report.refused
    job = load_job(job_file)
    with pytest.raises(SiteRefusal, match="2 of 4 images"):
        load_dataset(read_samples(read_site(file), job), read_site(file), job)
    assert "2 of 2 images" in check(site(tmp_path / "t", 0, 2), job_file=job_file).refused


@pytest.mark.parametrize("fault", ["label", "file", "no training", "no table", "short row", "box"])
def test_a_fault_of_the_labels_is_refused_with_its_place(tmp_path: Path, job_file: Path, fault: str) -> None:
    file = site(tmp_path / "s", 3, 0)
    table = file.with_name("labels.csv")
    match fault:
        case "label":
            table.write_text(table.read_text().replace("right", "rihgt"))
        case "file":
            (tmp_path / "s" / "1.png").unlink()
        case "no training":
            table.write_text(table.read_text().replace("train", "test"))
        case "no table":
            table.unlink()
        case "short row":
            table.write_text("label,patient,split,path\nleft\n")
        case "box":
            table.write_text("path,label,split,box\n0.png,left,train,nan 0 1 1\n")
    report = check(file, job_file=job_file)
    words = {"label": "'rihgt'", "file": "1.png", "no training": "training split", "box": "nan"}
    assert not report.fit
    assert words.get(fault, "labels.csv") in list(report.lines())[-1]


def test_boxes_outside_their_image_are_unreadable(tmp_path: Path, job_file: Path) -> None:
    file = site(tmp_path / "s", 2, 0, "0.5")
    rows = "path,label,patient,split,box\n0.png,left,p,train,0 0 2 2\n1.png,right,q,train,9 9 2 2\n"
    file.with_name("labels.csv").write_text(rows)
    report = check(file, job_file=job_file)
    assert [(case.path, case.code) for case in report.unreadable] == [("1.png", "bad-crop")]
    assert report.fit


def test_a_folder_is_checked_without_any_file_of_its_own(tmp_path: Path, job_file: Path) -> None:
    for name in ("left", "right"):
        (tmp_path / "d" / name).mkdir(parents=True)
        for number in range(12):
            Image.new("L", (4, 4)).save(tmp_path / "d" / name / f"{number}.png")
    assert check(data=tmp_path / "d").read == 24
    report = check(data=tmp_path / "d", form="folder", job_file=job_file)
    assert report.fit
    assert sum(sum(counter.values()) for counter in report.counts.values()) == 24


def test_arrays_are_looked_at_too(tmp_path: Path, job_file: Path) -> None:
    labels = np.array([0, 1, 0, 1])
    np.savez(tmp_path / "x.npz", train_images=np.zeros((4, 6, 6), np.uint8), train_labels=labels)
    report = check(data=tmp_path, job_file=job_file)
    assert (report.fit, report.read) == (True, 4)


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    report = check(data=tmp_path)
    assert not report.fit
    assert "no image was found" in report.refused


def test_wrong_use_is_one_line(tmp_path: Path) -> None:
    file = site(tmp_path / "s", 1, 0)
    uses: list[dict[str, Any]] = [
        {},
        {"file": file, "data": tmp_path},
        {"data": tmp_path / "gone"},
        {"data": tmp_path, "form": "dicmo"},
        {"file": file, "limit": 1.5},
        {"file": file, "limit": float("nan")},
        {"file": file, "job_file": tmp_path / "gone.toml"},
        {"file": tmp_path / "gone.toml"},
    ]
    for use in uses:
        with pytest.raises(UserError) as caught:
            check(**use)
        assert "\n" not in str(caught.value)


def test_the_check_writes_nothing(tmp_path: Path, job_file: Path, three_sites: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    check(three_sites / "a" / "site.toml", job_file=job_file)
    check(three_sites / "a" / "site.toml")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_odd_and_broken_dicom_files_are_all_answered_for(shared_data: Callable[[str], Path]) -> None:
    folder = shared_data("dicom_robustness")
    report = check(data=folder, form="dicom")
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    unreadable = {case.path: case.code for case in report.unreadable}
    assert report.read + len(unreadable) == len(files)
    assert set(unreadable) <= files
    assert set(unreadable.values()) <= set(CODES)
    assert {"SOURCE.md", "manifest.csv"} <= set(unreadable)
    for name in sorted(files)[::15]:
        try:
            read_dicom(folder / name)
            code = None
        except UnreadableImage as error:
            code = error.code
        assert unreadable.get(name) == code
    assert all("\n" not in line for line in report.lines())
    assert json.dumps(report.unreadable)


# --- faults within a case: the line names the slice or the mask, and the other cases go on ----------------------------


def labels_of(scan: sitk.Image) -> sitk.Image:
    """A mask of 0, 1 and 2 on the grid of a scan."""
    mask = sitk.GetImageFromArray((np.arange(6 * 9 * 8) % 3).astype(np.uint8).reshape(6, 9, 8))
    mask.CopyInformation(scan)
    return mask


@pytest.fixture
def ct(tmp_path: Path) -> tuple[Path, Path]:
    """The site.toml of four CT series by ITK with NIfTI masks, and a job of two organs."""
    rows = ["path,mask,patient,split"]
    (tmp_path / "ct" / "masks").mkdir(parents=True)
    for k in range(4):
        write_series(tmp_path / "ct" / "scans" / str(k), phantom(), f"1.2.3.{k}", f"p{k}")
        sitk.WriteImage(labels_of(phantom()), str(tmp_path / "ct" / "masks" / f"{k}.nii.gz"))
        rows.append(f"scans/{k},masks/{k}.nii.gz,p{k},train")
    (tmp_path / "ct" / "labels.csv").write_text("\n".join(rows))
    (tmp_path / "ct" / "site.toml").write_text('name = "s"\n[limits]\nmax_unreadable = 0.25\n')
    job = 'name = "j"\ntask = "segmentation"\n[data]\nclasses = "liver,lesion"\n[model]\nname = "unet3d"\ndepth = 2\n'
    (tmp_path / "job.toml").write_text(job)
    return tmp_path / "ct" / "site.toml", tmp_path / "job.toml"


def write_seg(files: list[Path], names: list[str], out: Path) -> None:
    """A DICOM SEG by highdicom with a segment per name."""
    sources = [pydicom.dcmread(file) for file in files]
    for source in sources:
        source.SliceThickness = 2.5
    segments = [
        highdicom.seg.SegmentDescription(number, name, codes.SCT.AnatomicalStructure, codes.SCT.Liver, "MANUAL")
        for number, name in enumerate(names, start=1)
    ]
    pixels = np.full((len(files), 9, 8), len(names), np.uint8)
    uids = ("1.2.9", 1, "1.2.9.1", 1)
    highdicom.seg.Segmentation(sources, pixels, "BINARY", segments, *uids, "maker", "model", "1", "1").save_as(out)


def spoil(fault: str, root: Path) -> str:
    """Put one fault into the third case; what its line must say."""
    scan, mask = root / "scans" / "2", root / "masks" / "2.nii.gz"
    slices = {str(pydicom.dcmread(file).SOPInstanceUID)[-1]: file for file in scan.iterdir()}
    match fault:
        case "missing slice":
            slices["3"].unlink()
            below, above = slices["2"].name, slices["4"].name
            return f"(missing-slice): 5 mm between scans/2/{below} and scans/2/{above}, elsewhere 2.5 mm"
        case "mixed series":
            write_series(root / "scout", phantom(), "1.9")[0].rename(scan / "scout.dcm")
            return "scout.dcm, for example); give each series a folder"
        case "slice cut":
            slices["3"].write_bytes(slices["3"].read_bytes()[:-20])
            return f"(truncated): scans/2/{slices['3'].name}: "
        case "slice empty":
            slices["3"].write_bytes(b"")
            return f"(empty-file): scans/2/{slices['3'].name}"
        case "series in folders":
            for number, file in slices.items():
                (scan / number).mkdir()
                file.rename(scan / number / file.name)
            return "folders within it are not looked into, name the one of the series"
        case "mask size":
            sitk.WriteImage(labels_of(phantom())[:, :, :-1], str(mask))
            return "(mask-size): masks/2.nii.gz: a mask of 5 x 9 x 8, its image has 6 x 9 x 8"
        case "mask value":
            sitk.WriteImage(labels_of(phantom()) * 2, str(mask))
            return "(unknown-class): masks/2.nii.gz: value 4; allowed are 0 (background), 1 liver, 2 lesion"
        case "mask cut":
            mask.write_bytes(mask.read_bytes()[:40])
            return "masks/2.nii.gz: "
        case "segment":
            write_seg(list(slices.values()), ["liver", "Tumour"], scan.with_name("2.dcm"))
            table = root / "labels.csv"
            table.write_text(table.read_text().replace("masks/2.nii.gz", "scans/2.dcm"))
            return "(unknown-class): scans/2.dcm: segment 'Tumour' is not a class of the job (liver, lesion); map it"
    raise AssertionError(fault)


FAULTS = "missing slice,mixed series,slice cut,slice empty,series in folders,mask size,mask value,mask cut,segment"


@pytest.mark.parametrize("fault", FAULTS.split(","))
def test_a_fault_within_a_case_is_one_line_that_names_the_file(
    ct: tuple[Path, Path], fault: str, capfd: pytest.CaptureFixture[str]
) -> None:
    file, job = ct
    wanted = spoil(fault, file.parent)
    report = check(file, job_file=job)
    named = [line for line in report.lines() if "cannot be read:" in line]
    assert len(named) == 1
    assert named[0].startswith("  cannot be read: scans/2: ")
    assert wanted in named[0]
    assert named[0].isprintable()
    assert (report.read, report.images["train"], report.fit) == (3, 3, True)
    assert check(file, job_file=job, limit=0.2).refused.startswith("1 of 4 images (25%) cannot be read")
    assert capfd.readouterr() == ("", "")


def test_a_label_map_that_names_no_class_refuses_the_site(ct: tuple[Path, Path]) -> None:
    file, job = ct
    file.write_text(file.read_text() + '[label_map]\n"2" = "leison"\n')
    report = check(file, job_file=job)
    assert not report.fit
    assert "masks/0.nii.gz: value 2: [label_map] in site.toml makes it 'leison', which is not a class" in report.refused


def test_a_film_that_cannot_be_read_is_one_line_and_boxes_left_out_are_told(
    tmp_path: Path,
    ffmpeg: Callable[..., None],  # noqa: F811
) -> None:
    source = ("-f", "lavfi", "-i", "testsrc2=size=96x64:rate=10:duration=1")
    ffmpeg(*source, "-c:v", "mpeg4", tmp_path / "good.avi")
    ffmpeg(*source, "-frames:v", "0", "-c:v", "mpeg4", "-f", "mp4", tmp_path / "none.mp4")
    rows = ["path,label,x,y,width,height,frame,split"]
    rows += [f"{name},cell,5,5,20,{k},{k},train" for name in ("good.avi", "none.mp4") for k in range(0, 9, 3)]
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    (tmp_path / "job.toml").write_text(
        'name = "j"\ntask = "detection"\n[data]\nclasses = "cell"\n[model]\nname = "fasterrcnn_small"\n'
    )
    report = check(data=tmp_path, job_file=tmp_path / "job.toml", limit=0.5)
    assert list(report.lines())[1:3] == [
        f"  cannot be read: none.mp4: {CODES['no-frames']} (no-frames) (3 times)",
        "  left out: 1 boxes of no extent, or too small in the fitted image, in good.avi",
    ]
    assert report.fit
    # Without labels, films and volumes are looked at too.
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 5, 6), np.int16), np.eye(4)), tmp_path / "v.nii.gz")
    (tmp_path / "w.nii").write_bytes((tmp_path / "v.nii.gz").read_bytes()[:-5])
    bare = check(data=tmp_path)
    assert (bare.read, [case.path for case in bare.unreadable]) == (2, ["none.mp4", "w.nii"])


def test_what_is_explained_is_one_line_with_names_as_the_site_knows_them() -> None:
    said = f"corrupt): {'x' * 300}"
    assert explained("a/1.png", "corrupt", "x" * 900).endswith(said)
    for root in ("/data/site", "/data/site/"):
        line = explained("m/1.png", "mask-size", "/data/site/m/1.png: bad,\n see '/data/site/a b.nii'", root)
        assert line == f"m/1.png: {CODES['mask-size']} (mask-size): bad, see 'a b.nii'"
    assert explained("a", "not-found", "s/a", "s") == f"a: {CODES['not-found']} (not-found)"
    assert explained("a", "corrupt", "files/a: bad", "s").endswith("(corrupt): files/a: bad")
    assert explained("a\nb\udc80", "corrupt").isprintable()

"""The phantom cohort: reproducible to the byte, readable by other readers, and without a short cut to the label."""

import csv
import tomllib
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK
from scipy.stats import binom
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from simulations.cohorts import chest

SITES, PATIENTS, SEED = 3, 72, 5
OPACITY = {"opacity", "Verschattung"}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cohort for the tests that only look."""
    folder = tmp_path_factory.mktemp("cohort") / "demo"
    chest.make(folder, SITES, PATIENTS, SEED)
    return folder


def rows(site: Path) -> list[dict[str, str]]:
    """The site's labels.csv."""
    with (site / "labels.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def sites(folder: Path) -> list[Path]:
    """The hospitals' folders."""
    return sorted(path for path in folder.iterdir() if path.is_dir())


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below the folder, by relative path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def shown(ds: pydicom.Dataset) -> np.ndarray:
    """The image as a viewer shows it: windowed to [0, 1], bone bright."""
    image = np.clip((ds.pixel_array - float(ds.WindowCenter)) / float(ds.WindowWidth) + 0.5, 0.0, 1.0)
    return 1.0 - image if ds.PhotometricInterpretation == "MONOCHROME1" else image


def test_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    chest.make(tmp_path / "a", 3, 4, 1, lambda done, total: seen.append((done, total)))
    chest.make(tmp_path / "b", 3, 4, 1)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert seen == [(done, 12) for done in range(1, 13)]
    chest.make(tmp_path / "c", 3, 4, 2)
    assert contents(tmp_path / "a") != contents(tmp_path / "c")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_earlier_patients_and_other_sites_stay_as_they_are(tmp_path: Path) -> None:
    chest.make(tmp_path / "small", 2, 3, 1)
    chest.make(tmp_path / "large", 5, 6, 1)
    small, large = contents(tmp_path / "small"), contents(tmp_path / "large")
    images = [name for name in small if name.endswith(".dcm")]
    assert images
    assert all(small[name] == large[name] for name in images)
    for site in ("hospital-north", "hospital-river"):
        assert large[f"{site}/labels.csv"].startswith(small[f"{site}/labels.csv"])
        assert large[f"{site}/site.toml"] == small[f"{site}/site.toml"]


def test_a_site_does_not_depend_on_the_number_of_sites(tmp_path: Path) -> None:
    chest.make(tmp_path / "two", 2, 3, 9)
    chest.make(tmp_path / "four", 4, 3, 9)
    two, four = contents(tmp_path / "two"), contents(tmp_path / "four")
    assert all(four[name] == data for name, data in two.items() if name != "README.txt")


def test_prevalence_is_the_hospitals(cohort: Path) -> None:
    for number, site in enumerate(chest.scanner(number, SEED).name for number in range(SITES)):
        labels = {row["patient"]: row["label"] in OPACITY for row in rows(cohort / site)}
        low, high = binom.interval(0.9999, PATIENTS, chest.scanner(number, SEED).prevalence)
        assert len(labels) == PATIENTS
        assert low <= sum(labels.values()) <= high


def test_two_readers_see_equal_pixels(tmp_path: Path) -> None:
    syntaxes = set()
    for site in chest.make(tmp_path / "demo", 6, 3, 0):
        for row in rows(site):
            ds = pydicom.dcmread(site / row["path"])
            syntaxes.add(ds.file_meta.TransferSyntaxUID)
            other = np.squeeze(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(site / row["path"]))))
            if ds.PhotometricInterpretation == "MONOCHROME1":
                other = 2**ds.BitsStored - 1 - other  # ITK turns these to bone bright by itself
            assert np.array_equal(ds.pixel_array, other)
            assert ds.pixel_array.max() < 2**ds.BitsStored
    assert len(syntaxes) == 4


def test_headers_are_complete_and_fictitious(cohort: Path) -> None:
    needed = [
        "SOPClassUID",
        "SOPInstanceUID",
        "StudyInstanceUID",
        "SeriesInstanceUID",
        "Modality",
        "PresentationIntentType",
        "ImageType",
        "PatientOrientation",
        "ImageLaterality",
        "AnatomicRegionSequence",
        "ImagerPixelSpacing",
        "PixelIntensityRelationship",
        "PixelIntensityRelationshipSign",
        "RescaleIntercept",
        "RescaleSlope",
        "RescaleType",
        "PresentationLUTShape",
        "LossyImageCompression",
        "BurnedInAnnotation",
        "WindowCenter",
        "WindowWidth",
        "StudyDate",
        "InstanceNumber",
        "Manufacturer",
    ]
    instances, photometric = set(), {}
    for site in sites(cohort):
        for row in rows(site):
            ds = pydicom.dcmread(site / row["path"], stop_before_pixels=True)
            assert not [name for name in needed if ds.get(name) in (None, "")]
            assert ds.SOPClassUID == "1.2.840.10008.5.1.4.1.1.1.1"
            assert str(ds.PatientName) == f"Phantom^{row['patient']}"
            assert (ds.PatientID, ds.PatientSex, int(ds.PatientAge[:3])) == (
                row["patient"],
                row["sex"],
                int(row["age"]),
            )
            years = (int(ds.StudyDate) - int(ds.PatientBirthDate)) // 10000
            assert years == int(row["age"])
            instances.add(ds.SOPInstanceUID)
            photometric.setdefault(site.name, set()).add(ds.PhotometricInterpretation)
    assert len(instances) == sum(len(rows(site)) for site in sites(cohort))
    assert sum(kinds == {"MONOCHROME1"} for kinds in photometric.values()) == 1
    assert sum(kinds == {"MONOCHROME2"} for kinds in photometric.values()) == SITES - 1


def test_a_header_does_not_tell_the_label(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(chest, "draw_opacity", lambda *_: None)
    kept: dict[str, list[str]] = {}
    for share in (0.0, 1.0):
        machine = chest.Scanner(**{**vars(chest.scanner(0, 0)), "prevalence": share})
        folder = tmp_path / str(share)
        list(chest._write_site(folder, machine, 0, 3, 0))
        files = sorted((folder / "images").iterdir())
        kept[str(share)] = [path.read_bytes().hex() for path in files]
    assert kept["0.0"] == kept["1.0"]


def test_one_site_maps_its_own_label_names(cohort: Path) -> None:
    maps = {}
    for site in sites(cohort):
        config = tomllib.loads((site / "site.toml").read_text(encoding="utf-8"))
        assert config["name"] == site.name
        assert config["data"] == {"format": "csv", "csv": "labels.csv"}
        maps[site.name] = config.get("label_map", {})
        names = {maps[site.name].get(row["label"], row["label"]) for row in rows(site)}
        assert names == {"normal", "opacity"}
    assert [found for found in maps.values() if found] == [{"Verschattung": "opacity", "unauffällig": "normal"}]


def test_a_folder_with_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not lose me")
    with pytest.raises(ValueError, match=r"is not empty.*name a new folder"):
        chest.make(tmp_path / "mine", 1, 1)
    assert contents(tmp_path / "mine") == {"thesis.txt": b"do not lose me"}
    (tmp_path / "empty").mkdir()
    first = chest.make(tmp_path / "empty", 1, 1)
    stamp = (first[0] / "labels.csv").stat().st_mtime_ns
    assert chest.make(tmp_path / "empty", 1, 1) == first
    assert (first[0] / "labels.csv").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="--patients 2"):
        chest.make(tmp_path / "empty", 1, 2)
    with pytest.raises(ValueError, match="at least 1"):
        chest.make(tmp_path / "none", 0, 1)


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chest.make(tmp_path / "demo", 1, 2, 0, stop)
    assert list(tmp_path.iterdir()) == []


def test_no_short_cut_to_the_label(cohort: Path) -> None:
    """Neither brightness, histogram nor a thumbnail gives the label away: the finding is a local thing."""
    for site in sites(cohort):
        table = rows(site)
        labels = np.array([row["label"] in OPACITY for row in table])
        images = [shown(pydicom.dcmread(site / row["path"])) for row in table]
        histogram = [[image.mean(), image.std(), *np.histogram(image, 16, (0, 1))[0] / image.size] for image in images]
        thumbnail = [SimpleITK.GetArrayFromImage(thumb(image)).ravel() for image in images]
        for features in (histogram, thumbnail):
            model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
            score = cross_val_predict(
                model,
                np.array(features),
                labels,
                groups=[row["patient"] for row in table],
                cv=GroupKFold(5),
                method="decision_function",
            )
            assert roc_auc_score(labels, score) < 0.77, site.name


def thumb(image: np.ndarray) -> SimpleITK.Image:
    """The image as 8 by 8 block means."""
    high, wide = image.shape[0] // 8 * 8, image.shape[1] // 8 * 8
    blocks = image[:high, :wide].reshape(8, high // 8, 8, wide // 8).mean((1, 3))
    return SimpleITK.GetImageFromArray(blocks)

"""`consilium predict`: every readable image is predicted, what cannot be read is named, OUT is whole or not there."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from highdicom.seg import segread
from PIL import Image

from consilium.predict import AT_ONCE, predict
from consilium.trained import open_run
from server.store import write_model
from shared.cases import Sample, SiteData
from shared.config import Job, job_from_flat
from shared.errors import UserError
from shared.files import write_text
from shared.imaging.dataset import Dataset
from shared.imaging.read import fit, read_image
from shared.tasks import TASKS
from shared.tasks.classification import build_model, collect
from shared.tasks.classification import predict as predict_classes
from shared.tasks.classification import write as write_classes
from simulations.cohorts.chest import make
from simulations.simulate import run
from tests.conftest import called, examples, save_run

CONSILIUM = Path(sys.executable).parent / "consilium"
CPU = torch.device("cpu")


def consilium(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([CONSILIUM, *map(str, args)], capture_output=True, text=True, timeout=100)


def table(out: Path) -> dict[str, dict[str, str]]:
    """The rows of predictions.csv by path."""
    with (out / "predictions.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return {row["path"]: row for row in csv.DictReader(file)}


@pytest.fixture
def trained(tiny_job: Job, tmp_path: Path) -> Path:
    return save_run(tmp_path / "run", tiny_job)


def pictures(folder: Path, n: int, seed: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, pixels in enumerate(np.random.default_rng(seed).integers(0, 256, (n, 20, 14)).astype(np.uint8)):
        Image.fromarray(pixels).save(folder / f"{number:03}.png")
    return folder


# --- one run, as a person makes it ------------------------------------------------------------------------------------


def test_a_run_predicts_the_labels_it_was_tested_on_as_it_did_in_the_test(
    tiny_job: Job, three_sites: Path, tmp_path: Path
) -> None:
    result = run(tiny_job.replace(federation__rounds=8), three_sites, tmp_path / "run")
    done = consilium("predict", tmp_path / "run", three_sites / "c" / "images", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "40 of 40 cases predicted" in done.stdout
    found = table(tmp_path / "out")
    with (three_sites / "c" / "labels.csv").open() as file:
        tested = [row for row in csv.DictReader(file) if row["split"] == "test"]
    right = sum(found[Path(row["path"]).name]["label"] == row["label"] for row in tested)
    assert right / len(tested) == pytest.approx(result.scores["federated"]["sites"]["c"]["accuracy"])
    assert right > len(tested) / 2
    facts = json.loads((tmp_path / "out" / "prediction.json").read_text())
    assert facts["job_sha256"] == result.scores["job_sha256"]
    assert "ATTENTION" not in done.stdout
    journal = tmp_path / "run" / "rounds.jsonl"
    journal.write_text("".join(line for line in journal.open() if '"finish"' not in line))  # as if it had been killed
    again = consilium("predict", tmp_path / "run", three_sites / "c" / "images", "--out", tmp_path / "out")
    assert "did not finish, it came to round 8" in again.stdout.splitlines()[0]
    (aside,) = tmp_path.glob("out.before-*")
    assert again.stderr.strip() == f"what was in {tmp_path / 'out'} is kept in {aside}"
    assert facts["round"] == result.scores["federated"]["best_round"]
    assert (facts["cases"], facts["unreadable"]) == (40, [])


# --- what is predicted ------------------------------------------------------------------------------------------------


def test_probabilities_are_those_of_the_network_run_by_hand(tmp_path: Path, tiny_job: Job) -> None:
    """More cases than are decoded at once, so that the parts must come together in order."""
    folder = pictures(tmp_path / "in", AT_ONCE + 3)
    predict(save_run(tmp_path / "run", tiny_job), folder, tmp_path / "out")
    found = table(tmp_path / "out")
    assert list(found) == [path.name for path in sorted(folder.iterdir())]
    model = build_model(tiny_job).eval()
    for path in sorted(folder.iterdir()):
        image = np.rint(fit(read_image(path), 16, 16, 1) * 65535) / 65535
        with torch.no_grad():
            odds = model((torch.from_numpy(image).float()[None] - 0.5) / 0.25)[0].exp()
        shares = (odds / odds.sum()).tolist()
        row = found[path.name]
        assert [float(row[f"probability:{name}"]) for name in ("left", "right")] == pytest.approx(shares, abs=2e-6)
        assert row["label"] == ("left" if shares[0] > shares[1] else "right")


@pytest.mark.parametrize("multilabel", [False, True])
def test_predicted_classes_are_those_that_the_sums_count(tiny_job: Job, multilabel: bool) -> None:
    job = job_from_flat(tiny_job.flat() | {"data.classes": "a,b,c", "data.multilabel": multilabel})
    generator = np.random.default_rng(3)
    images = generator.integers(0, 65536, (30, 1, 16, 16)).astype(np.uint16)
    targets = [tuple(sorted(set(generator.integers(0, 3, 2).tolist()))) if multilabel else (k % 3,) for k in range(30)]
    data = Dataset.of([Sample(str(k), target, "", "test") for k, target in enumerate(targets)], image=images)
    model = build_model(job)
    model.head.bias.data = torch.tensor([0.02, 0.0, -0.02])
    found = list(predict_classes(model, data, job, CPU))
    sums = collect(model, data, job, CPU)
    if multilabel:
        expected = np.zeros((3, 4), int)
        for target, prediction in zip(targets, found, strict=True):
            for k in range(3):
                expected[k, 2 * (k in target) + (k in prediction.classes)] += 1
    else:
        expected = np.zeros((3, 3), int)
        for target, prediction in zip(targets, found, strict=True):
            expected[target[0], prediction.classes[0]] += 1
        assert all(sum(prediction.probabilities) == pytest.approx(1) for prediction in found)
    assert sums["confusion"] == expected.flatten().tolist()


def test_several_labels_and_none_are_written(tmp_path: Path, tiny_job: Job) -> None:
    job = job_from_flat(tiny_job.flat() | {"data.multilabel": True})
    images = np.zeros((3, 1, 16, 16), np.uint16)
    data = Dataset.of([Sample(f"{k}.png", (), "", "test") for k in range(3)], image=images)
    model = build_model(job)
    torch.nn.init.zeros_(model.head.weight)
    rows = []
    for bias in ([1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0]):
        model.head.bias.data = torch.tensor(bias)
        (first, *_) = predict_classes(model, data, job, CPU)
        rows.append(first)
    write_classes(zip(data.samples, rows, strict=True), SiteData("s", tmp_path), job, tmp_path)
    found = table(tmp_path)
    assert [row["label"] for row in found.values()] == ["left|right", "right", ""]
    assert found["0.png"]["probability:left"] == "0.731059"


def test_dicom_files_are_predicted_as_the_site_would_see_them(tmp_path: Path, tiny_job: Job) -> None:
    make(tmp_path / "cohort", sites=3, patients=2)
    done = predict(save_run(tmp_path / "run", tiny_job), tmp_path / "cohort", tmp_path / "out")
    files = {path.relative_to(tmp_path / "cohort").as_posix() for path in (tmp_path / "cohort").rglob("*.dcm")}
    assert set(table(tmp_path / "out")) == files
    assert done.unreadable == []
    assert done.cases == len(files) >= 6


def test_one_file_is_taken_whatever_its_name(tmp_path: Path, trained: Path) -> None:
    pictures(tmp_path / "in", 2)
    odd = tmp_path / "in" / ".hidden picture.txt"
    (tmp_path / "in" / "000.png").rename(odd)
    done = predict(trained, odd, tmp_path / "out")
    assert done.cases == 1
    assert list(table(tmp_path / "out")) == [odd.name]


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_unreadable_files_are_named_and_the_others_are_predicted(tmp_path: Path, trained: Path) -> None:
    folder = pictures(tmp_path / "in", 3)
    (folder / "deep").mkdir()
    (folder / "deep" / "cut.png").write_bytes((folder / "000.png").read_bytes()[:60])
    (folder / "empty.dcm").write_bytes(b"")
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(b"")
    done = consilium("predict", trained, folder, "--out", tmp_path / "out")
    assert done.returncode == 0
    assert done.stderr == ""
    assert "3 of 5 cases predicted, 2 cannot be read" in done.stdout
    assert "cannot be read: deep/cut.png: " in done.stdout
    assert "cannot be read: empty.dcm: the file has no bytes (empty-file)" in done.stdout
    assert sorted(table(tmp_path / "out")) == ["000.png", "001.png", "002.png"]
    facts = json.loads((tmp_path / "out" / "prediction.json").read_text())
    assert {item["path"] for item in facts["unreadable"]} == {"deep/cut.png", "empty.dcm"}


def test_if_nothing_can_be_read_the_exit_code_is_1_and_nothing_is_written(
    tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"not a picture")
    code, said, errors = called(capsys, "predict", trained, tmp_path / "in", "--out", tmp_path / "out")
    assert (code, errors) == (1, "")
    assert "0 of 1 cases predicted, 1 cannot be read" in said
    assert not (tmp_path / "out").exists()


def test_odd_and_broken_dicom_gives_predictions_or_names(
    shared_data: Callable[[str], Path], trained: Path, tmp_path: Path
) -> None:
    folder = shared_data("dicom_robustness")
    done = predict(trained, folder, tmp_path / "out")
    assert done.cases > 0
    assert done.unreadable
    assert len(table(tmp_path / "out")) == done.cases


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("no run", "no run folder"), ("no weights", "the run has not finished a round"), ("no last", "--weights best"),
        ("bad word", "best, last"), ("broken weights", "not a file of weights"), ("job changed", "by another job"),
        ("other network", "does not fit cnn"), ("no path", "no such file"), ("no image", "no image was found"),
        ("out holds files", "name a new folder"), ("out is a file", "cannot write there"),
        ("out is here", "the folder you are in"), ("no such device", "write auto, cpu"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_exit_code_2(
    kind: str,
    named: str,
    trained: Path,
    tiny_job: Job,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    folder, out, more = pictures(tmp_path / "in", 1), tmp_path / "out", []
    weights = trained / "model.safetensors"
    match kind:
        case "no run":
            (trained / "job.toml").unlink()
        case "no weights":
            weights.unlink()
        case "no last":
            more = ["--weights", "last"]
        case "bad word":
            more = ["--weights", "bset"]
        case "broken weights":
            weights.write_bytes(weights.read_bytes()[:100])
        case "job changed":
            write_text(trained / "job.toml", tiny_job.replace(data__size=32).toml())
        case "other network":
            write_model(weights, {"a": torch.zeros(2)}, {"job": tiny_job.sha256})
        case "no path":
            shutil.rmtree(folder)
        case "no image":
            (folder / "000.png").rename(folder / "a.txt")
        case "out holds files":
            out.mkdir()
            (out / "mine.txt").write_text("keep")
        case "out is a file":
            out.write_text("keep")
        case "out is here":
            out = Path(".")
        case "no such device":
            more = ["--device", "gpu7"]
    code, _, errors = called(capsys, "predict", trained, folder, "--out", out, *more)
    assert (code, errors.count("\n")) == (2, 1), errors
    assert errors.startswith("consilium: ")
    assert named in errors
    if kind.startswith("out holds"):
        assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_out_appears_whole_or_not_at_all_and_earlier_predictions_are_kept(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shared.tasks import classification

    folder, out = pictures(tmp_path / "in", 3), tmp_path / "out"

    def stopped(model, data, job, device):  # type: ignore[no-untyped-def]
        yield next(iter(predict_classes(model, data, job, device)))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(classification, "predict", stopped)
        with pytest.raises(KeyboardInterrupt):
            predict(trained, folder, out)
    assert not out.exists()
    first = predict(trained, folder, out)
    assert {path.name for path in out.iterdir()} == {"predictions.csv", "prediction.json"}
    assert first.files == [out / "predictions.csv"]
    predict(trained, folder / "001.png", out)
    (aside,) = tmp_path.glob("out.before-*")
    assert len(table(aside)) == 3
    assert len(table(out)) == 1


def test_progress_counts_every_case(trained: Path, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "in", AT_ONCE + 5)
    heard: list[tuple[int, int]] = []
    predict(trained, folder, tmp_path / "out", progress=lambda done, of: heard.append((done, of)))
    assert heard[0] == (0, AT_ONCE + 5)
    assert heard[-1] == (AT_ONCE + 5, AT_ONCE + 5)
    assert heard == sorted(heard)


# --- a frozen backbone ------------------------------------------------------------------------------------------------


def test_of_a_frozen_backbone_the_head_is_joined_with_the_backbone_it_was_trained_on(
    tiny_job: Job, three_sites: Path, tmp_path: Path
) -> None:
    backbone = tmp_path / "backbone.pt"
    torch.save(build_model(tiny_job.replace(seed=8)).state_dict(), backbone)
    job = tiny_job.replace(model__weights=str(backbone), model__freeze="backbone", federation__rounds=1)
    run(job, three_sites, tmp_path / "run")
    opened, start = open_run(tmp_path / "run").model.state_dict(), build_model(job).state_dict()
    moved = {name for name, value in start.items() if not torch.equal(opened[name], value)}
    assert moved == {"head.weight", "head.bias"}
    torch.save(build_model(tiny_job.replace(seed=9)).state_dict(), backbone)
    with pytest.raises(UserError, match="is not the backbone it was trained on"):
        open_run(tmp_path / "run")
    backbone.unlink()
    with pytest.raises(UserError, match="no such file"):
        open_run(tmp_path / "run")


def test_of_a_whole_model_the_weights_it_started_from_are_not_needed(tiny_job: Job, tmp_path: Path) -> None:
    start = tmp_path / "start.pt"
    torch.save(build_model(tiny_job.replace(seed=8)).state_dict(), start)
    folder = save_run(tmp_path / "run", tiny_job.replace(model__weights=str(start)))
    expected = build_model(tiny_job.replace(seed=8)).state_dict()
    start.unlink()
    assert all(torch.equal(value, expected[name]) for name, value in open_run(folder).model.state_dict().items())


# --- every task -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [task for task in TASKS if task != "generation"])
def test_every_task_predicts_the_files_of_a_folder_and_names_the_broken_one(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = examples(task)
    name, settings = next(iter(example.JOBS.items()))
    job = job_from_flat({"task": task, "model.name": name} | settings)
    example.site(tmp_path / "site", job, "a", 4, 0)
    run_folder = save_run(tmp_path / "run", job)
    code, said, errors = called(capsys, "predict", run_folder, tmp_path / "site", "--out", tmp_path / "out")
    assert (code, errors) == (0, ""), errors
    facts = json.loads((tmp_path / "out" / "prediction.json").read_text())
    assert facts["task"] == task
    assert facts["cases"] >= 4
    assert facts["unreadable"] == []
    assert f"{facts['cases']} of {facts['cases']} cases predicted" in said
    assert {path.name for path in (tmp_path / "out").iterdir()} > {"prediction.json"}
    files = [path for path in (tmp_path / "site").rglob("*") if path.is_file()]
    victim = max(files, key=lambda path: path.suffix in (".png", ".gz", ".dcm", ".npz", ".avi", ".mp4"))
    whole = victim.read_bytes()
    victim.write_bytes(whole[: len(whole) // 2])
    code, said, errors = called(capsys, "predict", run_folder, victim, "--out", tmp_path / "broken")
    assert (code, errors) == (1, ""), errors
    assert f"cannot be read: {victim.name}" in said
    assert not (tmp_path / "broken").exists()


def test_a_generator_says_what_to_ask_it_instead(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = examples("generation")
    name, settings = next(iter(example.JOBS.items()))
    run_folder = save_run(tmp_path / "run", job_from_flat({"task": "generation", "model.name": name} | settings))
    folder = pictures(tmp_path / "in", 1)
    code, _, errors = called(capsys, "predict", run_folder, folder, "--out", tmp_path / "out")
    assert (code, errors.count("\n")) == (2, 1), errors
    assert "consilium generate" in errors


def test_dicom_in_gives_dicom_segmentations_out_that_point_at_their_images(tmp_path: Path) -> None:
    make(tmp_path / "cohort", sites=2, patients=2)
    example = examples("segmentation")
    job = job_from_flat({"task": "segmentation", "model.name": "unet"} | example.JOBS["unet"])
    done = predict(save_run(tmp_path / "run", job), tmp_path / "cohort", tmp_path / "out")
    sources = sorted((tmp_path / "cohort").rglob("*.dcm"))
    assert done.cases == len(sources) >= 4
    assert done.unreadable == []
    assert len(list((tmp_path / "out").rglob("*.dcm"))) == len(sources)
    for source in sources:
        image = pydicom.dcmread(source)
        mask = segread(tmp_path / "out" / source.relative_to(tmp_path / "cohort"))
        assert [item.segment_label for item in (mask.get_segment_description(k) for k in (1, 2))] == ["disc", "square"]
        assert mask.PatientID == image.PatientID
        (series,) = mask.ReferencedSeriesSequence
        assert [item.ReferencedSOPInstanceUID for item in series.ReferencedInstanceSequence] == [image.SOPInstanceUID]
        assert (mask.Rows, mask.Columns) == (image.Rows, image.Columns)


def test_cases_of_several_images_and_numbers_come_in_a_table(
    tmp_path: Path, tiny_job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    job = tiny_job.replace(data__modalities="pa,lateral", data__tabular="age", data__missing="zero")
    folder = pictures(tmp_path / "in", 3)
    run_folder = save_run(tmp_path / "run", job)
    code, _, errors = called(capsys, "predict", run_folder, folder / "000.png", "--out", tmp_path / "out")
    assert (code, errors.count("\n")) == (2, 1), errors
    assert "path:pa, path:lateral, age" in errors
    (folder / "labels.csv").write_text("path:pa,path:lateral,age\n000.png,001.png,45\n002.png,,\n")
    done = predict(run_folder, folder, tmp_path / "out")
    assert done.cases == 2
    assert list(table(tmp_path / "out")) == ["000.png", "002.png"]


def test_a_full_disk_is_one_line_and_leaves_nothing(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit on the size of files stands in for a disk that is full."""
    import resource

    folder = pictures(tmp_path / "in", AT_ONCE)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        code, _, errors = called(capsys, "predict", trained, folder, "--out", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (code, errors.count("\n")) == (2, 1), errors
    assert "cannot write there" in errors
    assert not (tmp_path / "out").exists()


# --- the rules of data.harmonise --------------------------------------------------------------------------------------


def test_pictures_that_differ_in_gain_alone_are_one_to_a_model_with_zscore(tiny_job: Job, tmp_path: Path) -> None:
    run_ = save_run(tmp_path / "run", tiny_job.replace(data__harmonise="polarity,zscore"))
    (tmp_path / "in").mkdir()
    picture = np.random.default_rng(0).beta(2, 5, (20, 20)) * 200
    for name, changed in {"a": picture, "b": picture * 0.5 + 30, "c": 255 - picture}.items():
        Image.fromarray(changed.round().astype(np.uint8)).save(tmp_path / "in" / f"{name}.png")
    predict(run_, tmp_path / "in", tmp_path / "out")
    found = [float(row["probability:left"]) for row in table(tmp_path / "out").values()]
    assert found == pytest.approx([found[0]] * 3, abs=1e-2)  # 8 bits hold b only roughly


def test_a_rule_of_the_site_asks_for_the_site_and_uses_its_scale(
    tiny_job: Job, three_sites: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_ = save_run(tmp_path / "run", tiny_job.replace(data__harmonise="site-percentiles"))
    images = three_sites / "a" / "images"
    code, _, said = called(capsys, "predict", run_, images, "--out", tmp_path / "out")
    assert (code, said.count("\n")) == (2, 1)
    assert "name its site.toml with --site" in said
    code, _, said = called(capsys, "explain", run_, "--image", images / "0.png", "--out", tmp_path / "e.png")
    assert code == 2
    assert "--site" in said
    site = three_sites / "a" / "site.toml"
    code, _, said = called(capsys, "predict", run_, images, "--out", tmp_path / "out", "--site", site)
    assert code == 0, said
    assert len(table(tmp_path / "out")) == 24
    code, _, said = called(
        capsys, "explain", run_, "--image", images / "0.png", "--out", tmp_path / "e.png", "--site", site
    )
    assert code == 0, said
    # The same pictures at a hospital whose machine gives half the grey values: another site.toml, the same answer.
    for file in (three_sites / "b" / "images").glob("*.png"):
        Image.fromarray(np.asarray(Image.open(file)) // 2 * 2).save(file)
    shutil.copytree(three_sites / "b", tmp_path / "dim", ignore=shutil.ignore_patterns(".consilium"))
    for file in (tmp_path / "dim" / "images").glob("*.png"):
        Image.fromarray(np.asarray(Image.open(file)) // 2).save(file)
    answers = []
    for number, folder in enumerate((three_sites / "b", tmp_path / "dim")):
        out = tmp_path / f"out-{number}"
        predict(run_, folder / "images", out, own=folder / "site.toml")
        answers.append([float(row["probability:left"]) for row in table(out).values()])
    assert answers[0] == pytest.approx(answers[1], abs=1e-4)


def test_a_site_is_refused_where_no_rule_asks_for_one(
    trained: Path, three_sites: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = three_sites / "a" / "site.toml"
    code, _, said = called(capsys, "predict", trained, three_sites / "a", "--out", tmp_path / "out", "--site", site)
    assert code == 2
    assert "leave it out" in said

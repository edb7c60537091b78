"""The command as a person meets it: fast help, one line per mistake, exit codes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from server.store import read_events
from shared.config import Job
from tests.conftest import called

CONSILIUM = Path(sys.executable).parent / "consilium"


def consilium(*args: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [CONSILIUM, *map(str, args)], capture_output=True, text=True, cwd=cwd, env=os.environ | environment, timeout=300
    )


@pytest.fixture
def job_file(tiny_job: Job, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(tiny_job.toml())
    return path


def test_help_answers_within_half_a_second_and_does_not_import_torch() -> None:
    took = []
    plain = {key: value for key, value in os.environ.items() if not key.startswith("COV")}  # as a person runs it
    for _ in range(5):
        started = time.monotonic()
        done = subprocess.run([CONSILIUM, "--help"], capture_output=True, text=True, env=plain, check=True)
        assert "Federated learning for medical imaging" in done.stdout
        took.append(time.monotonic() - started)
    assert min(took) < 0.5
    code = "import sys, consilium.cli; sys.exit(bool({'torch', 'flwr', 'rich'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_simulate_ends_with_a_table_and_the_path_of_the_report(
    job_file: Path, three_sites: Path, tmp_path: Path
) -> None:
    done = consilium("simulate", job_file, "--data", three_sites, "--baselines", "--out", tmp_path / "o")
    assert done.returncode == 0, done.stderr
    for word in ("federated", "pooled", "only a", "AUROC", f"report: {tmp_path / 'o' / 'report.html'}"):
        assert word in done.stdout, word
    assert done.stdout.splitlines()[-1].startswith("to look at it in a browser: consilium dashboard --store ")
    assert (tmp_path / "consilium.sqlite").is_file()
    assert {path.name for path in (tmp_path / "o").iterdir()} >= {
        "job.toml", "result.json", "report.html", "rounds.jsonl", "model.safetensors", "last.safetensors",
    }  # fmt: skip


def broken(kind: str, sites: Path) -> tuple[list[str], str]:
    """Spoil the input in one way; gives extra arguments and what the one line must name."""
    table = sites / "b" / "labels.csv"
    match kind:
        case "unknown key":
            return ["--set", "train.batch_sise=4"], "did you mean 'train.batch_size'"
        case "wrong type":
            return ["--set", "train.batch_size=many"], "train.batch_size"
        case "bad choice":
            return ["--set", "train.optimizer=adamm"], "did you mean 'adamw'"
        case "unknown model":
            return ["--set", "model.name=resnet81"], "resnet18"
        case "unknown metric":
            return ["--set", "evaluation.best_metric=aurok"], "did you mean 'auroc'"
        case "label not in the map":
            table.write_text(table.read_text().replace(",left,", ",links,", 1))
            return [], "label 'links'"
        case "class folder empty":
            shutil.rmtree(sites)
            for name in ("left", "right"):
                (sites / "a" / name).mkdir(parents=True)
            return [], "holds no image"
        case "absent files":
            (sites / "b" / "images" / "3.png").unlink()
            return [], "images/3.png"
        case "same name twice":
            (sites / "b" / "site.toml").write_text((sites / "a" / "site.toml").read_text())
            return [], "two sites are named 'a'"
        case "site file wrong":
            (sites / "b" / "site.toml").write_text('nam = "b"\n')
            return [], "did you mean 'name'"
        case "out is where we are":
            return ["--out", "."], "the folder you are in"
        case "no sites":
            shutil.rmtree(sites)
            sites.mkdir()
            return [], "no images found"
    raise AssertionError(kind)


def test_runs_share_decoded_images_where_they_are_told_to(
    job_file: Path,
    three_sites: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, cache = tmp_path / "described by nobody", tmp_path / "decoded"
    shutil.copytree(three_sites, data, ignore=shutil.ignore_patterns("site.toml", ".consilium"))
    monkeypatch.chdir(tmp_path)
    made = []
    for out in ("one", "two"):
        code, _, errors = called(capsys, "simulate", job_file, "--data", data, "--out", out, "--cache", cache)
        assert (code, errors) == (0, "")
        made.append({path: path.stat().st_ctime_ns for path in cache.rglob("image.raw")})
        assert not list((tmp_path / out).rglob("*.raw"))
    assert len(made[0]) == 3
    assert made[0] == made[1]


@pytest.mark.parametrize(
    "kind",
    [
        "unknown key", "wrong type", "bad choice", "unknown model", "unknown metric", "label not in the map",
        "class folder empty", "absent files", "out is where we are", "same name twice", "site file wrong", "no sites",
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(
    kind: str, job_file: Path, three_sites: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra, named = broken(kind, three_sites)
    code, out, said = called(capsys, "simulate", job_file, "--data", three_sites, "--out", tmp_path / "o", *extra)
    assert code == 2, out + said
    assert said.count("\n") == 1, said
    assert said.startswith("consilium: ")
    assert named in said


def test_missing_files_are_one_line_and_exit_code_2(job_file: Path, tmp_path: Path) -> None:
    for args in (["nowhere.toml", "--data", tmp_path], [job_file, "--data", tmp_path / "nowhere"]):
        done = consilium("simulate", *args, "--out", tmp_path / "o")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert "nowhere" in done.stderr
        assert "no such" in done.stderr
        assert not (tmp_path / "o").exists()
    for typed in ("chset.toml", job_file.parent / job_file.name.replace(".", "s.")):
        done = consilium("simulate", typed, "--data", tmp_path, "--out", tmp_path / "o")
        meant = "chest" if typed == "chset.toml" else job_file
        assert done.stderr == f"consilium: {typed}: no such file; did you mean {meant}?\n"


def test_no_permission_to_write_is_one_line_and_exit_code_2(job_file: Path, three_sites: Path) -> None:
    # /proc refuses every new folder, even to root, who may write anywhere else
    done = consilium("simulate", job_file, "--data", three_sites, "--out", "/proc/consilium/o")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "/proc/consilium/o" in done.stderr


def test_a_lost_quorum_is_one_line_and_exit_code_1(
    job_file: Path, three_sites: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for image in (three_sites / "b" / "images").iterdir():
        image.write_bytes(b"not a picture")
    args = ["simulate", job_file, "--data", three_sites, "--out", tmp_path / "o"]
    code, _, errors = called(capsys, *args, "--set", "federation.min_sites=3")
    assert code == 1
    assert "the run failed" in errors
    assert "b: site-declined: too-many-unreadable" in errors
    assert "images/0.png" in (tmp_path / "o" / "sites" / "b" / "site.log").read_text()
    assert "min_sites" in (tmp_path / "o" / "report.html").read_text()
    code, said, _ = called(capsys, *args, "--set", "federation.min_sites=2")
    assert code == 0
    assert "b not used: site-declined: too-many-unreadable" in said
    ending = "\n".join(said.splitlines()[-5:])
    assert "not used: b, 1 time: site-declined: too-many-unreadable" in ending
    (earlier,) = tmp_path.glob("o.before-*")
    assert f"begins anew; the earlier run is kept in {earlier}" in said
    assert read_events(earlier)[-1]["event"] == "failed"


def test_job_prints_every_setting_and_a_hash_that_follows_the_content(job_file: Path, tiny_job: Job) -> None:
    printed = consilium("job", job_file).stdout
    assert tiny_job.sha256 in printed
    assert "local_steps = 2" in printed
    changed = consilium("job", job_file, "--set", "train.local_steps=3").stdout
    assert "local_steps = 3" in changed
    assert tiny_job.sha256 not in changed


@pytest.mark.parametrize("command", [["strategies"], ["job", "--ready"], ["job", "--keys"]])
def test_lists_are_as_wide_as_the_terminal(command: list[str]) -> None:
    narrow, wide = (consilium(*command, COLUMNS=str(columns)).stdout for columns in (60, 400))
    assert max(map(len, narrow.splitlines())) <= 60
    assert narrow.split() == wide.split()


def test_every_shipped_job_is_valid(root: Path) -> None:
    jobs = sorted((root / "simulations" / "jobs").glob("*.toml"))
    assert len(jobs) >= 3
    for path in jobs:
        done = consilium("job", path)
        assert done.returncode == 0, done.stderr


def test_cohort_make_then_check_a_site_of_it(tmp_path: Path, root: Path) -> None:
    made = consilium("cohort", "make", tmp_path / "cohort", "--patients", 6)
    assert made.returncode == 0, made.stderr
    folders = sorted(path for path in (tmp_path / "cohort").iterdir() if path.is_dir())
    files = {folder: sum(path.is_file() for path in folder.rglob("*")) for folder in folders}
    assert sorted(made.stdout.splitlines()) == [f"{folder}: {files[folder]} files" for folder in folders]
    assert len(folders) == 3
    assert all(len(list(folder.glob("images/*"))) >= 6 for folder in folders)
    site = folders[0] / "site.toml"
    checked = consilium("site", "check", site, "--job", root / "simulations" / "jobs" / "chest.toml")
    assert "can be read" in checked.stdout
    assert "opacity" in checked.stdout


def test_site_check_walks_odd_and_broken_dicom_without_crashing(shared_data: Callable[[str], Path]) -> None:
    folder = shared_data("dicom_robustness")
    done = consilium("site", "check", "--data", folder, "--format", "dicom")
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    files = sum(path.is_file() for path in folder.rglob("*"))
    named = [line for line in done.stdout.splitlines() if line.startswith("  cannot be read: ")]
    head = done.stdout.splitlines()[0]
    assert f"{files} files looked at, {files - len(named)} images can be read" in head
    assert "REFUSED" in done.stdout.splitlines()[-1]
    lenient = consilium("site", "check", "--data", folder, "--format", "dicom", "--limit", "0.9")
    assert lenient.returncode == 0
    assert lenient.stdout.splitlines()[-1] == "FIT to join"


def test_ctrl_c_ends_everything_and_keeps_what_there_was(job_file: Path, three_sites: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    command = [CONSILIUM, "simulate", job_file, "--data", three_sites, "--out", out, "--baselines"]
    command += ["--set", "federation.rounds=100000"]
    with subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while not (out / "last.safetensors").exists():
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            time.sleep(0.1)
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    kept = f"what there was is in {out}; the same command keeps it aside and begins anew"
    assert errors.strip() == f"consilium: stopped; {kept}"
    for run in (out, out / "baselines" / "pooled"):  # and none looks as if it went on
        assert [read_events(run)[-1][key] for key in ("event", "reason")] == ["failed", "stopped"]
    assert len(family) >= 2
    assert not psutil.wait_procs(family, timeout=10)[1]
    assert (out / "last.safetensors").exists()

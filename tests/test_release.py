"""The release: wheel and source archive hold all that runs, and what is installed works far from the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared import __version__
from simulations.ready import ready_job, ready_jobs, ready_study
from tests.conftest import called

PACKAGES = ("client", "consilium", "server", "shared", "simulations")
BUILD = "import setuptools.build_meta as backend, sys; print(getattr(backend, 'build_' + sys.argv[1])(sys.argv[2]))"


def done(folder: Path, *words: object) -> str:
    """What a command prints that is run in a folder, as by somebody who knows nothing of this environment."""
    own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    command = [str(word) for word in words]
    return subprocess.run(
        command, cwd=folder, env=own, check=True, stdout=subprocess.PIPE, text=True, timeout=600
    ).stdout


def tracked(root: Path) -> list[str]:
    listed = done(root, "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    return [name for name in listed if name and (root / name).is_file()]


def build(kind: str, source: Path, out: Path) -> Path:
    """``sdist`` or ``wheel`` of a folder, by what pyproject.toml names as its backend."""
    return out / done(source, sys.executable, "-c", BUILD, kind, out).splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source archive, as whoever packages it would."""
    root, top = Path(__file__).parents[1], tmp_path_factory.mktemp("release")
    for name in tracked(root):
        (top / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, top / "copy" / name)
    archive = build("sdist", top / "copy", top)
    with tarfile.open(archive) as tar:
        tar.extractall(top / "unpacked", filter="data")
    (source,) = (top / "unpacked").iterdir()
    return build("wheel", source, top)


@pytest.fixture(scope="module")
def elsewhere(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An environment with the wheel and, from this one, the packages it needs; an empty folder beside it."""
    top = tmp_path_factory.mktemp("elsewhere")
    python = top / "env" / "bin" / "python"
    done(top, sys.executable, "-m", "venv", "--without-pip", top / "env")
    pip = (sys.executable, "-m", "pip", "--quiet", "--python", python)
    done(top, *pip, "install", "--no-deps", "--no-index", wheel)
    (site,) = (top / "env" / "lib").glob("python*/site-packages")
    # As a path, not as a folder of packages: .pth files in it, such as the one that finds the checkout, do not count.
    (site / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (top / "empty").mkdir()
    yield top
    shutil.rmtree(top)


def test_the_wheel_holds_every_file_of_the_packages(wheel: Path, root: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert inside == {name for name in tracked(root) if name.split("/")[0] in PACKAGES}


@pytest.mark.slow
def test_the_main_job_runs_without_the_checkout(elsewhere: Path) -> None:
    programs, here = elsewhere / "env" / "bin", elsewhere / "empty"
    assert done(here, programs / "consilium", "--version").split()[-1] == __version__
    done(here, programs / "consilium", "cohort", "make", "cohort", "--sites", 3, "--patients", 16)
    run = ("simulate", "chest", "--data", "cohort", "--set", "federation.rounds=2", "--out", "run")
    assert "AUROC" in done(here, programs / "consilium", *run)
    assert (here / "run" / "report.html").stat().st_size > 10_000
    where = f"import {', '.join(PACKAGES)}; print(*({', '.join(PACKAGES)}), sep='\\n')"
    assert done(here, programs / "python", "-c", where).count(f"from '{elsewhere}/env/lib/") == len(PACKAGES)


def test_a_ready_job_goes_by_its_name_unless_there_is_such_a_file(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ready_jobs():
        assert ready_job(name) == root / "simulations" / "jobs" / f"{name}.toml"
        assert called(capsys, "job", name) == called(capsys, "job", root / "simulations" / "jobs" / f"{name}.toml")
    assert ready_study("heterogeneity") == root / "simulations" / "studies" / "heterogeneity.toml"
    assert {path.stem for path in (root / "simulations" / "jobs").iterdir()} == set(ready_jobs())
    (tmp_path / "chest").write_text('name = "mine"\n')
    assert 'name = "mine"' in called(capsys, "job", "chest")[1]
    code, _, error = called(capsys, "job", "nuclej")
    assert code == 2
    assert error.startswith("consilium: nuclej: no such file, nor a job that comes with Consilium: anomaly, ")
    assert called(capsys, "job", "folder/chest")[2] == "consilium: folder/chest: no such file; did you mean chest?\n"
    listed = called(capsys, "job", "--ready")[1].splitlines()
    assert [line for line in listed if not line.startswith(" ")] == list(ready_jobs())

"""`consilium cohort make --kind`: every kind there is can be made, checked and named."""

from __future__ import annotations

from importlib import import_module
from inspect import signature
from pathlib import Path

import pytest

from shared.sitefile import read_site
from simulations.cohorts import COHORTS
from tests.conftest import called


@pytest.mark.parametrize("kind", COHORTS)
def test_every_kind_can_be_made(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said, errors = called(capsys, "cohort", "make", tmp_path / "c", "--kind", kind, "--sites", 2, "--patients", 4)
    assert (code, errors) == (0, "")
    folders = sorted(path for path in (tmp_path / "c").iterdir() if path.is_dir())
    assert len(folders) == 2
    for folder in folders:
        site = read_site(folder / "site.toml")
        files = sum(path.is_file() for path in folder.rglob("*"))
        assert f"{folder}: {files} files" in said
        assert site.name == folder.name
    again, _, errors = called(capsys, "cohort", "make", tmp_path / "c", "--kind", kind, "--sites", 2, "--patients", 5)
    assert (again, errors.count("\n")) == (2, 1), errors


@pytest.mark.parametrize("kind", COHORTS)
def test_what_is_not_given_is_left_to_the_kind(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, asked = import_module(COHORTS[kind]), []
    own = signature(module.make)

    def make(*args: object, **more: object) -> list[Path]:
        asked.append(own.bind(*args, **more).arguments)
        return []

    monkeypatch.setattr(module, "make", make)
    assert called(capsys, "cohort", "make", tmp_path / "c", "--kind", kind)[0] == 0
    assert called(capsys, "cohort", "make", tmp_path / "c", "--kind", kind, "--patients", 7, "--seed", 3)[0] == 0
    assert {"sites", "patients"} & set(asked[0]) == set()
    assert (asked[1]["patients"], asked[1]["seed"]) == (7, 3)


def test_an_unknown_kind_is_named_with_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, errors = called(capsys, "cohort", "make", tmp_path / "c", "--kind", "chset")
    assert (code, errors.count("\n")) == (2, 1)
    assert "did you mean 'chest'" in errors
    assert not (tmp_path / "c").exists()

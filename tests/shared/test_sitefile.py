"""The site's own file: what is right is read, and every fault is one line that names file and key."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import shared.sitefile
from shared.cases import SiteData
from shared.errors import UserError
from shared.sitefile import read_site


def write(folder: Path, text: str) -> Path:
    path = folder / "site.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_example_of_the_documentation_is_read(tmp_path: Path) -> None:
    example = (shared.sitefile.__doc__ or "").partition("\n\n")[2]
    site = read_site(write(tmp_path, example))
    assert site == SiteData(
        name="hospital-north",
        root=tmp_path / ".",
        format="csv",
        csv="labels.csv",
        label_map={"Verschattung": "opacity"},
        max_unreadable=0.05,
        cache=tmp_path / ".consilium" / "cache",
    )


def test_a_name_is_enough(tmp_path: Path) -> None:
    assert read_site(write(tmp_path, 'name = "a"')) == SiteData("a", tmp_path, cache=tmp_path / ".consilium" / "cache")


def test_folders_are_relative_to_the_file_unless_absolute(tmp_path: Path) -> None:
    site = read_site(write(tmp_path, 'name = "a"\n[data]\ndir = "images"\n[cache]\ndir = "/var/c"'))
    assert (site.root, site.cache) == (tmp_path / "images", Path("/var/c"))
    site = read_site(write(tmp_path, 'name = "a"\n[data]\ndir = "/mnt/pacs"'))
    assert (site.root, site.cache) == (Path("/mnt/pacs"), tmp_path / ".consilium" / "cache")


@pytest.mark.parametrize(
    ("writable", "own", "expected"),
    [(True, "", "file"), (False, "", "home"), (False, '[cache]\ndir = ".consilium/cache"', "file")],
)
def test_the_cache_lies_beside_the_file_unless_that_folder_is_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writable: bool, own: str, expected: str
) -> None:
    file = write(tmp_path, f'name = "a"\n{own}')
    monkeypatch.setattr(os, "access", lambda path, mode: writable)
    places = {"file": tmp_path / ".consilium" / "cache", "home": tmp_path / "home" / ".consilium" / "cache"}
    assert read_site(file, tmp_path / "home").cache == places[expected]


@pytest.mark.parametrize("name", ["a", "A-1", "klinik.nord_2", "x" * 64, "7"])
def test_short_names_are_taken(tmp_path: Path, name: str) -> None:
    assert read_site(write(tmp_path, f'name = "{name}"')).name == name


@pytest.mark.parametrize("value", ["0", "1", "0.5", "0.0"])
def test_the_share_of_unreadable_images_may_be_anything_from_0_to_1(tmp_path: Path, value: str) -> None:
    site = read_site(write(tmp_path, f'name = "a"\n[limits]\nmax_unreadable = {value}'))
    assert site.max_unreadable == float(value)
    assert type(site.max_unreadable) is float


FAULTS = {
    "": "name",
    "nmae = 'a'": "'nmae' (did you mean 'name'?)",
    "name = 3": "name",
    "name = ['a']": "name",
    "name = ''": "name",
    "name = 'two words'": "name",
    "name = 'Klinik-Süd'": "name",
    "name = '../up'": "name",
    "name = '-a'": "name",
    'name = "a\\n"': "name",
    f"name = '{'x' * 65}'": "name",
    "name = 'a'\ndata = 3": "data",
    "name = 'a'\n[dtaa]": "[dtaa] (did you mean 'data'?)",
    "name = 'a'\n[data]\ndri = '.'": "'data.dri' (did you mean 'dir'?)",
    "name = 'a'\n[data]\ndir = 3": "data.dir",
    "name = 'a'\n[data]\ncsv = true": "data.csv",
    "name = 'a'\n[data]\nformat = 'fodler'": "data.format",
    "name = 'a'\n[data.dir]\nx = 1": "data.dir",
    "name = 'a'\n[limits]\nmax_unreadable = '5 %'": "limits.max_unreadable",
    "name = 'a'\n[limits]\nmax_unreadable = true": "limits.max_unreadable",
    "name = 'a'\n[limits]\nmax_unreadable = 5": "limits.max_unreadable",
    "name = 'a'\n[limits]\nmax_unreadable = -0.1": "limits.max_unreadable",
    "name = 'a'\n[limits]\nmax_unreadable = nan": "limits.max_unreadable",
    "name = 'a'\nlabel_map = 'x'": "[label_map]",
    "name = 'a'\n[label_map]\nx = 1": "[label_map]",
    "name = 'a'\n[label_map.x]\ny = 'b'": "[label_map]",
    "name = 'a'\n[cache]\ndir = 1.5": "cache.dir",
    "name = 'a'\n[cache]\nsize = 1": "'cache.size'",
    "[name]\nx = 1": "[name]",
    'name = "a"\n["b\\nc"]': "b\\nc",
    "name = ": "not valid TOML",
    "name = 'a'\nname = 'b'": "not valid TOML",
}


@pytest.mark.parametrize("content", FAULTS)
def test_a_fault_is_one_line_that_names_the_file_and_the_key(tmp_path: Path, content: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(UserError) as caught:
        read_site(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert FAULTS[content] in text.removeprefix(f"{path}: ")
    assert "\n" not in text


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.toml: no such file"):
        read_site(tmp_path / "gone.toml")

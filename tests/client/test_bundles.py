"""Which code may run at a site."""

from __future__ import annotations

import os
from hashlib import sha256
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_files

from client.bundles import KEPT, Bundles
from shared import __version__
from shared.bundle import MANIFEST, release
from shared.errors import SiteRefusal, UserError
from shared.sitefile import OWN_FOLDER


def bundle(line: str = "") -> bytes:
    files = dict(release())
    files["client/app.py"] += line.encode()
    return build_fab_from_files(files)[0]


def test_the_installed_release_runs_as_it_is(tmp_path: Path) -> None:
    assert Bundles(tmp_path).admit(bundle()) is None
    assert not list(tmp_path.rglob("*.py"))


def test_another_program_is_put_aside_and_never_unpacked(tmp_path: Path) -> None:
    other = bundle("\n# other\n")
    with pytest.raises(SiteRefusal, match=r"1 files.*approve") as refused:
        Bundles(tmp_path).admit(other)
    assert refused.value.code == "bundle-refused"
    assert [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()] == [other]
    assert not list(tmp_path.rglob("*.py"))


def test_what_is_no_bundle_is_refused_and_not_kept(tmp_path: Path) -> None:
    with pytest.raises(SiteRefusal) as refused:
        Bundles(tmp_path).admit(b"no zip")
    assert refused.value.code == "bundle-refused"
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_an_approved_program_runs_from_its_own_folder(tmp_path: Path) -> None:
    other, bundles = bundle("\n# other\n"), Bundles(tmp_path)
    with pytest.raises(SiteRefusal):
        bundles.admit(other)
    digest, found = bundles.find(sha256(other).hexdigest()[:8])
    assert [item.path for item in found] == ["client/app.py"]
    bundles.approve(digest)
    folder = bundles.admit(other)
    assert folder is not None
    assert (folder / "client" / "app.py").read_text().endswith("# other\n")
    assert bundles.waiting() == {}
    with pytest.raises(SiteRefusal):  # only that one
        bundles.admit(bundle("\n# a third\n"))


def test_a_program_changed_while_it_waited_cannot_be_approved(tmp_path: Path) -> None:
    other, bundles = bundle("\n# other\n"), Bundles(tmp_path)
    with pytest.raises(SiteRefusal):
        bundles.admit(other)
    ((digest, path),) = bundles.waiting().items()
    path.write_bytes(bundle("\n# exchanged\n"))
    with pytest.raises(UserError, match="was changed"):
        bundles.approve(digest)


def test_only_the_last_few_are_kept(tmp_path: Path) -> None:
    bundles, sent = Bundles(tmp_path), []
    for number in range(KEPT + 2):
        sent.append(bundle(f"\n# {number}\n"))
        with pytest.raises(SiteRefusal):
            bundles.admit(sent[-1])
        path = bundles.folder / "refused" / f"{sha256(sent[-1]).hexdigest()}.fab"
        os.utime(path, (number + 1, number + 1))
    with pytest.raises(SiteRefusal):
        bundles.admit(bundle("\n# last\n"))
    left = set(bundles.waiting())
    assert len(left) == KEPT
    assert sha256(sent[0]).hexdigest() not in left


@pytest.mark.parametrize("start", ["", "abc", "zzzzzz", "0123456"])
def test_a_program_that_does_not_wait_cannot_be_asked_for(start: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no bundle waits"):
        Bundles(tmp_path).find(start)


@pytest.mark.parametrize(
    ("version", "told"),
    [
        ("9.9.0", f"is consilium 9.9.0, here {__version__} is installed: install what the coordinator has"),
        (__version__, "differs from the one installed here in 1 files"),  # the version is the same, the program is not
        ("9.9 `rm -rf ~`", "differs from the one installed here in 2 files"),
    ],
)
def test_another_release_is_named_as_such(tmp_path: Path, version: str, told: str) -> None:
    files = dict(release())
    files["client/app.py"] += b"# other\n"
    files[MANIFEST] = files[MANIFEST].replace(f'"{__version__}"'.encode(), f'"{version}"'.encode())
    with pytest.raises(SiteRefusal) as refused:
        Bundles(tmp_path).admit(build_fab_from_files(files)[0])
    assert refused.value.code == "bundle-refused"
    assert told in str(refused.value)
    assert "rm -rf" not in str(refused.value)
    assert ("consilium 9.9.0" in str(refused.value)) == (version == "9.9.0")


def test_a_bundle_that_is_damaged_within_or_cannot_be_put_aside_is_refused_all_the_same(tmp_path: Path) -> None:
    whole = bundle("\n# other\n")
    for place in range(200, len(whole), len(whole) // 40):  # a byte of what is compressed, or of a header
        damaged = whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :]
        with pytest.raises(SiteRefusal):
            Bundles(tmp_path / "a").admit(damaged)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / OWN_FOLDER).write_text("a file where the folder should be")
    with pytest.raises(SiteRefusal, match="differs"):
        Bundles(tmp_path / "b").admit(whole)

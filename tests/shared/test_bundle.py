"""The app bundle: what the installed release makes, and how another differs from it."""

from __future__ import annotations

import io
import tomllib
import zipfile
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_files

from shared.bundle import MANIFEST, RUN_KEYS, BadBundle, differences, read_bundle, release


def bundle(files: dict[str, bytes]) -> bytes:
    return build_fab_from_files(files)[0]  # as Flower builds it for every run


def test_the_release_is_every_module_of_the_three_packages(root: Path) -> None:
    wanted = {
        path.relative_to(root).as_posix()
        for package in ("client", "server", "shared")
        for path in (root / package).rglob("*.py")
    }
    assert set(release()) == wanted | {MANIFEST}
    assert all(release()[name] == (root / name).read_bytes() for name in wanted)


def test_its_manifest_says_what_the_projects_own_does(root: Path) -> None:
    """`flwr run .` reads the one, a federation the other."""
    own = tomllib.loads((root / MANIFEST).read_text())["tool"]["flwr"]["app"]
    made = tomllib.loads(release()[MANIFEST].decode())["tool"]["flwr"]["app"]
    assert made == own
    assert set(RUN_KEYS) == {f"run.{key}" for key in own["config"]["run"]}


def test_what_flower_builds_of_it_is_the_same_program() -> None:
    assert differences(read_bundle(bundle(dict(release()))), release()) == []


def test_every_kind_of_difference_is_told() -> None:
    files = dict(release())
    files["client/app.py"] += b"\nprint('x')\n"
    files["shared/more.py"] = b"a = 1\n"
    del files["server/store.py"]
    files[MANIFEST] = files[MANIFEST].replace(b"client.app:app", b"client.evil:app")
    found = {item.path: item for item in differences(read_bundle(bundle(files)), release())}
    assert {path: item.what for path, item in found.items()} == {
        "client/app.py": "changed",
        "shared/more.py": "new",
        "server/store.py": "missing",
        MANIFEST: "changed",
    }
    assert "+print('x')" in found["client/app.py"].lines
    assert any("client.evil:app" in line and line.startswith("+") for line in found[MANIFEST].lines)


@pytest.mark.parametrize("name", ["../evil.py", "/evil.py", "a/../../evil.py", "a\\evil.py"])
def test_a_path_that_leads_out_is_refused(name: str) -> None:
    with pytest.raises(BadBundle, match="path"):
        read_bundle(zipped({name: b""}))


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def test_what_unpacks_to_too_much_is_refused_unread() -> None:
    bomb = zipped({"client/app.py": b"0" * (65 << 20)})
    assert len(bomb) < 1 << 20
    with pytest.raises(BadBundle, match="larger"):
        read_bundle(bomb)


@pytest.mark.parametrize("content", [b"", b"no zip", zipped({"a.py": b"x" * 100})[:-30]], ids=["empty", "text", "cut"])
def test_what_is_no_zip_is_refused(content: bytes) -> None:
    with pytest.raises(BadBundle):
        read_bundle(content)


def test_a_file_that_stands_twice_is_refused() -> None:
    """Two readers could take different ones."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("client/app.py", b"good")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("client/app.py", b"bad")
    with pytest.raises(BadBundle, match="twice"):
        read_bundle(buffer.getvalue())

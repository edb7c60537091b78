"""`consilium registry`: releases with where they come from, signed; any byte that was changed is found.

Signatures are checked by OpenSSL, too, by what docs/export.md says of the log, without Consilium's code.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from consilium.cli import main
from consilium.registry import add, entries, verify
from consilium.signing import keygen
from shared.config import Job
from shared.errors import UserError
from simulations.simulate import run
from tests.conftest import make_tiny_job, write_site


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two sites, whose images are gone; no test changes it."""
    folder = tmp_path_factory.mktemp("finished")
    for name, images in {"a": 24, "b": 32}.items():
        write_site(folder / "data" / name, name, images)
    run(make_tiny_job(), folder / "data", folder / "run", workers=1)
    shutil.rmtree(folder / "data")
    return folder / "run"


@pytest.fixture
def key(tmp_path: Path) -> Path:
    keygen(tmp_path / "keys" / "release")
    return tmp_path / "keys" / "release"


@pytest.fixture
def registry(finished: Path, key: Path, tmp_path: Path) -> Path:
    """Three releases."""
    for version in ("1.0", "1.1", "2.0"):
        add(tmp_path / "registry", finished, "chest", version, key)
    return tmp_path / "registry"


def faults(registry: Path, key: Path | None = None) -> list[str]:
    return [f"{fault.where}: {fault.what}" for fault in verify(registry, key)[0]]


# --- what is written --------------------------------------------------------------------------------------------------


def test_a_release_says_where_it_comes_from(finished: Path, key: Path, registry: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    first = entries(registry)[0]
    own = result["federated"]
    assert first["job_sha256"] == result["job_sha256"]
    assert first["sites"] == 2
    assert first["round"] == own["best_round"]
    assert first["test_images"] == own["images"]
    assert first["privacy"] is None
    assert set(first["metrics"]) == set(own["n"])
    for name, row in first["metrics"].items():
        assert [row["low"], row["high"]] == own["intervals"][name]
        assert (row["value"], row["n"]) == (own[name], own["n"][name])
    assert set(first["files"]) == {"model.safetensors", "job.toml", "result.json", "model_card.md"}
    for name, facts in first["files"].items():
        content = (registry / "chest" / "1.0" / name).read_bytes()
        assert facts == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert (registry / "chest" / "1.0" / "model.safetensors").read_bytes() == (
        finished / "model.safetensors"
    ).read_bytes()
    assert [entry["number"] for entry in entries(registry)] == [1, 2, 3]
    assert faults(registry, key.with_name("release.pub")) == []


def test_openssl_verifies_every_line_and_the_chain_holds(registry: Path, key: Path, tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    assert openssl
    previous = "0" * 64
    for line in (registry / "log.jsonl").read_bytes().splitlines(keepends=True):
        found = json.loads(line)
        entry = json.dumps(found["entry"], sort_keys=True, separators=(",", ":")).encode()
        (tmp_path / "entry").write_bytes(entry)
        (tmp_path / "signature").write_bytes(bytes.fromhex(found["signature"]))
        command = [openssl, "pkeyutl", "-verify", "-pubin", "-inkey", str(key) + ".pub", "-rawin"]
        command += ["-in", str(tmp_path / "entry"), "-sigfile", str(tmp_path / "signature")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert found["entry"]["previous"] == previous
        previous = hashlib.sha256(line).hexdigest()
    assert verify(registry)[1] == previous


def test_the_private_key_is_its_owners_alone(tmp_path: Path) -> None:
    public, digest = keygen(tmp_path / "release")
    assert stat.S_IMODE((tmp_path / "release").stat().st_mode) == 0o600
    assert b"PRIVATE" not in public.read_bytes()
    assert len(bytes.fromhex(digest)) == 32
    before = (tmp_path / "release").read_bytes()
    with pytest.raises(UserError, match="there is a key of that name already"):
        keygen(tmp_path / "release")
    assert (tmp_path / "release").read_bytes() == before


# --- tampering --------------------------------------------------------------------------------------------------------


def test_every_byte_of_the_log_and_the_key_counts(finished: Path, key: Path, tmp_path: Path) -> None:
    registry = tmp_path / "registry"
    for version in ("1", "2"):
        add(registry, finished, "chest", version, key)
    for name in ("log.jsonl", "registry.pub"):
        path = registry / name
        content = path.read_bytes()
        unseen = []
        for place in range(len(content)):
            path.write_bytes(content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1 :])
            if not verify(registry)[0]:
                unseen.append(place)
        path.write_bytes(content)
        assert unseen == [], name
    assert faults(registry) == []


def test_bytes_of_every_file_count(registry: Path) -> None:
    for path in sorted((registry / "chest").rglob("*")):
        if path.is_dir():
            continue
        content = path.read_bytes()
        for place in {0, len(content) // 3, len(content) - 1}:
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            name = path.relative_to(registry).as_posix()
            assert faults(registry) == [f"{name}: was changed since it was signed"]
        path.write_bytes(content + b"\n")
        assert len(faults(registry)) == 1
        path.write_bytes(content)
    assert faults(registry) == []


def remove_a_file(registry: Path) -> None:
    (registry / "chest" / "1.1" / "job.toml").unlink()


def add_a_file(registry: Path) -> None:
    (registry / "chest" / "1.1" / "more.bin").write_bytes(b"x")


def link_a_file(registry: Path) -> None:
    path = registry / "chest" / "1.1" / "job.toml"
    path.unlink()
    path.symlink_to(registry / "chest" / "1.0" / "job.toml")


def lines_changed(change: Callable[[list[bytes]], list[bytes]]) -> Callable[[Path], None]:
    def apply(registry: Path) -> None:
        log = registry / "log.jsonl"
        log.write_bytes(b"".join(change(log.read_bytes().splitlines(keepends=True))))

    return apply


CHANGES = {
    "a file less": (remove_a_file, "job.toml: is not there"),
    "a file more": (add_a_file, "more.bin: belongs to no release"),
    "a link instead": (link_a_file, "job.toml: is not there"),
    "the first line taken out": (lines_changed(lambda lines: lines[1:]), "does not follow the line before it"),
    "a middle line taken out": (
        lines_changed(lambda lines: [lines[0], lines[2]]),
        "does not follow the line",
    ),
    "the last line taken out": (lines_changed(lambda lines: lines[:2]), "chest/2.0/model.safetensors: belongs to no"),
    "lines swapped": (lines_changed(lambda lines: [lines[1], lines[0], lines[2]]), "does not follow"),
    "a line twice": (lines_changed(lambda lines: [*lines, lines[2]]), "does not follow"),
    "nothing left": (lines_changed(lambda lines: []), "log.jsonl: is empty"),
    "the last newline gone": (lines_changed(lambda lines: [*lines[:2], lines[2][:-1]]), "not written as it was signed"),
    "spaces put in": (lines_changed(lambda lines: [lines[0].replace(b":", b": ", 1), *lines[1:]]), "not written as it"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_missing_moved_or_too_many_is_found(change: str, registry: Path) -> None:
    apply, said = CHANGES[change]
    apply(registry)
    found = faults(registry)
    assert any(said in line for line in found), found


def test_a_registry_signed_anew_by_another_key_is_found_by_the_coordinators(
    registry: Path, finished: Path, key: Path, tmp_path: Path
) -> None:
    keygen(tmp_path / "keys" / "thief")
    shutil.rmtree(registry)
    add(registry, finished, "chest", "1.0", tmp_path / "keys" / "thief")
    assert faults(registry) == []  # by its own key it is in order: the fingerprint tells
    found = faults(registry, Path(f"{key}.pub"))
    assert "registry.pub: is another key than the one given" in found
    assert any("the signature does not fit" in line for line in found)


# --- append-only ------------------------------------------------------------------------------------------------------


def test_a_release_is_never_changed(registry: Path, finished: Path, key: Path) -> None:
    before = (registry / "log.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"chest 1\.1 is released already"):
        add(registry, finished, "chest", "1.1", key)
    add(registry, finished, "other", "1.1", key)
    after = (registry / "log.jsonl").read_bytes()
    assert after.startswith(before)
    assert faults(registry) == []


def test_nothing_is_added_with_another_key_or_to_a_log_that_was_changed(
    registry: Path, finished: Path, key: Path, tmp_path: Path
) -> None:
    keygen(tmp_path / "keys" / "other")
    with pytest.raises(UserError, match="signed with another key"):
        add(registry, finished, "chest", "3.0", tmp_path / "keys" / "other")
    log = registry / "log.jsonl"
    log.write_bytes(log.read_bytes().replace(b'"sites":2', b'"sites":9', 1))
    with pytest.raises(UserError, match="line 1: the signature does not fit"):
        add(registry, finished, "chest", "3.0", key)
    assert not (registry / "chest" / "3.0").exists()


def test_an_addition_that_broke_off_is_seen_and_can_be_done_again(
    registry: Path, finished: Path, key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("consilium.registry._append", full)
        with pytest.raises(UserError, match="cannot write there: No space left"):
            add(registry, finished, "chest", "3.0", key)
    assert any("chest/3.0/model.safetensors: belongs to no release" in line for line in faults(registry))
    add(registry, finished, "chest", "3.0", key)
    assert faults(registry) == []


def test_files_of_an_export_belong_to_the_release(finished: Path, key: Path, tmp_path: Path) -> None:
    (tmp_path / "more" / "models").mkdir(parents=True)
    (tmp_path / "more" / "models" / "model.onnx").write_bytes(b"weights")
    entry = add(tmp_path / "registry", finished, "chest", "1", key, tmp_path / "more")
    assert "files/models/model.onnx" in entry["files"]
    (tmp_path / "registry" / "chest" / "1" / "files" / "models" / "model.onnx").write_bytes(b"Weights")
    assert faults(tmp_path / "registry") == ["chest/1/files/models/model.onnx: was changed since it was signed"]
    (tmp_path / "more" / "link").symlink_to("/etc/passwd")
    with pytest.raises(UserError, match="link is a link or no plain file"):
        add(tmp_path / "registry", finished, "chest", "2", key, tmp_path / "more")


def test_only_finished_runs_are_released(finished: Path, key: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run folder"):
        add(tmp_path / "registry", tmp_path, "chest", "1", key)
    shutil.copytree(finished, tmp_path / "run")
    log = tmp_path / "run" / "rounds.jsonl"
    log.write_text("".join(line for line in log.read_text().splitlines(keepends=True) if '"finish"' not in line))
    with pytest.raises(UserError, match="has not come to its end"):
        add(tmp_path / "registry", tmp_path / "run", "chest", "1", key)
    shutil.copy(finished / "rounds.jsonl", log)
    job = tmp_path / "run" / "job.toml"
    job.write_text(job.read_text().replace("seed = 0", "seed = 1"))
    with pytest.raises(UserError, match="trained by another job"):
        add(tmp_path / "registry", tmp_path / "run", "chest", "1", key)
    assert not (tmp_path / "registry").exists()


@pytest.mark.parametrize(("name", "version"), [("../x", "1"), ("a/b", "1"), ("a", ".."), ("", "1"), ("a", "1/../2")])
def test_names_are_no_paths(name: str, version: str, finished: Path, key: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="letters, digits"):
        add(tmp_path / "registry", finished, name, version, key)
    assert os.listdir(tmp_path) == ["keys"]


# --- the commands -----------------------------------------------------------------------------------------------------


def called(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["consilium", "registry", *map(str, args)])
        try:
            main()
            code = 0
        except SystemExit as left:
            code = int(left.code or 0)
    return code, *capsys.readouterr()


def test_what_the_commands_say_fits_a_terminal_of_80_columns(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    release = ["--name", "chest", "--version", "1.0", "--key", "release.key"]
    said = [called(capsys, "keygen", "release.key"), called(capsys, "add", finished, *release)]
    said += [called(capsys, *words) for words in (["list"], ["verify"], ["verify", "--key", "release.key.pub"])]
    for code, out, _ in said:
        assert code == 0
        assert max(map(len, out.splitlines())) <= 80
    assert "the registry's own" in said[3][1]
    assert "the registry's own" not in said[4][1]


def test_the_commands(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_job: Job) -> None:
    folder = ["--registry", tmp_path / "registry"]
    code, said, _ = called(capsys, "keygen", tmp_path / "release")
    assert code == 0
    digest = said.split()[-1]
    release = ["--name", "chest", "--version", "1.0", "--key", tmp_path / "release"]
    assert called(capsys, "add", finished, *release, *folder)[0] == 0
    code, said, _ = called(capsys, "list", *folder)
    assert said.startswith("chest 1.0 ")
    assert all(word in said for word in ("2 sites", "no DP", tiny_job.sha256[:12], "auroc"))
    code, said, _ = called(capsys, "verify", *folder, "--key", tmp_path / "release.pub")
    assert code == 0
    assert "the one release is as it was signed" in said
    assert digest in said
    (tmp_path / "registry" / "chest" / "1.0" / "job.toml").write_text("name = 'other'\n")
    code, said, _ = called(capsys, "verify", *folder)
    assert code == 1
    assert "chest/1.0/job.toml: was changed since it was signed" in said
    code, _, errors = called(capsys, "verify", "--registry", tmp_path)
    assert (code, errors.count("\n")) == (2, 1)
    code, _, errors = called(capsys, "add", finished, *release[:4], "--key", tmp_path / "none", *folder)
    assert code == 2
    assert "consilium registry keygen" in errors

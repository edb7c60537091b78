"""`consilium registry`: released models in a plain folder, each release signed, none changed or taken back unnoticed.

    FOLDER/registry.pub             whose releases these are: an Ed25519 public key (PEM)
    FOLDER/log.jsonl                a line per release: its entry and the signature of the entry
    FOLDER/NAME/VERSION/            the files of the release

An entry holds the SHA-256 of every file of its release, and of the line before it: so no release can be altered, put
between others or taken out. Only lines cut off at the end are not seen from the folder alone (their files are, unless
they are gone as well): ``verify`` prints the digest of the last line, to be kept elsewhere.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from consilium.signing import fingerprint, read_private, read_public, to_pem
from server.card import CARD, write_card
from server.database.journal import key_of
from server.record import read_record
from shared import __version__
from shared.errors import UserError

LOG, KEY = "log.jsonl", "registry.pub"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")
FILES = ("model.safetensors", "job.toml", "result.json", CARD)
_NONE = "0" * 64  # what stands for the line before the first


class Fault(NamedTuple):
    """Something in a registry that is not as it was signed: where, and what."""

    where: str
    what: str


# --- adding -----------------------------------------------------------------------------------------------------------


def add(folder: Path, run: Path, name: str, version: str, key: Path, also: Path | None = None) -> dict[str, Any]:
    """Release the best model of ``run`` as ``name`` ``version``, signed with ``key``; gives the entry.

    ``also``: a folder, such as one that `consilium export` wrote, whose files belong to the release.

    Raises:
        UserError: no finished run, a version that is there already, another key than the registry's, or a registry
            that is not in order; one line.
    """
    for what, word in (("--name", name), ("--version", version)):
        if not NAME.fullmatch(word) or word.endswith("."):
            raise UserError(f"{what} {word}: letters, digits and . _ + - only, beginning with a letter or digit")
    signer, facts = read_private(key), _provenance(run)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            _own(folder, signer)
            lines = _require_log(folder, signer.public_key())
            taken = {(entry["name"], entry["version"]) for entry, _ in lines}
            if (name, version) in taken:
                raise UserError(f"{name} {version} is released already; a release is never changed: take a new version")
            files = _place(folder / name / version, run, also)
            entry = {
                "number": len(lines) + 1,
                "previous": lines[-1][1] if lines else _NONE,
                "name": name,
                "version": version,
                "released": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "key": fingerprint(signer.public_key()),
                "consilium": __version__,
                **facts,
                "files": files,
            }
            _append(folder / LOG, _line(entry, signer.sign(_canonical(entry)).hex()))
    except OSError as error:
        raise UserError(f"--registry {folder}: cannot write there: {error.strerror}") from None
    return entry


def _own(folder: Path, signer: Ed25519PrivateKey) -> None:
    """The registry takes releases of one key: the first one's."""
    path = folder / KEY
    if not path.exists() and not (folder / LOG).exists():
        path.write_bytes(to_pem(signer.public_key()))
    if read_public(path).public_bytes_raw() != signer.public_key().public_bytes_raw():
        raise UserError(f"{folder}: its releases are signed with another key ({KEY}); use that, or another --registry")


def _provenance(run: Path) -> dict[str, Any]:
    """What a release says of where it comes from, out of the run's folder."""
    from safetensors import SafetensorError, safe_open

    if not (run / "job.toml").is_file() or not (run / "rounds.jsonl").is_file():
        raise UserError(f"{run}: no run folder; name the --out of a `consilium simulate`, or DIR/runs/RUN")
    record = read_record(run)
    if not any(event["event"] == "finish" for event in record.events):
        raise UserError(f"{run}: the run has not come to its end; only finished runs are released")
    try:
        with safe_open(run / FILES[0], "pt") as content:
            weights = json.loads((content.metadata() or {}).get("consilium", "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{run / FILES[0]}: cannot be read: {error}") from None
    if weights.get("job") != record.job.sha256:
        raise UserError(f"{run}: {FILES[0]} was trained by another job than its job.toml, which was changed since")
    own = record.scores["federated"]
    started = next((event for event in record.events if event["event"] == "start"), {})
    return {
        "run": run.resolve().name,
        "run_key": key_of(run),
        "job": record.job.name,
        "job_sha256": record.job.sha256,
        "task": record.job.task,
        "model": record.job.model.name,
        "round": int(weights.get("round", 0)),
        "trained": time.strftime("%Y-%m-%d", time.gmtime(started["time"])) if "time" in started else None,
        "trained_with": started.get("version"),
        "sites": len({row["site"] for event in record.rounds.values() for row in event["trained"]}),
        "test_images": own.get("images"),
        "best_metric": record.metric,
        "metrics": {
            name: {"value": own[name], "low": own["intervals"][name][0], "high": own["intervals"][name][1], "n": n}
            for name, n in own.get("n", {}).items()
        },
        "privacy": own.get("privacy"),
    }


def _place(target: Path, run: Path, also: Path | None) -> dict[str, dict[str, Any]]:
    """Copy the files of a release to its folder, all at once; gives their digests."""
    if also is not None and not also.is_dir():
        raise UserError(f"--files {also}: no such folder")
    write_card(run)
    work = target.parent / f".{target.name}.writing"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        for name in FILES:
            if (run / name).is_file():
                shutil.copyfile(run / name, work / name)
        if also is not None:
            _copy(also, work / "files")
        files = {path: _digest(work / path) for path in sorted(_files(work))}
        if target.exists():  # an addition that broke off before its line was written
            shutil.rmtree(target)
        work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return files


def _copy(source: Path, target: Path) -> None:
    """Plain files and folders only: what a link points to may change after it was signed."""
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise UserError(f"--files {source}: {name} is a link or no plain file")
        if path.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / name)


def _files(folder: Path) -> Iterator[str]:
    """Everything in a folder that is no folder, links included, by its path in it."""
    for path in folder.rglob("*"):
        if path.is_symlink() or not path.is_dir():
            yield path.relative_to(folder).as_posix()


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _canonical(content: object) -> bytes:
    """The one way in which an entry is written: what is signed."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=True).encode()


def _line(entry: dict[str, Any], signature: str) -> bytes:
    return _canonical({"entry": entry, "signature": signature}) + b"\n"


def _append(path: Path, line: bytes) -> None:
    with path.open("ab") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


# --- reading ----------------------------------------------------------------------------------------------------------


def entries(folder: Path) -> list[dict[str, Any]]:
    """The releases in the order they were made, as they stand; ``verify`` says whether they are to be believed.

    Raises:
        UserError: there is no registry, or its log is not one.
    """
    if not (folder / LOG).is_file():
        raise UserError(f"{folder}: no registry, there is no {LOG} in it; `consilium registry add` makes one")
    try:
        return [json.loads(line)["entry"] for line in (folder / LOG).read_bytes().splitlines()]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder / LOG}: is damaged; `consilium registry verify` says where") from None


def _lines(folder: Path, key: Ed25519PublicKey) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Each line of the log: its entry, the digest of the line, and what is wrong with it ("" for nothing)."""
    content = (folder / LOG).read_bytes() if (folder / LOG).exists() else b""
    previous = _NONE
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        digest = hashlib.sha256(line).hexdigest()
        entry: dict[str, Any] = {}
        try:
            found = json.loads(line)
            entry, signature = found["entry"], found["signature"]
            whole = line == _line(entry, bytes.fromhex(signature).hex()) and set(found) == {"entry", "signature"}
            key.verify(bytes.fromhex(signature), _canonical(entry))
        except InvalidSignature:
            yield entry, digest, "the signature does not fit the entry and the key"
        except (ValueError, KeyError, TypeError, RecursionError):
            yield {}, digest, "is not a line of a registry"
        else:
            fault = "" if whole else "is not written as it was signed"
            if entry.get("previous") != previous or entry.get("number") != number:
                fault = fault or "does not follow the line before it: one was taken out, added or moved"
            yield entry, digest, fault
        previous = digest


def _require_log(folder: Path, key: Ed25519PublicKey) -> list[tuple[dict[str, Any], str]]:
    """The log's entries with the digests of their lines; nothing is added to a log that is not in order."""
    found = list(_lines(folder, key))
    for number, (_, _, fault) in enumerate(found, start=1):
        if fault:
            raise UserError(f"{folder / LOG} line {number}: {fault}; see `consilium registry verify`")
    return [(entry, digest) for entry, digest, _ in found]


def verify(folder: Path, key: Path | None = None) -> tuple[list[Fault], str, str]:
    """What is not as it was signed: every line, every file, files too many or too few.

    ``key``: the coordinator's public key, had from elsewhere; without it the registry's own is believed.
    Gives the faults, the digest of the last line and the fingerprint of the key.

    Raises:
        UserError: there is no registry or no such key.
    """
    if not (folder / LOG).is_file():
        raise UserError(f"{folder}: no registry, there is no {LOG} in it")
    faults: list[Fault] = []
    own: Ed25519PublicKey | None = None
    try:
        own = read_public(folder / KEY)
    except UserError as error:
        faults.append(Fault(KEY, str(error)))
    believed = read_public(key) if key else own
    if believed is None:
        return faults, "", ""
    if own is not None and own.public_bytes_raw() != believed.public_bytes_raw():
        faults.append(Fault(KEY, "is another key than the one given"))
    last, listed = "", {KEY, LOG, ".lock"}
    for number, (entry, digest, fault) in enumerate(_lines(folder, believed), start=1):
        last = digest
        if fault:
            faults.append(Fault(f"{LOG} line {number}", fault))
        else:
            faults += _faults_of(folder, entry, listed)
    faults += [Fault(path, "belongs to no release") for path in sorted(set(_files(folder)) - listed)]
    if not last:
        faults.append(Fault(LOG, "is empty"))
    return faults, last, fingerprint(believed)


def _faults_of(folder: Path, entry: dict[str, Any], listed: set[str]) -> Iterator[Fault]:
    """Files of a release that are not as its signed entry says; adds those that belong there to ``listed``."""
    for name, facts in entry["files"].items():
        path = f"{entry['name']}/{entry['version']}/{name}"
        listed.add(path)
        if (folder / path).is_symlink() or not (folder / path).is_file():
            yield Fault(path, "is not there")
        elif _digest(folder / path) != facts:
            yield Fault(path, "was changed since it was signed")

"""Which code may run at this site: the installed release, and what its data manager has approved besides.

A bundle that is neither is kept as a file that nothing unpacks, so that `consilium site approve` can show how it
differs from the installed release. All lies in the site's own folder:

    .consilium/bundles/refused/SHA256.fab     what was sent and not run, the last few
    .consilium/bundles/approved.jsonl         what was approved, when
    .consilium/bundles/approved/SHA256/       its files, from where it runs
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

from shared import __version__
from shared.bundle import BadBundle, Difference, Files, differences, read_bundle, release, release_version
from shared.errors import SiteRefusal, UserError
from shared.sitefile import OWN_FOLDER

KEPT = 5  # refused bundles; an older one is sent again when a server still wants it to run


class Bundles:
    """The bundles of one site; ``home`` is the folder of its site.toml."""

    def __init__(self, home: Path) -> None:
        self.folder = home / OWN_FOLDER / "bundles"

    def admit(self, content: bytes) -> Path | None:
        """Where the code of a bundle lies that may run: None for the installed release itself.

        Raises:
            SiteRefusal: it is neither the installed release nor approved; it was put aside.
        """
        digest = sha256(content).hexdigest()
        if digest in self._approved() and (self.folder / "approved" / digest).is_dir():
            return self.folder / "approved" / digest
        try:
            files = read_bundle(content)
            found = differences(files, release())
        except BadBundle as error:
            raise SiteRefusal("bundle-refused", f"the program that the server sent is refused: {error}") from None
        if not found:
            return None
        with contextlib.suppress(OSError):  # a disk that is full makes it no less refused
            self._put_aside(digest, content)
        raise SiteRefusal(
            "bundle-refused",
            f"the program that the server sent {_other_release(files)}differs from the one installed here in "
            f"{len(found)} files; it was not run. To see how, and to allow it: consilium site approve SITE.toml "
            f"{digest[:12]}",
        )

    def waiting(self) -> dict[str, Path]:
        """Refused bundles by SHA-256, the newest first."""
        files = sorted((self.folder / "refused").glob("*.fab"), key=lambda path: -path.stat().st_mtime_ns)
        return {path.stem: path for path in files}

    def find(self, start: str) -> tuple[str, list[Difference]]:
        """The refused bundle whose SHA-256 begins with ``start``, and how it differs from the installed release.

        Raises:
            UserError: there is none, or several.
        """
        found = [digest for digest in self.waiting() if digest.startswith(start.lower())]
        if not re.fullmatch(r"[0-9A-Fa-f]{6,64}", start) or len(found) != 1:
            raise UserError(
                f"{start}: {'several bundles begin so' if len(found) > 1 else 'no bundle waits that begins so'}; "
                "`consilium site approve SITE.toml` lists them"
            )
        return found[0], differences(self._read(found[0]), release())

    def approve(self, digest: str) -> None:
        """Let the refused bundle of that SHA-256 run from now on.

        Raises:
            UserError: it changed since it was put aside, or cannot be written.
        """
        files = self._read(digest)
        target = self.folder / "approved" / digest
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=".writing-"))
            for name, content in files.items():
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(folder, target)
            line = json.dumps({"sha256": digest, "time": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}"})
            with (self.folder / "approved.jsonl").open("a", encoding="utf-8") as file:
                file.write(line + "\n")
            (self.folder / "refused" / f"{digest}.fab").unlink()
        except OSError as error:
            raise UserError(f"{target}: cannot be written: {error.strerror}") from None

    def _approved(self) -> set[str]:
        try:
            lines = (self.folder / "approved.jsonl").read_text(encoding="utf-8").splitlines()
        except OSError:
            return set()
        return {json.loads(line)["sha256"] for line in lines if line.endswith("}")}

    def _read(self, digest: str) -> dict[str, bytes]:
        content = (self.folder / "refused" / f"{digest}.fab").read_bytes()
        if sha256(content).hexdigest() != digest:
            raise UserError(f"the bundle {digest[:12]} was changed on this machine; delete it and wait for a new one")
        try:
            return read_bundle(content)
        except BadBundle as error:
            raise UserError(f"the bundle {digest[:12]} cannot be read: {error}") from None

    def _put_aside(self, digest: str, content: bytes) -> None:
        folder = self.folder / "refused"
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, suffix=".writing")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(name, folder / f"{digest}.fab")
        for path in list(self.waiting().values())[KEPT:]:
            path.unlink(missing_ok=True)


def _other_release(files: Files) -> str:
    """What to do where the difference is just that the server and this site have other releases installed."""
    theirs = release_version(files)
    if theirs in ("", __version__):
        return ""
    return f"is consilium {theirs}, here {__version__} is installed: install what the coordinator has. It "

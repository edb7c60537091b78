"""What the dashboard asks of a provisioned federation on this machine: who is connected, certificates, stop a run."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from cryptography import x509

from server.control import Control
from server.federation import Folder
from server.pki import days_left
from shared.errors import UserError

FRESH = 1.5  # seconds that an answer of the server is used for


class FederationView:
    """The federation in ``path``.

    Raises:
        UserError: none was set up there.
    """

    def __init__(self, path: Path) -> None:
        self.folder = Folder(path.resolve())
        self.name = self.folder.read().name
        self._last: tuple[float, dict[str, Any]] = (-FRESH, {})

    def look(self) -> dict[str, Any]:
        """``running`` and why not (``reason``), ``sites``: {name: {online, since}}, days of the ``certificate``."""
        asked, found = self._last
        if time.monotonic() - asked < FRESH:
            return found
        federation = self.folder.read()
        sites: dict[str, Any] = {name: {"online": False, "since": ""} for name in self.folder.site_names()}
        found = {"name": federation.name, "address": federation.address, "running": True, "reason": ""}
        try:
            with Control(self.folder) as control:
                for node in control.nodes():
                    sites[node.name] = {"online": node.online, "since": node.since}
        except (UserError, OSError) as error:
            found |= {"running": False, "reason": str(error)}
        try:
            certificate = x509.load_pem_x509_certificate(self.folder.server_cert.read_bytes())
            found["certificate"] = math.floor(days_left(certificate))
        except (OSError, ValueError):
            found["certificate"] = None
        found["sites"] = sites
        self._last = (time.monotonic(), found)
        return found

    def submitted(self, run: Path) -> int | None:
        """The server's number of the run in a run folder; None where it is no run of this federation."""
        if run.parent != self.folder.runs.resolve():
            return None
        try:
            return int(json.loads((run / "submitted.json").read_text(encoding="utf-8"))["number"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def outcome(self, run: Path) -> str | None:
        """Of a run of this federation: "" while it goes on, else completed, failed or stopped; None if not known."""
        number = self.submitted(run)
        if number is None:
            return None
        try:
            with Control(self.folder) as control:
                status = control.status(number)
        except (UserError, OSError, KeyError):  # the server is away, or has forgotten the run
            return None
        return status.outcome or "over" if status.over else ""

    def stop(self, run: Path) -> bool:
        """End the run in a run folder; what it wrote stays. Whether it could be ended.

        Raises:
            UserError: it is no run of this federation, or the server does not answer.
        """
        number = self.submitted(run)
        if number is None:
            raise UserError("this is no run of the federation that the dashboard was started with")
        with Control(self.folder) as control:
            return control.stop(number)

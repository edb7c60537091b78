"""What the dashboard asks of a provisioned federation on this machine: who is connected, certificates, stop a run."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from cryptography import x509

from server.control import Control, Status, submitted
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
        self._last: tuple[float, dict[str, Any]] = (-math.inf, {})
        self._heard: float | None = None  # when the server last answered

    def look(self) -> dict[str, Any]:
        """``running``, and if not why (``reason``) and when it last answered (``heard``); ``sites``: {name: {online,
        since}}, ``runs``: {its number: state}, days of the ``certificate``."""
        asked, found = self._last
        if time.monotonic() - asked < FRESH:
            return found
        federation = self.folder.read()
        sites: dict[str, Any] = {name: {"online": False, "since": ""} for name in self.folder.site_names()}
        found = {"name": federation.name, "address": federation.address, "running": True, "reason": ""}
        found |= {"heard": None, "runs": {}}
        try:
            with Control(self.folder) as control:
                for node in control.nodes():
                    sites[node.name] = {"online": node.online, "since": node.since}
                found["runs"] = {number: _state(status) for number, status in control.statuses().items()}
            self._heard = time.time()
        except (UserError, OSError) as error:
            found |= {"running": False, "reason": str(error), "heard": self._heard}
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
        return submitted(run)

    def state(self, run: Path) -> str | None:
        """Of a run that its journal calls running: running, finished, failed or stopped, as the server says; unknown
        while that does not answer; None where it is no run of this federation or the server has forgotten it."""
        number = self.submitted(run)
        if number is None:
            return None
        found = self.look()
        state: str | None = found["runs"].get(number) if found["running"] else "unknown"
        return state

    def server(self) -> dict[str, Any]:
        """Whether the server answers: ``running``, ``reason`` and ``heard`` of ``look``."""
        return {key: value for key, value in self.look().items() if key in ("running", "reason", "heard")}

    def stop(self, run: Path) -> bool:
        """End the run in a run folder; what it wrote stays. Whether it could be ended.

        Raises:
            UserError: it is no run of this federation, or the server does not answer.
        """
        number = self.submitted(run)
        if number is None:
            raise UserError("this is no run of the federation that the dashboard was started with")
        self._last = (-math.inf, {})  # whoever asks next is told what became of it
        with Control(self.folder) as control:
            return control.stop(number)


def _state(status: Status) -> str:
    """As the store calls it."""
    return {"completed": "finished"}.get(status.outcome, status.outcome or "finished") if status.over else "running"

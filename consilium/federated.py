"""Runs on a real federation: submit, follow, resume, stop. What a run writes lies on the server, in DIR/runs/RUN."""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from consilium.progress import showing
from server.card import write_card
from server.control import Control, Status, UnknownRun
from server.database.engine import open_database, without_password
from server.federation import Folder
from server.report import write_report
from server.results import run_scores
from server.store import Store, read_events, write_json
from shared import __version__
from shared.config import Job, Scalar, load_job
from shared.errors import UserError
from shared.files import write_text
from shared.tasks import load_task
from simulations.result import Result

POLL = 1.0  # seconds between looks at a run
PATIENCE = 5  # looks in vain before the server counts as away
# What SuperLink says of a run, where a person wants other words.
WHY = {"No heartbeat received from the task": "the run's program on the server ended, or the server was stopped"}


class Runs:
    """The runs of the federation in ``folder``, whose server is on this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = Folder(folder.resolve())
        self.folder.read()
        self._past = 0  # so many events are of before a run was resumed

    def path(self, name: str) -> Path:
        """The folder of a run."""
        return self.folder.runs / name

    def submit(self, job_file: Path, settings: Sequence[str], heldout: Path | None, store: str = "") -> str:
        """Start a run of the job; gives its name. ``store`` is the database, if not the file beside the run folders.

        Raises:
            UserError: the job is wrong, the server is not started, no site is accepted, or the store cannot be opened.
        """
        job = load_job(job_file, settings)
        load_task(job.task).check(job)
        if heldout is not None:
            from server.heldout import load_heldout

            load_heldout(heldout, job)
        if store:
            open_database(without_password(store)).dispose()
        stem = re.sub(r"[^A-Za-z0-9]+", "-", job.name).strip("-")[:40] or "job"
        name = f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        with Control(self.folder) as control:
            nodes = control.nodes()
            if not nodes:
                raise UserError(f"{self.folder.path}: no site is accepted yet; provision one")
            folder = self.path(name)
            write_text(folder / "job.toml", job.toml())
            more: dict[str, Scalar] = {"run.store": without_password(store)}
            more |= {"run.heldout": str(heldout.resolve())} if heldout else {}
            config = job.flat() | {"run.out": str(folder), "run.id": name, "run.expected": len(nodes)} | more
            self._start(control, name, config)
        return name

    def resume(self, name: str) -> str:
        """Go on with a run that broke off.

        Raises:
            UserError: there is no such run, it is still going on, or it is complete.
        """
        config = self._submitted(name)["config"]
        with Control(self.folder) as control:
            with contextlib.suppress(UnknownRun):  # of a server that lost its runs: ours is whole in its folder
                if not (status := self._status(control, name)).over:
                    raise UserError(f"run {name} is still {status.state}; --stop it first, or --attach to follow it")
            if self._complete(name):
                raise UserError(f"run {name} is complete; there is nothing to go on with")
            self._past = len(read_events(self.path(name)))
            self._start(control, name, config | {"run.resume": True})
        return name

    def stop(self, name: str) -> str:
        """End a run; what it wrote stays, and it can be resumed."""
        with Control(self.folder) as control:
            ended = control.stop(int(self._submitted(name)["number"]))
        if ended:
            self._note_end(name, "stopped by the coordinator")
        return f"run {name} is stopped" if ended else f"run {name} was over already"

    def _note_end(self, name: str, reason: str) -> None:
        """Write down how a run ended whose program could not do so itself, else it would look as if it went on."""
        folder = self.path(name)
        past = [event["event"] for event in read_events(folder)]
        if past and past[-1] not in ("finish", "failed"):
            store = str(self._submitted(name)["config"].get("run.store", ""))
            with contextlib.suppress(OSError):
                Store(folder, store).add("failed", reason=reason)

    def follow(self, name: str) -> int:
        """Show a run's progress until it is over, then its table; gives the exit code.

        Ctrl-C stops following, not the run.
        """
        job = load_job(self.path(name) / "job.toml") if self._submitted(name) else Job()
        try:
            with showing(job) as observe, Control(self.folder) as control:
                for number, event in enumerate(self._events(control, name)):
                    if observe is not None:
                        observe("federated", event | ({"past": True} if number < self._past else {}))
                status = self._ended(control, name)
        except KeyboardInterrupt:
            print(f"\nthe run goes on; to follow it: consilium run --federation {self.folder.path} --attach {name}")
            return 130
        return self._conclude(name, job, status)

    def _start(self, control: Control, name: str, config: dict[str, Scalar]) -> None:
        number = control.start(config)
        write_json(self.path(name) / "submitted.json", {"number": number, "config": config})

    def _submitted(self, name: str) -> dict[str, Any]:
        path = self.path(name) / "submitted.json"
        if not re.fullmatch(r"[A-Za-z0-9-]+", name) or not path.exists():
            there = sorted(path.parent.name for path in self.folder.runs.glob("*/submitted.json"))
            raise UserError(f"no run {name!r}; there are: {', '.join(there[-8:]) or 'none'}")
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return content

    def _status(self, control: Control, name: str) -> Status:
        return control.status(int(self._submitted(name)["number"]))

    def _complete(self, name: str) -> bool:
        return any(event["event"] == "finish" for event in read_events(self.path(name)))

    def _ended(self, control: Control, name: str) -> Status:
        """How a run ended: as the server says, or where that is away as the run wrote down."""
        try:
            return self._status(control, name)
        except UserError:
            return Status("finished", "completed" if self._complete(name) else "failed", "")

    def _events(self, control: Control, name: str) -> Iterator[dict[str, Any]]:
        """The run's events as they are stored, until it is over; a server that is away for a while is waited for."""
        log, read, last, asked = self.path(name) / "rounds.jsonl", 0, "", 0
        while True:
            try:
                over, away, asked = self._status(control, name).over, "", 0
            except UserError as error:
                over, away = False, str(error)
            if log.exists():
                with log.open("rb") as file:
                    file.seek(read)
                    whole, _, _ = file.read().rpartition(b"\n")
                read += len(whole) + 1 if whole else 0
                for line in whole.splitlines():
                    with contextlib.suppress(json.JSONDecodeError):  # broken off, when the disk was full or at a crash
                        event = json.loads(line)
                        last = event["event"]
                        yield event
            asked += bool(away)  # in vain, one after the other
            if over or (asked >= PATIENCE and last in ("finish", "failed")):
                return
            if asked == PATIENCE:
                print(f"waiting: {away}", file=sys.stderr)
            time.sleep(POLL)

    def _conclude(self, name: str, job: Job, status: Status) -> int:
        folder = self.path(name)
        if (folder / "rounds.jsonl").exists():
            facts = {"version": __version__, "job": job.flat(), "job_sha256": job.sha256, "seed": job.seed}
            try:
                write_json(folder / "result.json", facts | {"federated": run_scores(folder)})
                store = str(self._submitted(name)["config"].get("run.store", ""))
                write_report(folder, store)
                write_card(folder, store)
            except OSError as error:
                print(f"no report: {folder} cannot be written: {error.strerror}")
        if status.outcome == "completed" and self._complete(name):
            from consilium.tables import print_result

            print_result(Result(folder))
            return 0
        why = WHY.get(status.details, status.details) or status.outcome
        self._note_end(name, why)
        why = next((event["reason"] for event in read_events(folder)[::-1] if event["event"] == "failed"), why)
        again = f"consilium run --federation {self.folder.path} --resume {name}"
        print(f"the run {status.outcome}: {why}\nto go on after its last whole round: {again}")
        return 1

"""A run in MLflow's tracking; needs the extra ``mlflow``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from server.database.query import Row
from server.tracking.points import Point
from shared.errors import UserError, how_to_install

AT_ONCE = 1000  # figures of a request, MLflow's limit
PARAMS = 100  # settings of a request, MLflow's limit
KEY = "consilium.run"  # the tag by which a run is found again
FILES = ("report.html", "model_card.md", "job.toml", "result.json")
_STATES = {"finished": "FINISHED", "failed": "FAILED", "running": "RUNNING"}


class Mlflow:
    """The run at a tracking server: settings as parameters, figures as metrics by round, the report as an artefact.

    A run that was tracked before gets its figures in the same place; MLflow keeps a metric's figure of a round once.
    """

    def __init__(self, uri: str, experiment: str, folder: Path, row: Row) -> None:
        try:
            os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # a hospital's runs are nobody else's business
            os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
            from mlflow.exceptions import MlflowException
            from mlflow.tracking import MlflowClient
        except ImportError:
            raise UserError(f"MLflow is not installed; {how_to_install('mlflow')}") from None
        self.uri, self.folder, self.error = uri, folder, MlflowException
        # Nobody waits minutes for a wrong address.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        try:
            self.client = MlflowClient(tracking_uri=uri)
            self.run = self._run(experiment, row)
        except MlflowException as error:
            raise self._unreachable(error) from None

    def write(self, news: Sequence[Point]) -> None:
        """Log figures, a thousand a request."""
        from mlflow.entities import Metric

        metrics = [Metric(_name(one.name), one.value, int(one.time * 1000), one.step) for one in news]
        try:
            for first in range(0, len(metrics), AT_ONCE):
                self.client.log_batch(self.run, metrics=metrics[first : first + AT_ONCE])
        except self.error as error:
            raise self._unreachable(error) from None

    def end(self, row: Row) -> None:
        """Give report, card and result to the server, and say how the run ended."""
        try:
            for name in FILES:
                if (self.folder / name).is_file():
                    self.client.log_artifact(self.run, str(self.folder / name))
            if row["status"] != "running":
                self.client.set_terminated(self.run, _STATES[row["status"]], int(row["updated"] * 1000))
        except self.error as error:
            raise self._unreachable(error) from None

    def _run(self, experiment: str, row: Row) -> str:
        found = self.client.get_experiment_by_name(experiment)
        own = found.experiment_id if found else self.client.create_experiment(experiment)
        there: Any = self.client.search_runs([own], f"tags.`{KEY}` = '{row['key']}'", max_results=1)
        if there:
            return str(there[0].info.run_id)
        made = self.client.create_run(own, int(row["started"] * 1000), {KEY: row["key"]}, row["name"] or row["path"])
        run = str(made.info.run_id)
        from mlflow.entities import Param

        facts = {"job_sha256": row["job"], "consilium": row["version"], **row["settings"]}
        params = [Param(name, str(value)) for name, value in facts.items()]
        for first in range(0, len(params), PARAMS):
            self.client.log_batch(run, params=params[first : first + PARAMS])
        return run

    def _unreachable(self, error: Exception) -> UserError:
        return UserError(f"--mlflow {self.uri}: {' '.join(str(error).split())[:200]}")


def _name(name: str) -> str:
    """MLflow takes letters, digits and ``_-./ :`` in a metric's name."""
    return "".join(letter if letter.isalnum() or letter in "_-./ :" else "_" for letter in name)

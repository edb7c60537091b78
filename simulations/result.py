"""What a simulation gives back: figures as tables, pictures as Plotly figures, read from the run folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.config import Job, job_from_flat

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects


@dataclass(frozen=True)
class Result:
    """A finished run. ``folder`` holds all of it; an old run is opened with ``Result(Path("runs/chest"))``."""

    folder: Path

    @property
    def scores(self) -> dict[str, Any]:
        """result.json: keys ``federated``, and with baselines ``pooled`` and ``local``."""
        content: dict[str, Any] = json.loads((self.folder / "result.json").read_text(encoding="utf-8"))
        return content

    @property
    def job(self) -> Job:
        """The resolved job."""
        return job_from_flat(self.scores["job"])

    @property
    def report(self) -> Path:
        """The page to read."""
        return self.folder / "report.html"

    def rows(self) -> list[dict[str, Any]]:
        """One row per trained model and test set: model, tested on, metric, value, low, high, n."""
        scores = self.scores
        own = scores["federated"]
        models = {"federated": own} | ({"personal": own["personal"]} if "personal" in own else {})
        models |= {"pooled": scores["pooled"]} if "pooled" in scores else {}
        models |= {f"local {name}": row for name, row in scores.get("local", {}).items()}
        return [
            {
                "model": model,
                "tested on": place,
                "metric": metric,
                "value": part[metric],
                "low": low,
                "high": high,
                "n": part["n"][metric],
            }
            for model, score in models.items()
            for place, part in {"all sites": score, **score.get("sites", {})}.items()
            for metric, (low, high) in part.get("intervals", {}).items()
        ]

    def table(self) -> pandas.DataFrame | list[dict[str, Any]]:
        """``rows`` as a pandas data frame where pandas is installed."""
        try:
            import pandas
        except ImportError:
            return self.rows()
        return pandas.DataFrame(self.rows())

    def figures(self) -> dict[str, plotly.graph_objects.Figure]:
        """The report's figures by name, to show in a notebook."""
        from server.figures import all_figures

        return all_figures(self.folder)

    def _repr_html_(self) -> str:
        table = self.table()
        return f"<p>{self.folder}</p>" + (table._repr_html_() if hasattr(table, "_repr_html_") else "")

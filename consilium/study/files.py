"""What a study leaves: study.html, study.csv, sites.csv and study.json, each written whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from consilium.study.collect import Found, collect
from consilium.study.compare import Spread, spread
from consilium.study.page import page
from consilium.study.plan import Plan
from consilium.study.run import Outcome
from consilium.study.tables import methods_of, sites_csv, study_csv
from consilium.study.verdict import Verdict, gains, verdicts
from server.store import write_json
from shared import __version__
from shared.files import write_text


def write_study(plan: Plan, outcomes: Sequence[Outcome], text: str, out: Path) -> tuple[Found, list[Verdict]]:
    """Write all of it into ``out``; gives what was found and what is said of it."""
    found = collect(plan, outcomes)
    told = verdicts(found)
    write_text(out / "study.csv", study_csv(found))
    write_text(out / "sites.csv", sites_csv(found))
    write_json(out / "study.json", _content(found, told, outcomes))
    write_text(out / "study.html", page(found, told, text))
    return found, told


def _content(found: Found, told: Sequence[Verdict], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    plan = found.plan
    return {
        "version": __version__,
        "name": plan.name,
        "seeds": list(plan.seeds),
        "quick": plan.quick,
        "recommendations": [vars(one) for one in told],
        "methods": [
            {
                "setting": setting,
                "method": method,
                "test": _told(spread(list(found.values(setting, method).values()))),
                "worst_site": _told(spread([row.worst for row in found.of(setting, method).values()])),
                "gains_over_alone": {site: _told(gain) for site, gain in gains(found, setting, method).items()}
                if method in plan.methods
                else {},
            }
            for setting in plan.settings
            for method in methods_of(found, setting)
        ],
        "rows": [vars(row) for row in found.rows],
        "failed": [vars(one) for one in found.failures],
        "cells": [
            {"cell": one.cell.id, "title": one.cell.title, "state": one.state, "seconds": one.seconds,
             "job_sha256": one.cell.job.sha256}
            for one in outcomes
        ],
    }  # fmt: skip


def _told(one: Spread) -> dict[str, float]:
    return dict(vars(one))

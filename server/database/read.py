"""The questions that the dashboard, the reports and the commands ask of the store.

``db`` is an engine of ``server.database.engine.open_database``; ``id`` a run's. Rows are dicts of plain values, ready
for JSON; times are seconds since 1970, NaN is None. A run that is not there raises ``UserError``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Engine

Row = dict[str, Any]


def runs(
    db: Engine, limit: int = 50, offset: int = 0, sort: str = "-started", filter: Mapping[str, Any] | None = None
) -> tuple[list[Row], int]:
    """Runs as rows of ``schema.run`` (without ``settings``, with ``parent_path``), and how many there are in all.

    ``sort`` is a column, with ``-`` from the largest; missing values come last. ``filter`` holds columns and the value
    that they must have; of ``search`` the job's name or the path must contain it. Unless it names ``parent``, baselines
    and reference networks are left out.

    Raises:
        UserError: no such column.
    """
    raise NotImplementedError


def run(db: Engine, id: int) -> Row:
    """All of a run's row with ``settings``, and ``children``: the rows of its baselines and its reference network."""
    raise NotImplementedError


def find(db: Engine, folder: Path) -> int | None:
    """The id of the run in a folder, by the key in its journal; None where the store does not know it."""
    raise NotImplementedError


def rounds(db: Engine, id: int) -> list[Row]:
    """The training rounds: round, time, seconds, trained, dropped (numbers of sites), images, loss (mean per image),
    down, up (bytes), repeated, and as far as the run has them ``central`` and ``secure`` as in the journal."""
    raise NotImplementedError


def site_grid(db: Engine, id: int, first: int = 1, last: int | None = None) -> Row:
    """Who trained when: ``sites`` (names), ``rounds`` (numbers) and ``cells``, a list a site with a cell a round.

    A cell is None where the site was not asked, else {reason, weight, steps, images, loss (per image), epsilon,
    seconds, down, up, repeated}; ``reason`` is None where the site's reply was used.
    """
    raise NotImplementedError


def evaluations(db: Engine, id: int, split: str | None = None) -> list[Row]:
    """Evaluations of the global model over all sites, in the order of rounds: round, time, split, images, metrics
    ({name: {value, low, high, n}}), dropped ([{site, reason}]), server ({images, metrics} or None)."""
    raise NotImplementedError


def site_metrics(db: Engine, id: int, split: str = "val", metrics: Sequence[str] | None = None) -> dict[str, list[Row]]:
    """The global model at each site: {site: [{round, images, metrics}]}, of ``metrics`` or of all."""
    raise NotImplementedError


def test_sums(db: Engine, id: int) -> dict[str, Row]:
    """The sums that each site sent of its test images, at the last test."""
    raise NotImplementedError


def privacy(db: Engine, id: int) -> Row:
    """What differential privacy the run gave: ``spent`` as ``server.results.privacy_spent`` ({} without), ``allowed``
    (the job's epsilon, or None) and ``course``: {site or "central": [[round, epsilon], …]}."""
    raise NotImplementedError


def timings(db: Engine, id: int) -> Row:
    """``seconds`` of the run, ``rounds``: [{round, seconds, down, up}], ``sites``: {name: {down, up, seconds}}."""
    raise NotImplementedError


def warnings(db: Engine, id: int) -> list[Row]:
    """What somebody should know, the gravest first: kind (failed, warning, refused), text, time, and of replies that
    were not used (refused) site, step (survey, round, val, test), reason, rounds."""
    raise NotImplementedError


def surveyed(db: Engine, id: int) -> list[Row]:
    """The sites of a run: name, node, train, val, test (images), classes, skipped, reason (None: takes part)."""
    raise NotImplementedError


def sites(db: Engine) -> list[Row]:
    """The sites over all runs but baselines: name, runs, last_run (id), last_seen, train, val, test, classes, skipped,
    reason (of the last survey), epsilon (last told), dropped (replies not used), last_reason, last_dropped (time)."""
    raise NotImplementedError


def events(db: Engine, id: int) -> list[Row]:
    """The run's events as ``server.store.read_events`` gives them from the journal."""
    raise NotImplementedError

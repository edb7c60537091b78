"""The cells of a study: every simulation that it takes, all of it checked before anything runs."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from consilium.study.file import (
    Method,
    Setting,
    Settings,
    check_keys,
    methods_of,
    seeds_of,
    settings_of,
    text_of,
    value_words,
)
from server.record import count
from shared import __version__
from shared.config import Job, Scalar, job_from_flat, load_job, read_toml, toml_scalar
from shared.errors import UserError
from shared.pairs import fewest
from shared.settings import Privacy
from shared.settings_federation import nothing_shared

FEDERATED, BASELINES, TRIVIAL = "federated", "baselines", "trivial"
QUICK_SEEDS, QUICK_ROUNDS = 2, 4


@dataclass(frozen=True)
class Cell:
    """One simulation. Of the trivial model ``method`` is empty, and one ``seed`` stands for all.

    Of baselines ``method`` says how they were trained, where the methods of a setting are not all held against the
    same. ``baseline`` is the id of the cell with the same data, seed, steps and tuning as this federated one.
    ``only``: its setting is the study's only one, and needs no name on the screen.
    """

    kind: str
    setting: str
    method: str
    seed: int
    job: Job
    data: Path
    baseline: str = ""
    only: bool = False

    @property
    def id(self) -> str:
        """The name of its folder; another job, data folder or release gives another."""
        what = f"{self.kind} {self.job.sha256} {self.data.resolve()} {__version__}"
        slug = "-".join(re.sub(r"[^A-Za-z0-9.]+", "-", word).strip("-.")[:40] for word in self._words() if word)
        return f"{slug}-{hashlib.sha256(what.encode()).hexdigest()[:10]}"

    @property
    def title(self) -> str:
        """What it is called on the screen."""
        setting, *rest = (word for word in self._words() if word)
        return ", ".join(rest) if self.only else f"{setting}: {', '.join(rest)}"

    def _words(self) -> list[str]:
        kind = "" if self.kind == FEDERATED else self.kind
        return [self.setting, kind, self.method, "" if self.kind == TRIVIAL else f"seed {self.seed}"]


@dataclass(frozen=True)
class Plan:
    """A whole study. ``levels`` holds the level of privacy of each setting's methods, "" where there is none.

    ``quick``: it was cut short to see that it runs, so that nothing is to be concluded from it.
    """

    name: str
    settings: tuple[str, ...]
    methods: tuple[str, ...]
    levels: dict[tuple[str, str], str]
    seeds: tuple[int, ...]
    target: float | None
    cells: tuple[Cell, ...]
    quick: bool = False

    @property
    def only(self) -> bool:
        """Whether there is one setting, which is called as the study is."""
        return self.settings == (self.name,)

    @property
    def caution(self) -> str:
        """What must be said first of a quick study."""
        rounds = max((cell.job.federation.rounds for cell in self.cells), default=QUICK_ROUNDS)
        return f"quick: {count(len(self.seeds), 'seed')}, {count(rounds, 'round')}; shows that it runs, nothing else"


def read_plan(path: Path, data: Path | None = None, quick: bool = False) -> Plan:
    """The study in a TOML file; ``data`` is the folder that its data folders lie in.

    ``quick``: two seeds and a few rounds of each cell, to see that all of it runs.

    Raises:
        UserError: one line that says what is wrong with the file, a setting, or a combination of them.
    """
    content = read_toml(path)
    try:
        return _plan(content, path, data, quick)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _plan(content: Mapping[str, Any], path: Path, data: Path | None, quick: bool) -> Plan:
    check_keys(content)
    seeds, name = seeds_of(content), text_of(content, "name", path.stem)
    redraw = content.get("redraw", False)
    if not isinstance(redraw, bool):
        raise UserError(f"redraw = {redraw!r}: must be true or false")
    target = content.get("target")
    if target is not None and (isinstance(target, bool) or not isinstance(target, (int, float))):
        raise UserError(f"target = {target!r}: must be a number, for example 0.95")
    places = list(settings_of(content, path, data, name))
    if len({place.name for place in places}) < len(places):
        raise UserError("two data sets or partitions have one name; give each a name of its own")
    methods = list(methods_of(content))
    if quick:
        seeds = seeds[:QUICK_SEEDS]
    cells: dict[str, Cell] = {}
    own: list[tuple[Cell, str]] = []  # federated cells, each with the key of its baselines
    levels: dict[tuple[str, str], str] = {}
    measured: dict[str, tuple[str, str]] = {}  # by setting: task and metric
    for place, method, seed in itertools.product(places, methods, seeds):
        more: Settings = {"seed": seed, "name": f"{place.name}, {method.name}"}
        more |= {"data.partition_seed": seed} if redraw else {}
        job = _job(place, method.name, method.settings | more, quick)
        levels[place.name, method.name] = level_of(job)
        if measured.setdefault(place.name, (job.task, job.best_metric)) != (job.task, job.best_metric):
            raise UserError(
                f"{_at(place)}methods with different tasks or evaluation.best_metric cannot be compared; "
                "take them out of [grid], [[variant]] and [[privacy]]"
            )
        baseline = Cell(BASELINES, place.name, "", seed, _alone(job, place, method, more, quick), place.data)
        key = _same_training(baseline)  # once for all methods that train as long and in the same way
        baseline = cells.setdefault(key, baseline)
        trivial = Cell(TRIVIAL, place.name, "", seed, baseline.job, place.data)
        cells.setdefault(f"{TRIVIAL} {place.name} {seed if redraw else ''}", trivial)
        own.append((Cell(FEDERATED, place.name, method.name, seed, job, place.data), key))
    cells = {key: _called(cell, cells.values()) for key, cell in cells.items()}
    every = [*cells.values(), *(replace(cell, baseline=cells[key].id) for cell, key in own)]
    # Seed by seed, so that a study that is broken off has whole ones; in each the longest first, the baselines, which
    # are as many models as there are sites and one more.
    every.sort(key=lambda cell: (seeds.index(cell.seed), (BASELINES, TRIVIAL, FEDERATED).index(cell.kind)))
    every = [replace(cell, only=places[0].only) for cell in every]
    names = tuple(place.name for place in places)
    number = None if target is None else float(target)
    return Plan(name, names, tuple(method.name for method in methods), levels, seeds, number, tuple(every), quick)


def _at(place: Setting) -> str:
    return "" if place.only else f"{place.name}: "


def _job(place: Setting, method: str, settings: Settings, quick: bool) -> Job:
    chosen = place.settings | settings
    try:
        job = load_job(place.job, [f"{key}={toml_scalar(value)}" for key, value in chosen.items()])
    except UserError as error:
        raise UserError(f"{_at(place)}{method}: {error}") from None
    if quick:
        rounds = min(job.federation.rounds, QUICK_ROUNDS)
        return job.replace(federation__rounds=rounds, evaluation__every=max(rounds // 2, 1))
    return job


def _alone(job: Job, place: Setting, method: Method, more: Settings, quick: bool) -> Job:
    """What a federated job is held against: what its level of privacy asks for, nobody needs who shares nothing."""
    try:
        plain = _job(place, method.name, method.plain | more, quick)
    except UserError:  # without the level it is no job
        plain = job
    length: dict[str, Scalar] = {
        "federation__rounds": job.federation.rounds,
        "train__local_steps": job.train.local_steps,
        "train__local_epochs": job.train.local_epochs,
    }
    return alone(plain.replace(**length), place.name)


def alone(job: Job, name: str) -> Job:
    """The job of the models it is held against: as long, tuned and augmented the same; nothing is shared, so none of
    the federation's algorithm and no noise.
    """
    fresh = {f"privacy.{item.name}": item.default for item in fields(Privacy)}
    flat = job.flat() | nothing_shared() | fresh | {"name": f"{name}, alone and pooled"}
    if job.federation.order == "buffered":  # a round of it has fewer steps
        flat |= {"federation.order": "buffered", "federation.buffer": job.federation.buffer}
    if job.federation.fraction < 1:  # of a share of the sites no fewer take part than its aggregator needs
        flat["federation.min_sites"] = max(job.federation.min_sites, fewest(job))
    return job_from_flat(flat)


def _same_training(cell: Cell) -> str:
    """Equal for baselines that would train the same models: short rounds or long ones make no difference to them."""
    flat = cell.job.flat()
    length = int(flat.pop("federation.rounds")) * int(flat.pop("train.local_steps"))
    flat["evaluation.every"] = 0
    return f"{cell.setting} {length} {sorted(flat.items())}"


def _called(cell: Cell, others: Iterable[Cell]) -> Cell:
    """A baseline with what tells it from the other baselines of its setting and seed, if there are any."""
    if cell.kind != BASELINES:
        return cell
    flats = [
        one.job.flat() for one in others if (one.kind, one.setting, one.seed) == (BASELINES, cell.setting, cell.seed)
    ]
    own = cell.job.flat()
    differ = [key for key in own if len({flat[key] for flat in flats}) > 1]
    return replace(cell, method=", ".join(value_words(key, own[key]) for key in differ))


def level_of(job: Job) -> str:
    """The level of privacy a job promises, in a few words; "" for none."""
    asked = job.privacy
    if asked.dp == "none":
        return ""
    much = f"epsilon {asked.epsilon:g}" if asked.epsilon else f"noise {asked.noise_multiplier:g}"
    return f"{asked.dp}, {much}"

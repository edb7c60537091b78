"""STUDY.toml: which jobs are run on which data with which settings and seeds; all of it checked before anything runs.

job = "jobs/pneumonia.toml"       # paths are relative to this file
data = "pneumonia"                # relative to --data where that is given, else to this file
seeds = [0, 1, 2]
[grid]                            # every combination of these values is a method
"federation.strategy" = ["fedavg", "fedprox"]
[[variant]]                       # or methods by name, each a set of settings; both may be given
name = "slow"
"train.learning_rate" = 0.001
[[partition]]                     # who has which images
name = "Dirichlet 0.1"
"data.partition_alpha" = 0.1
[[privacy]]                       # levels of privacy
name = "epsilon 8"
"privacy.dp" = "local"
"privacy.epsilon" = 8.0
[[dataset]]                       # several data sets: instead of job and data above
name = "nuclei"
job = "jobs/nuclei.toml"
data = "nuclei"
"model.width" = 8                 # settings of this data set

Further keys: ``name``; ``redraw = true``, each seed deals the images out anew; ``target``, the validation figure that
rounds and bytes are counted to, default .98 of the pooled model's; ``[set]``, settings of every cell.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from shared import __version__
from shared.config import Job, Scalar, job_from_flat, knobs, load_job, nearest, read_toml, toml_scalar
from shared.errors import UserError
from shared.settings import Federation, Privacy

KEYS = (
    "name", "job", "data", "seeds", "redraw", "target", "set", "grid", "variant", "partition", "privacy", "dataset"
)  # fmt: skip
OWN = {"seed": "seeds = [0, 1, 2] at the top of the file", "name": "the name of the study or of the data set"}
FEDERATED, BASELINES, TRIVIAL = "federated", "baselines", "trivial"
# What of [federation] also decides how long a model is trained that nobody shares; the rest is the federation's alone.
KEPT = ("rounds", "fraction", "min_sites", "round_timeout", "start_timeout")
QUICK_SEEDS, QUICK_ROUNDS = 2, 4

Settings = dict[str, Scalar]


@dataclass(frozen=True)
class Choice:
    """A named set of settings: a value on one axis of the study."""

    name: str
    settings: Settings


@dataclass(frozen=True)
class Setting:
    """Where methods are compared: a data set, dealt out in one way."""

    name: str
    job: Path
    data: Path
    settings: Settings


@dataclass(frozen=True)
class Cell:
    """One simulation. ``method`` is empty for baselines and the trivial model, ``seed`` for the latter stands for all.

    ``baseline`` names the cell whose models have the same data, seed, steps and tuning as a federated one.
    """

    kind: str
    setting: str
    method: str
    seed: int
    job: Job
    data: Path
    baseline: str = ""

    @property
    def id(self) -> str:
        """The name of its folder; another job, data folder or release gives another."""
        what = f"{self.kind} {self.job.sha256} {self.data.resolve()} {__version__}"
        words = [self.setting, self.method or self.kind, *([] if self.kind == TRIVIAL else [f"seed{self.seed}"])]
        slug = "-".join(re.sub(r"[^A-Za-z0-9.]+", "-", word).strip("-.")[:40] for word in words)
        return f"{slug}-{hashlib.sha256(what.encode()).hexdigest()[:10]}"

    @property
    def title(self) -> str:
        """What it is called on the screen."""
        return f"{self.setting}: {self.method or self.kind}" + ("" if self.kind == TRIVIAL else f", seed {self.seed}")


@dataclass(frozen=True)
class Plan:
    """A whole study. ``levels`` holds each method's level of privacy, "" where there is none."""

    name: str
    settings: tuple[str, ...]
    methods: tuple[str, ...]
    levels: dict[str, str]
    seeds: tuple[int, ...]
    target: float | None
    cells: tuple[Cell, ...]


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
    for key in content:
        if key not in KEYS:
            raise UserError(f"unknown key {key!r}{nearest(key, KEYS)}; a study has {', '.join(KEYS)}")
    seeds, name = _seeds(content), _text(content, "name", path.stem)
    redraw = content.get("redraw", False)
    if not isinstance(redraw, bool):
        raise UserError(f"redraw = {redraw!r}: must be true or false")
    target = content.get("target")
    if target is not None and (isinstance(target, bool) or not isinstance(target, (int, float))):
        raise UserError(f"target = {target!r}: must be a number, for example 0.95")
    settings = list(_settings(content, path, data, name))
    methods = list(_methods(content))
    if quick:
        seeds = seeds[:QUICK_SEEDS]
    cells: dict[str, Cell] = {}
    levels: dict[str, str] = {}
    for place, method, seed in itertools.product(settings, methods, seeds):
        more: Settings = {"seed": seed, "name": f"{place.name}, {method.name}"}
        job = _job(place, method, more | ({"data.partition_seed": seed} if redraw else {}), quick)
        levels[method.name] = level_of(job)
        baseline = Cell(BASELINES, place.name, "", seed, alone(job, place.name), place.data)
        key = _same_training(baseline)
        baseline = cells.setdefault(key, baseline)  # once for all methods that train as long and in the same way
        trivial = Cell(TRIVIAL, place.name, "", seed, baseline.job, place.data)
        cells.setdefault(f"{TRIVIAL} {place.name} {seed if redraw else ''}", trivial)
        own = Cell(FEDERATED, place.name, method.name, seed, job, place.data, baseline.id)
        cells[f"{place.name}|{method.name}|{seed}"] = own
    # The longest first: as many models as there are sites and one more.
    order = sorted(cells.values(), key=lambda cell: (BASELINES, TRIVIAL, FEDERATED).index(cell.kind))
    names = tuple(place.name for place in settings)
    number = None if target is None else float(target)
    return Plan(name, names, tuple(method.name for method in methods), levels, seeds, number, tuple(order))


def _job(place: Setting, method: Choice, more: Settings, quick: bool) -> Job:
    chosen = place.settings | method.settings | more
    try:
        job = load_job(place.job, [f"{key}={toml_scalar(value)}" for key, value in chosen.items()])
    except UserError as error:
        raise UserError(f"{place.name}, {method.name}: {error}") from None
    if quick:
        rounds = min(job.federation.rounds, QUICK_ROUNDS)
        return job.replace(federation__rounds=rounds, evaluation__every=max(rounds // 2, 1))
    return job


def alone(job: Job, name: str) -> Job:
    """The job of the models it is held against: as long, tuned and augmented the same; nothing is shared, so none of
    the federation's algorithm and no noise.
    """
    flat = job.flat() | {"name": f"{name}, alone and pooled"}
    for table, fresh in (("federation", Federation()), ("privacy", Privacy())):
        for item in fields(fresh):
            if table == "privacy" or item.name not in KEPT:
                flat[f"{table}.{item.name}"] = getattr(fresh, item.name)
    return job_from_flat(flat)


def _same_training(cell: Cell) -> str:
    """Equal for baselines that would train the same models: short rounds or long ones make no difference to them."""
    flat = cell.job.flat()
    length = int(flat.pop("federation.rounds")) * int(flat.pop("train.local_steps"))
    flat["evaluation.every"] = 0
    return f"{cell.setting} {length} {sorted(flat.items())}"


def level_of(job: Job) -> str:
    """The level of privacy a job promises, in a few words; "" for none."""
    asked = job.privacy
    if asked.dp == "none":
        return ""
    much = f"epsilon {asked.epsilon:g}" if asked.epsilon else f"noise {asked.noise_multiplier:g}"
    return f"{asked.dp}, {much}"


# ---------------------------------------------------------------------- the parts of the file


def _seeds(content: Mapping[str, Any]) -> tuple[int, ...]:
    seeds = content.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
        raise UserError(f"seeds = {seeds!r}: must be a list of whole numbers, for example [0, 1, 2]")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"seeds = {seeds!r}: a seed stands there twice")
    return tuple(seeds)


def _text(content: Mapping[str, Any], key: str, default: str = "") -> str:
    value = content.get(key, default)
    if not isinstance(value, str):
        raise UserError(f"{key} = {value!r}: must be a text in quotes")
    return value


def _settings(content: Mapping[str, Any], path: Path, data: Path | None, name: str) -> Iterator[Setting]:
    """Data sets × partitions."""
    if ("dataset" in content) == ("job" in content):
        raise UserError("name either one job, and its data, or several with [[dataset]]")
    if "dataset" in content and "data" in content:
        raise UserError("data: with [[dataset]], each data set names its own")
    sets = content.get("dataset") or [{k: content[k] for k in ("job", "data") if k in content} | {"name": name}]
    common = _flat(content.get("set", {}), "[set]")
    _known(common, "[set]")
    partitions = _choices(content, "partition") or [Choice("", {})]
    for one, dealt in itertools.product(_tables(sets, "dataset"), partitions):
        own = dict(one)
        title, job = _text(own, "name"), path.parent / _text(own, "job")
        if not title or not own.get("job"):
            raise UserError("[[dataset]]: each needs a name, a job and a data folder")
        where = (data or path.parent) / _text(own, "data")
        if data is None and "data" not in own:
            raise UserError(f'{title}: name its images: data = "FOLDER" in the file, or --data FOLDER')
        if not where.is_dir():
            raise UserError(f"{title}: {where}: no such folder of images")
        mine = _flat({k: v for k, v in own.items() if k not in ("name", "job", "data")}, "[[dataset]]")
        _known(mine, f"[[dataset]] {title}")
        label = f"{title}, {dealt.name}" if dealt.name else title
        yield Setting(label, job, where, _apart([common | mine, dealt.settings], "[[dataset]] and [[partition]]"))


def _methods(content: Mapping[str, Any]) -> Iterator[Choice]:
    """Variants × the grid × levels of privacy."""
    grid = _flat(content.get("grid", {}), "[grid]", lists=True)
    _known(grid, "[grid]")
    for key, values in grid.items():
        if not isinstance(values, list) or not values or len({str(value) for value in values}) < len(values):
            raise UserError(f"[grid] {key} = {values!r}: must be a list of values, each once")
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    varied = [key for key, values in grid.items() if len(values) > 1]
    none = [Choice("", {})]
    seen: set[str] = set()
    for variant, point, level in itertools.product(
        _choices(content, "variant") or none, points, _choices(content, "privacy") or none
    ):
        words = [variant.name, ", ".join(_words(key, point[key]) for key in varied or grid), level.name]
        name = ", ".join(word for word in words if word) or "as the job says"
        if name in seen:
            raise UserError(f"two methods would be called {name!r}; give variants and levels names that differ")
        seen.add(name)
        yield Choice(name, _apart([variant.settings, point, level.settings], "[grid], [[variant]] and [[privacy]]"))


def _words(key: str, value: Scalar) -> str:
    """A value of the grid as part of a method's name; the strategy needs no word before it."""
    short = key.rpartition(".")[2].replace("_", " ")
    shown = {True: "on", False: "off"}[value] if isinstance(value, bool) else value
    return str(shown) if key == "federation.strategy" else f"{short} {shown}"


def _choices(content: Mapping[str, Any], key: str) -> list[Choice]:
    found = []
    for table in _tables(content.get(key, []), key):
        name = _text(table, "name")
        if not name:
            raise UserError(f"[[{key}]]: each needs a name")
        settings = _flat({k: v for k, v in table.items() if k != "name"}, f"[[{key}]] {name}")
        _known(settings, f"[[{key}]] {name}")
        found.append(Choice(name, settings))
    if len({choice.name for choice in found}) < len(found):
        raise UserError(f"[[{key}]]: two have the same name")
    return found


def _tables(value: object, key: str) -> Sequence[Mapping[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise UserError(f"{key}: write it as [[{key}]], a table for each")
    return value


def _flat(table: object, where: str, lists: bool = False) -> dict[str, Any]:
    if not isinstance(table, Mapping):
        raise UserError(f"{where}: must be a table of settings")
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{inner}": item for inner, item in _flat(value, where, lists).items()}
        elif isinstance(value, list) and not lists:
            raise UserError(f"{where} {key}: one value, not a list; lists stand in [grid]")
        else:
            flat[key] = value
    return flat


def _known(keys: Iterable[str], where: str) -> None:
    for key in keys:
        if key in OWN:
            raise UserError(f"{where} {key}: is set by {OWN[key]}")
        if key not in knobs():
            raise UserError(
                f"{where} unknown key {key!r}{nearest(key, knobs())}; `consilium job --keys` lists them all"
            )


def _apart(parts: Sequence[Settings], where: str) -> Settings:
    """The sets of settings put together; none may set what another sets."""
    whole: Settings = {}
    for part in parts:
        if twice := whole.keys() & part.keys():
            raise UserError(f"{sorted(twice)[0]} stands in more than one of {where}")
        whole |= part
    return whole

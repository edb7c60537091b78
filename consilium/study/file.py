"""STUDY.toml, as a person writes it: which jobs are run on which data with which settings and seeds.

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

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.config import Scalar, knobs, nearest
from shared.errors import UserError

KEYS = (
    "name", "job", "data", "seeds", "redraw", "target", "set", "grid", "variant", "partition", "privacy", "dataset"
)  # fmt: skip
BASELINE_NAMES = ("trivial", "pooled", "alone")  # what methods stand beside, by these names
OWN = {"seed": "seeds = [0, 1, 2] at the top of the file", "name": "the name of the study or of the data set"}

Settings = dict[str, Scalar]


@dataclass(frozen=True)
class Choice:
    """A named set of settings: a value on one axis of the study."""

    name: str
    settings: Settings


@dataclass(frozen=True)
class Method:
    """A named combination of variant, grid and level of privacy; ``plain`` are its settings without the level's."""

    name: str
    settings: Settings
    plain: Settings


@dataclass(frozen=True)
class Setting:
    """Where methods are compared: a data set, dealt out in one way. ``only``: it is the only one, without a name."""

    name: str
    job: Path
    data: Path
    settings: Settings
    only: bool = False


def check_keys(content: Mapping[str, Any]) -> None:
    """Raises UserError for a key that a study has not."""
    for key in content:
        if key not in KEYS:
            raise UserError(f"unknown key {key!r}{nearest(key, KEYS)}; a study has {', '.join(KEYS)}")


def seeds_of(content: Mapping[str, Any]) -> tuple[int, ...]:
    """The study's seeds; one run of each cell for each.

    Raises:
        UserError: they are not whole numbers, or one stands there twice.
    """
    seeds = content.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
        raise UserError(f"seeds = {seeds!r}: must be a list of whole numbers, for example [0, 1, 2]")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"seeds = {seeds!r}: a seed stands there twice")
    return tuple(seeds)


def text_of(content: Mapping[str, Any], key: str, default: str = "") -> str:
    """The text at a key.

    Raises:
        UserError: it is none.
    """
    value = content.get(key, default)
    if not isinstance(value, str):
        raise UserError(f"{key} = {value!r}: must be a text in quotes")
    return value


def settings_of(content: Mapping[str, Any], path: Path, data: Path | None, name: str) -> Iterator[Setting]:
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
        title, job = text_of(own, "name"), path.parent / text_of(own, "job")
        at = f"{title}: " if "dataset" in content else ""  # the study's own name helps nobody to find the line
        if not title or not own.get("job"):
            raise UserError("[[dataset]]: each needs a name, a job and a data folder")
        where = (data or path.parent) / text_of(own, "data")
        if data is None and "data" not in own:
            raise UserError(f'{at}name its images: data = "FOLDER" in the file, or --data FOLDER')
        if not where.is_dir():
            raise UserError(f"{at}{where}: no such folder of images")
        mine = _flat({k: v for k, v in own.items() if k not in ("name", "job", "data")}, "[[dataset]]")
        _known(mine, f"[[dataset]] {title}")
        label, only = f"{title}, {dealt.name}" if dealt.name else title, "dataset" not in content and not dealt.name
        own_settings = _apart([common | mine, dealt.settings], "[[dataset]] and [[partition]]")
        yield Setting(label, job, where, own_settings, only)


def methods_of(content: Mapping[str, Any]) -> Iterator[Method]:
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
        words = [variant.name, ", ".join(value_words(key, point[key]) for key in varied or grid), level.name]
        name = ", ".join(word for word in words if word) or "as the job says"
        if name.partition(" (")[0] in BASELINE_NAMES:
            raise UserError(f"a method would be called {name!r}, as are baselines; give it another name")
        if name in seen:
            raise UserError(f"two methods would be called {name!r}; give variants and levels names that differ")
        seen.add(name)
        whole = _apart([variant.settings, point, level.settings], "[grid], [[variant]] and [[privacy]]")
        yield Method(name, whole, variant.settings | point)


def _choices(content: Mapping[str, Any], key: str) -> list[Choice]:
    found = []
    for table in _tables(content.get(key, []), key):
        name = text_of(table, "name")
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


def value_words(key: str, value: Scalar) -> str:
    """A value of the grid as part of a method's name; the strategy needs no word before it."""
    short = key.rpartition(".")[2].replace("_", " ")
    shown = {True: "on", False: "off"}[value] if isinstance(value, bool) else value
    return str(shown) if key == "federation.strategy" else f"{short} {shown}"

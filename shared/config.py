"""The job: everything that decides the result of a run, read from one flat TOML file and validated here.

A job is a few small tables of scalars (Flower's run config takes only str, int, float and bool). The defaults stand in
``shared.settings`` (those of [federation] in ``shared.settings_federation``) and, for ``flwr run``, once more in
``[tool.flwr.app.config]`` of pyproject.toml; a test holds the two together.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from shared.errors import UserError
from shared.knobs import Scalar, knob
from shared.pairs import check_pairs
from shared.rules import check_rules, site_rule
from shared.settings import Augment, Data, Evaluation, Model, Privacy, Train
from shared.settings_federation import Federation
from shared.strategies import AGGREGATORS, CODEC_NAMES, STRATEGIES, resolve, set_over
from shared.subgroups import parse_subgroups
from shared.tasks import TASKS

__all__ = [
    "Job",
    "Scalar",
    "job_from_flat",
    "knobs",
    "load_job",
    "nearest",
    "parse_override",
    "read_toml",
    "toml_scalar",
]


@dataclass(frozen=True)
class Job:
    """One training job. ``Job()`` is the default job; see ``load_job`` for files."""

    name: str = knob("job", "shown in reports")
    task: str = knob("classification", "what is learnt", choices=tuple(TASKS))
    seed: int = knob(0, "seed of initial weights, sampling and augmentation", low=0, high=2**31 - 1)
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    model: Model = field(default_factory=Model)
    train: Train = field(default_factory=Train)
    federation: Federation = field(default_factory=Federation)
    evaluation: Evaluation = field(default_factory=Evaluation)
    privacy: Privacy = field(default_factory=Privacy)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the model's outputs."""
        return _words(self.data.classes)

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the images of a case; none where a case is one image."""
        return _words(self.data.modalities)

    @property
    def tabular(self) -> tuple[str, ...]:
        """Names of the numbers beside the images of a case."""
        return _words(self.data.tabular)

    @property
    def labels(self) -> tuple[str, ...]:
        """Classes of the whole image that are learnt beside its mask."""
        return _words(self.data.labels)

    @property
    def best_metric(self) -> str:
        """The validation metric that picks the best round."""
        return self.evaluation.best_metric or next(iter(TASKS[self.task].metrics))

    def local_steps(self, images: int) -> int:
        """Gradient steps of a round at a site that tells of ``images`` training images."""
        if not self.train.local_epochs:
            return self.train.local_steps
        return max(1, math.ceil(self.train.local_epochs * images / self.train.batch_size - 1e-9))

    def flat(self) -> dict[str, Scalar]:
        """All settings as ``{"table.key": value}``, in the order of this file."""
        flat: dict[str, Scalar] = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if dataclasses.is_dataclass(value):
                flat |= {f"{item.name}.{f.name}": getattr(value, f.name) for f in dataclasses.fields(value)}
            else:
                flat[item.name] = value
        return flat

    @cached_property
    def sha256(self) -> str:
        """Hash of the resolved job: equal for two files that ask for the same work."""
        return hashlib.sha256(json.dumps(self.flat(), sort_keys=True).encode()).hexdigest()

    def toml(self) -> str:
        """The resolved job as TOML text that ``load_job`` reads back."""
        lines: list[str] = []
        table = ""
        for key, value in self.flat().items():
            head, _, name = key.rpartition(".")
            if head != table:
                lines += ["", f"[{head}]"]
                table = head
            lines.append(f"{name} = {toml_scalar(value)}")
        return "\n".join(lines) + "\n"

    def replace(self, **changes: Scalar) -> Job:
        """A validated copy; keys are written with two underscores: ``train__local_steps=3``."""
        over = {key.replace("__", "."): value for key, value in changes.items()}
        return job_from_flat(set_over(self.flat(), over, knobs()))


def _words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def toml_scalar(value: Scalar) -> str:
    """A scalar as TOML writes it: as JSON, but characters stand as they are and DEL is escaped."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


_TABLES = {
    "data": Data,
    "augment": Augment,
    "model": Model,
    "train": Train,
    "federation": Federation,
    "evaluation": Evaluation,
    "privacy": Privacy,
}
STRATEGY = "federation.strategy"
_OPEN: dict[str, Iterable[str]] = {
    STRATEGY: STRATEGIES,
    "federation.aggregator": AGGREGATORS,
    "federation.codec": CODEC_NAMES,
}  # registries that a program may add to
RUN_PREFIX = "run."  # where a run's files lie; set by the engine, no part of the job or its hash


def knobs() -> dict[str, dataclasses.Field[Any]]:
    """Every setting by its flat key, with its documentation in ``.metadata``."""
    found: dict[str, dataclasses.Field[Any]] = {}
    for item in dataclasses.fields(Job):
        if item.name in _TABLES:
            found |= {f"{item.name}.{f.name}": f for f in dataclasses.fields(_TABLES[item.name])}
        else:
            found[item.name] = item
    return found


def nearest(word: str, known: Iterable[str]) -> str:
    """`` (did you mean X?)`` or nothing."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""


def _checked(key: str, value: Any, item: dataclasses.Field[Any]) -> Scalar:
    """``value`` as the setting's own type, or a UserError that names key, value and what is allowed."""
    kind = type(item.default)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        names = {str: "a text in quotes", int: "a whole number", float: "a number", bool: "true or false"}
        raise UserError(f"{key} = {value!r}: must be {names[kind]}, for example {json.dumps(item.default)}")
    meta = item.metadata
    choices = tuple(_OPEN.get(key, meta["choices"]))
    if choices and value not in choices:
        raise UserError(f"{key} = {value!r}: must be one of {', '.join(choices)}{nearest(str(value), choices)}")
    low, high = meta["low"], meta["high"]
    if kind is float and not math.isfinite(cast(float, value)):
        raise UserError(f"{key} = {value!r}: must be a finite number")
    if kind in (int, float) and not ((low is None or value >= low) and (high is None or value <= high)):
        allowed = f"at least {low:g}" if high is None else f"from {low:g} to {high:g}"
        raise UserError(f"{key} = {value!r}: must be {allowed}")
    return cast(Scalar, value)


def job_from_flat(flat: Mapping[str, Any]) -> Job:
    """Build and validate a job from ``{"table.key": value}``; ``run.*`` keys are passed over.

    Raises:
        UserError: an unknown key, a wrong type, or a value that is not allowed.
    """
    known = knobs()
    name = flat.get(STRATEGY)
    if isinstance(name, str) and name in STRATEGIES:
        flat = resolve(name, flat, {key: cast(Scalar, item.default) for key, item in known.items()})
    tables: dict[str, dict[str, Scalar]] = {name: {} for name in _TABLES}
    top: dict[str, Scalar] = {}
    for key, value in flat.items():
        if key.startswith(RUN_PREFIX):
            continue
        if key not in known:
            raise UserError(f"unknown key {key!r}{nearest(key, known)}; `consilium job --keys` lists them all")
        head, _, name = key.rpartition(".")
        (tables[head] if head else top)[name] = _checked(key, value, known[key])
    job = Job(**top, **{name: _TABLES[name](**values) for name, values in tables.items()})  # type: ignore[arg-type]
    _check_together(job)
    return job


def _check_together(job: Job) -> None:
    """Rules that concern more than one setting."""
    facts = TASKS[job.task]
    least = 1 if job.data.multilabel else facts.classes
    if len(job.classes) < least:
        raise UserError(f"data.classes = {job.data.classes!r}: name at least {least}, comma-separated")
    for key, names in {
        "classes": job.classes,
        "labels": job.labels,
        "modalities": job.modalities,
        "tabular": job.tabular,
    }.items():
        if len(set(names)) < len(names):
            raise UserError(f"data.{key} = {getattr(job.data, key)!r}: a name stands there twice")
    if job.best_metric not in facts.metrics:
        raise UserError(
            f"evaluation.best_metric = {job.best_metric!r}: {job.task} has {', '.join(facts.metrics)}"
            f"{nearest(job.best_metric, facts.metrics)}"
        )
    if job.data.format not in (*facts.formats, "cases"):
        raise UserError(f"data.format = {job.data.format!r}: {job.task} reads {', '.join(facts.formats)}")
    if parse_subgroups(job.evaluation.subgroups) and job.task == "generation":
        raise UserError("evaluation.subgroups: invented images have no patients; leave it out")
    if job.data.val_fraction + job.data.test_fraction >= 1:
        raise UserError("data.val_fraction + data.test_fraction leave nothing to train on; their sum must be below 1")
    _check_read(job)
    check_pairs(job)
    data = job.data
    check_rules(data.harmonise, data.landmarks, data.channels, data.spacing, job.task, bool(job.modalities))
    _check_privacy(job)
    if job.privacy.secure_aggregation:
        _check_secure(job)


def _check_read(job: Job) -> None:
    """Nobody sets what the job's task would pass over."""
    flat = job.flat()
    for key, item in knobs().items():
        tasks = item.metadata["tasks"]
        if tasks and job.task not in tasks and flat[key] != item.default:
            only = ", ".join(tasks)
            raise UserError(f"{key} = {flat[key]!r}: {job.task} does not read it, only {only}; leave it out")


def _check_privacy(job: Job) -> None:
    """What differential privacy asks of the rest of the job, so that nobody believes to have it who has not."""
    asked, dp = job.privacy, job.privacy.dp
    if dp == "none":
        for key in ("noise_multiplier", "epsilon"):
            if getattr(asked, key):
                raise UserError(
                    f'privacy.{key} = {getattr(asked, key):g}, but privacy.dp = "none" adds no noise; '
                    'set privacy.dp = "local" (or distributed, central), or take it out'
                )
        return
    if not (asked.noise_multiplier or asked.epsilon):
        raise UserError(f'privacy.dp = "{dp}": set privacy.epsilon or privacy.noise_multiplier, else there is no noise')
    needed: dict[str, Scalar] = {"train.class_weights": "none"}  # they would be computed from exact counts
    if dp in ("local", "distributed"):
        # Norms and noise are not proven right in less; what is computed at once is train.batch_size already.
        needed |= {"train.precision": "float32", "train.accumulate": 1, "train.compile": False}
        needed["data.max_per_class"] = 0  # another image would take the place of one that is taken away
        if rule := site_rule(job.data.harmonise):
            raise UserError(
                f'data.harmonise = "{rule}": measured on all images of a site, it lets each change all others, and '
                f'privacy.dp = "{dp}" counts on one changing itself alone; take a rule that looks at single images'
            )
    if dp == "distributed":  # the noise of all sites adds up in one noised sum of clipped gradients
        needed |= {
            "privacy.secure_aggregation": True,
            "train.optimizer": "sgd",
            "train.local_steps": 1,
            "federation.weighting": "equal",
        }
    flat = job.flat()
    for key, value in needed.items():
        if flat[key] != value:
            raise UserError(
                f'{key} = {toml_scalar(flat[key])}: privacy.dp = "{dp}" needs {toml_scalar(value)}; set it so'
            )


def _check_secure(job: Job) -> None:
    """What secure aggregation needs; ``shared.pairs`` has what does not go with it."""
    if job.federation.max_update_norm <= 0:
        raise UserError(
            "privacy.secure_aggregation = true: set federation.max_update_norm above 0, "
            "the L2 norm to which each site clips its change"
        )


def _flatten(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tables.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as nested dicts; every failure is one line that names the file."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # as Windows' editors write it
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; name the TOML file in it") from None
    except PermissionError:
        raise UserError(f"{path}: no permission to read it") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None


def parse_override(text: str) -> tuple[str, Any]:
    """``key=value`` from the command line; the value is TOML, or a plain word taken as text."""
    key, equals, raw = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {text}: write it as key=value, for example --set train.local_steps=10")
    try:
        return key.strip(), tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), raw.strip()


def load_job(path: Path | str, overrides: Iterable[str] = ()) -> Job:
    """Read a job file; ``overrides`` are ``key=value`` texts that win over the file.

    Raises:
        UserError: one line that names the file or key, what was given and what is allowed.
    """
    path = Path(path)
    flat = _flatten(read_toml(path))
    try:
        job_from_flat(flat)  # so that a fault of the file names the file
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    over = dict(parse_override(text) for text in overrides)
    return job_from_flat({"name": path.stem} | set_over(flat, over, knobs()))

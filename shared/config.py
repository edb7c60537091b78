"""The job: everything that decides the result of a run, read from one flat TOML file and validated here.

A job is five small tables of scalars (Flower's run config takes only str, int, float and bool). The defaults stand
here and, for ``flwr run``, once more in ``[tool.flwr.app.config]`` of pyproject.toml; a test holds the two together.
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
from pathlib import Path
from typing import Any, cast

from shared.errors import UserError
from shared.tasks import METRICS

Scalar = str | int | float | bool


def knob(
    default: Scalar,
    help: str,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    high: float | None = None,
) -> Any:
    """A setting of the job: its default, what it means, and which values are allowed."""
    return field(default=default, metadata={"help": help, "choices": choices, "low": low, "high": high})


@dataclass(frozen=True)
class Data:
    format: str = knob(
        "auto",
        "how a folder of images without a site.toml is read",
        choices=("auto", "csv", "folder", "npz", "coco-crops"),
    )
    classes: str = knob("normal,abnormal", "class names, comma-separated, in the order of the model's outputs")
    multilabel: bool = knob(False, "several labels per image, written a|b in the CSV")
    channels: int = knob(1, "1 (grey) or 3 (colour)", low=1, high=3)
    size: int = knob(64, "images are fitted into size x size pixels, aspect kept", low=8, high=4096)
    frame: str = knob("middle", "which frame of a multi-frame file is used", choices=("first", "middle"))
    normalise: str = knob(
        "fixed",
        "fixed: one shift and scale for all; image: each to mean 0, sd 1; imagenet: as published weights want",
        choices=("fixed", "image", "imagenet"),
    )
    max_per_class: int = knob(
        0, "at most so many images per class and site for training, and for validation; 0 is no limit", low=0
    )
    val_fraction: float = knob(0.1, "share of patients for validation, where no split is given", low=0.0, high=0.9)
    test_fraction: float = knob(0.2, "share of patients for testing, where no split is given", low=0.0, high=0.9)
    partition: str = knob(
        "site",
        "simulation: keep the real sites, or deal all training images out to invented ones",
        choices=("site", "iid", "dirichlet", "size"),
    )
    partition_sites: int = knob(4, "number of invented sites", low=1, high=100_000)
    partition_alpha: float = knob(0.5, "Dirichlet concentration; smaller is more unequal", low=0.001, high=1e6)
    partition_seed: int = knob(0, "which draw of the partition", low=0)


@dataclass(frozen=True)
class Augment:
    flip: str = knob("none", "random mirroring", choices=("none", "horizontal", "vertical", "both"))
    rotate: float = knob(0.0, "random rotation up to so many degrees", low=0.0, high=180.0)
    shift: float = knob(0.0, "random shift up to this share of the image", low=0.0, high=0.5)
    zoom: float = knob(0.0, "random scaling by up to this share", low=0.0, high=0.9)
    intensity: float = knob(0.0, "random brightness and contrast by up to this share", low=0.0, high=0.9)
    colour: float = knob(
        0.0, "random saturation by up to this share and hue by a fifth of it (colour images)", low=0.0, high=0.9
    )


@dataclass(frozen=True)
class Model:
    name: str = knob("cnn", "cnn, resnet18, resnet50, densenet121 or vgg16")
    weights: str = knob("", "start from a local file (.safetensors, .pt) or a torchvision weight name such as DEFAULT")
    freeze: str = knob("none", "backbone: train and exchange only the head", choices=("none", "backbone"))
    width: int = knob(24, "channels of the first stage of cnn", low=4, high=512)


@dataclass(frozen=True)
class Train:
    local_steps: int = knob(1, "gradient steps at each site in each round", low=1, high=1_000_000)
    batch_size: int = knob(32, "images per gradient step", low=1, high=65_536)
    optimizer: str = knob("adamw", "local optimiser", choices=("adamw", "sgd"))
    learning_rate: float = knob(0.004, "peak learning rate", low=0.0, high=100.0)
    weight_decay: float = knob(0.001, "decoupled (adamw) or L2 (sgd) weight decay", low=0.0, high=10.0)
    momentum: float = knob(0.9, "Nesterov momentum of sgd", low=0.0, high=0.999)
    schedule: str = knob("cosine", "learning rate over the whole run", choices=("cosine", "constant"))
    warmup: float = knob(0.03, "share of the run in which the learning rate rises to its peak", low=0.0, high=0.9)
    keep_optimizer: bool = knob(True, "the site keeps its optimiser's moments from round to round")
    class_weights: str = knob(
        "balanced", "weigh the loss by inverse class frequency over all sites", choices=("none", "balanced")
    )
    device: str = knob("auto", "auto, cpu, cuda or cuda:N")
    precision: str = knob("float32", "bfloat16: autocast on devices that gain by it", choices=("float32", "bfloat16"))


@dataclass(frozen=True)
class Federation:
    rounds: int = knob(300, "number of rounds", low=1, high=1_000_000)
    min_sites: int = knob(1, "quorum: fewer admitted replies than this end the run", low=1, high=100_000)
    fraction: float = knob(1.0, "share of the sites that train in a round", low=0.0001, high=1.0)
    aggregator: str = knob("mean", "how replies become one model", choices=("mean",))
    weighting: str = knob(
        "examples", "a site counts by its training images, or each the same", choices=("examples", "equal")
    )
    max_examples: int = knob(10_000_000, "a site that claims more training images than this is dropped", low=1)
    max_update_norm: float = knob(0.0, "drop a reply whose change has a larger L2 norm; 0 is no limit", low=0.0)
    round_timeout: float = knob(
        3600.0, "seconds after which a round goes on without the sites still missing", low=1.0, high=1e7
    )


@dataclass(frozen=True)
class Evaluation:
    every: int = knob(
        10, "validate the global model at the sites every so many rounds, and after the last", low=1, high=1_000_000
    )
    best_metric: str = knob("auroc", "the validation metric that picks the best round")
    batch_size: int = knob(128, "images per forward pass", low=1, high=65_536)


@dataclass(frozen=True)
class Job:
    """One training job. ``Job()`` is the default job; see ``load_job`` for files."""

    name: str = knob("job", "shown in reports")
    task: str = knob("classification", "what is learnt", choices=("classification",))
    seed: int = knob(0, "seed of initial weights, sampling and augmentation", low=0, high=2**31 - 1)
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    model: Model = field(default_factory=Model)
    train: Train = field(default_factory=Train)
    federation: Federation = field(default_factory=Federation)
    evaluation: Evaluation = field(default_factory=Evaluation)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the model's outputs."""
        return tuple(part.strip() for part in self.data.classes.split(",") if part.strip())

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

    @property
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
        return job_from_flat(self.flat() | {key.replace("__", "."): value for key, value in changes.items()})


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
}
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
    if meta["choices"] and value not in meta["choices"]:
        hint = nearest(str(value), meta["choices"])
        raise UserError(f"{key} = {value!r}: must be one of {', '.join(meta['choices'])}{hint}")
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
    if len(job.classes) < (1 if job.data.multilabel else 2):
        raise UserError(f"data.classes = {job.data.classes!r}: name at least two classes, comma-separated")
    if len(set(job.classes)) < len(job.classes):
        raise UserError(f"data.classes = {job.data.classes!r}: a class is named twice")
    metrics = METRICS[job.task]
    if job.evaluation.best_metric not in metrics:
        given = job.evaluation.best_metric
        raise UserError(
            f"evaluation.best_metric = {given!r}: must be one of {', '.join(metrics)}{nearest(given, metrics)}"
        )
    if job.data.channels == 2:
        raise UserError("data.channels = 2: must be 1 (grey) or 3 (colour)")
    if job.data.val_fraction + job.data.test_fraction >= 1:
        raise UserError("data.val_fraction + data.test_fraction leave nothing to train on; their sum must be below 1")
    if job.data.multilabel and job.data.partition == "dirichlet":
        raise UserError(
            "data.partition = 'dirichlet': needs one label per image; use 'iid' or 'size' with data.multilabel"
        )


def _flatten(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tables.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as nested dicts; every failure is one line that names the file."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
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
    return job_from_flat({"name": path.stem} | flat | dict(parse_override(text) for text in overrides))

"""Every setting of a job, table by table: its default, what it means, which values are allowed."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, cast

from shared.rules import PERCENTS, RULES
from shared.strategies import AGGREGATORS, CODEC_NAMES, CORRECTIONS, LOCAL, SERVER_OPTIMIZERS, STRATEGIES
from shared.tasks import TASKS

# How a folder of images may be laid out; each task reads some of them. "cases" is what a partition writes.
FORMATS = (*dict.fromkeys(form for facts in TASKS.values() for form in facts.formats), "cases")

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
    """What a case is, where its labels stand, and how its image is made ready."""

    format: str = knob(
        "auto",
        "how a folder of images without a site.toml is read",
        choices=FORMATS,
    )
    classes: str = knob("normal,abnormal", "class names, comma-separated, in the order of the model's outputs")
    multilabel: bool = knob(False, "several labels per image, written a|b in the CSV")
    channels: int = knob(1, "1 (grey) or 3 (colour); of signals, the number of leads", low=1, high=64)
    size: int = knob(
        64,
        "images are fitted into size x size pixels, aspect kept; segmentation: patches of that side",
        low=8,
        high=4096,
    )
    depth: int = knob(32, "segmentation in 3D: slices of a patch", low=4, high=1024)
    spacing: float = knob(
        0.0,
        "resample to so many mm per pixel or voxel; of pictures the middle size x size is taken, if they are no "
        "patches; 0 leaves images as they are",
        low=0.0,
        high=100.0,
    )
    window: str = knob("", "grey values from black to white as 'low high' (CT: '-160 240'); '' is the file's own range")
    masks: str = knob(
        "classes",
        "classes: the mask's value is the class, 0 the background; instances: it numbers objects of one class",
        choices=("classes", "instances"),
    )
    labels: str = knob("", "segmentation: classes of the whole image, learnt beside the mask, comma-separated")
    frames: int = knob(
        0, "sequences: at most so many frames or samples, evenly picked; 0 takes all", low=0, high=100_000
    )
    normal: str = knob("", "reconstruction: the class trained on, all others are anomalies; '' is the first class")
    modalities: str = knob("", "several images per case: their names, comma-separated, columns path:NAME of the CSV")
    tabular: str = knob("", "numbers beside the image: column names of the CSV, comma-separated")
    missing: str = knob(
        "refuse",
        "a case without one of its images or numbers: refuse the site, or fill with zeros and flag it to the network",
        choices=("refuse", "zero"),
    )
    frame: str = knob("middle", "which frame of a multi-frame file is used", choices=("first", "middle"))
    normalise: str = knob(
        "fixed",
        "fixed: one shift and scale for all; image: each to mean 0, sd 1; imagenet: as published weights want",
        choices=("fixed", "image", "imagenet"),
    )
    harmonise: str = knob(
        "none",
        "rules each site applies to its own images, alone and in order, comma-separated: none, or some of "
        f"{', '.join(RULES)}; see docs/harmonisation.md",
    )
    landmarks: str = knob(
        "", f"nyul: the grey values, 0 to 1, that the percentiles {' '.join(map(str, PERCENTS))} of an image become"
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
    """What is changed at random in the images that are trained on."""

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
    """The network."""

    name: str = knob("cnn", "the network; `consilium models` lists them by task")
    weights: str = knob("", "start from a local file (.safetensors, .pt) or a torchvision weight name such as DEFAULT")
    freeze: str = knob("none", "backbone: train and exchange only the head", choices=("none", "backbone"))
    width: int = knob(24, "channels of the first stage", low=4, high=512)
    depth: int = knob(4, "stages of a U-Net", low=2, high=7)
    norm: str = knob("group", "normalisation layers of a U-Net", choices=("group", "instance"))
    hidden: int = knob(32, "units of a recurrent layer", low=1, high=4096)
    latent: int = knob(
        64, "numbers a generator starts from, or an autoencoder squeezes an image into", low=1, high=4096
    )
    conditional: bool = knob(False, "a generator that is told the class")
    fusion: str = knob(
        "early", "several images per case: stacked as channels, or an encoder each", choices=("early", "late")
    )


@dataclass(frozen=True)
class Train:
    """Gradient steps at a site."""

    local_steps: int = knob(1, "gradient steps at each site in each round", low=1, high=1_000_000)
    local_epochs: float = knob(
        0.0, "instead of local_steps: passes over a site's own images in each round; 0 is off", low=0.0, high=10_000.0
    )
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
    precision: str = knob(
        "float32", "bfloat16: autocast where the device computes in it, else float32", choices=("float32", "bfloat16")
    )
    accumulate: int = knob(
        1,
        "a batch is computed in so many parts whose gradients are added up, where it is too large",
        low=1,
        high=65_536,
    )
    compile: bool = knob(False, "compile the network with torch.compile: a slow first step, faster ones after it")
    reproducible: bool = knob(True, "on GPUs: the same bits every time, where torch can; false is faster")


@dataclass(frozen=True)
class Federation:
    """Rounds, and how many models become one."""

    rounds: int = knob(300, "number of rounds", low=1, high=1_000_000)
    min_sites: int = knob(1, "quorum: fewer admitted replies than this end the run", low=1, high=100_000)
    fraction: float = knob(1.0, "share of the sites that train in a round", low=0.0001, high=1.0)
    strategy: str = knob(
        "fedavg", "a name for a choice of the settings below; what the job sets itself wins", choices=tuple(STRATEGIES)
    )
    aggregator: str = knob(
        "mean", "how replies become one model; `consilium strategies` explains each", choices=tuple(AGGREGATORS)
    )
    byzantine: int = knob(
        1, "robust aggregators: so many sites may send anything at all; fewer replies than this asks for end the run",
        low=0, high=10_000,
    )  # fmt: skip
    trim: float = knob(0.2, "trimmed_mean: share of the replies cut off at either end", low=0.01, high=0.49)
    selected: int = knob(
        0, "multikrum: replies that are averaged; 0 is their number without byzantine and two more", low=0
    )
    clip_norm: float = knob(0.0, "clipped_mean: largest L2 norm of a change; 0 takes the round's median norm", low=0.0)
    memory_mb: int = knob(
        4096, "robust aggregators: MB of replies held in memory, the rest lies in temporary files", low=0, high=10**9
    )
    server_optimizer: str = knob(
        "none", "what steps on the averaged change of the model", choices=tuple(SERVER_OPTIMIZERS)
    )
    server_learning_rate: float = knob(
        0.0, "of the server's optimiser; 0: momentum 0.1, adam and yogi 0.001, adagrad 0.01", low=0.0, high=100.0
    )
    server_schedule: str = knob(
        "constant", "the server's learning rate over the whole run", choices=("constant", "cosine")
    )
    server_momentum: float = knob(0.9, "momentum; first moment of adam and yogi", low=0.0, high=0.999)
    server_beta2: float = knob(0.99, "second moment of adam and yogi", low=0.0, high=0.9999)
    server_tau: float = knob(
        0.001,
        "adam, yogi, adagrad: added to the root of the second moment; more is less adaptive",
        low=1e-9,
        high=1.0,
    )
    weighting: str = knob(
        "examples",
        "a site counts by its training images, each the same, or by images times its loss to the power of fairness",
        choices=("examples", "equal", "loss"),
    )
    fairness: float = knob(
        1.0, 'weighting = "loss": more than 0 favours sites that do badly (q of q-FFL)', low=0.0, high=10.0
    )
    order: str = knob(
        "parallel",
        "parallel: sites train side by side and are averaged; cyclic: the model goes from site to site; "
        "buffered: as parallel, but a round ends with federation.buffer replies, and late ones count later",
        choices=("parallel", "cyclic", "buffered"),
    )
    buffer: int = knob(2, "buffered: replies with which a round ends", low=1, high=100_000)
    staleness: float = knob(
        0.5, "buffered: a change that is s rounds behind counts by 1 / (1 + s) to this power", low=0.0, high=10.0
    )
    sampling: str = knob(
        "balanced",
        "with fraction below 1: every site equally often over time, or each round drawn anew",
        choices=("balanced", "random"),
    )
    codec: str = knob(
        "none",
        "how the model's changes travel, both ways: whole, in fewer bits, or only the largest numbers of them",
        choices=tuple(CODEC_NAMES),
    )
    codec_keep: float = knob(0.1, "topk: share of the numbers that travel in a round", low=1 / 256, high=1.0)
    correction: str = knob(
        "none",
        "what a site's training gets against drifting apart; `consilium strategies` explains each",
        choices=tuple(CORRECTIONS),
    )
    proximal_mu: float = knob(0.01, "proximal: mu, the strength of the pull", low=0.0, high=1e4)
    feddyn_alpha: float = knob(0.1, "feddyn: alpha, the strength of the pull", low=1e-6, high=1e4)
    align_weight: float = knob(0.1, "adversarial: how much the turned gradient counts", low=0.0, high=1e4)
    local: str = knob(
        "nothing",
        "what stays at the site; `consilium strategies` explains each",
        choices=tuple(LOCAL),
    )
    ditto_lambda: float = knob(0.1, "ditto: lambda, how strongly the common model pulls it", low=0.0, high=1e4)
    finetune_steps: int = knob(
        0, "steps in which each site fits the final model to its own images, for itself", low=0, high=1_000_000
    )
    finetune_rate: float = knob(
        0.3, "learning rate that these steps begin with, as a share of the peak", low=0.0, high=10.0
    )
    max_examples: int = knob(10_000_000, "a site that claims more training images than this is dropped", low=1)
    max_update_norm: float = knob(0.0, "drop a reply whose change has a larger L2 norm; 0 is no limit", low=0.0)
    round_timeout: float = knob(
        3600.0, "seconds after which a round goes on without the sites still missing", low=1.0, high=1e7
    )
    start_timeout: float = knob(
        60.0, "seconds for which the first round waits for sites that are not connected yet", low=0.0, high=1e6
    )


@dataclass(frozen=True)
class Evaluation:
    """What is measured, and when."""

    every: int = knob(
        10, "validate the global model at the sites every so many rounds, and after the last", low=1, high=1_000_000
    )
    best_metric: str = knob("", "the validation metric that picks the best round; '' is the task's first")
    operating_point: str = knob(
        "youden",
        "how the probability from which the answer is yes is chosen on the validation images: largest sensitivity + "
        "specificity; at least operating_value of either; or operating_value itself",
        choices=("youden", "sensitivity", "specificity", "fixed"),
    )
    operating_value: float = knob(
        0.9,
        "the least sensitivity or specificity on validation images, or the fixed probability",
        low=0.0,
        high=1.0,
    )
    subgroups: str = knob(
        "",
        "test figures by group where sites allow it, as 'sex, age=18|65, scanner=Siemens|GE, column=value|value'",
    )
    batch_size: int = knob(128, "images per forward pass", low=1, high=65_536)
    overlap: float = knob(0.25, "segmentation: share by which sliding windows overlap", low=0.0, high=0.9)
    samples: int = knob(500, "generation: invented images per evaluation", low=2, high=100_000)
    reference_rounds: int = knob(
        100, "generation: rounds that train the network in whose features images are compared", low=1, high=1_000_000
    )


@dataclass(frozen=True)
class Privacy:
    """What the job grants the sites."""

    dp: str = knob(
        "none",
        "differential privacy. local: each site clips and noises its own gradients (DP-SGD); distributed: the same, "
        "its noise shared among the sites under secure aggregation; central: the server clips and noises whole sites",
        choices=("none", "local", "distributed", "central"),
    )
    unit: str = knob("image", "who is protected: one image, or all images of a patient", choices=("image", "patient"))
    epsilon: float = knob(
        0.0, "epsilon of all planned rounds together; picks the noise, if that is 0", low=0.0, high=1e6
    )
    delta: float = knob(1e-5, "delta, well below one over the number of patients of a site", low=1e-12, high=0.1)
    noise_multiplier: float = knob(0.0, "sd of the noise, in clipping norms; 0 picks it by epsilon", low=0.0, high=1e6)
    clipping_norm: float = knob(1.0, "largest L2 norm of what one unit adds to a gradient", low=1e-6, high=1e6)
    sampling_rate: float = knob(
        0.1, "chance of each unit to be in a gradient step; train.batch_size is then what is computed at once",
        low=1e-6, high=1.0,
    )  # fmt: skip
    accountant: str = knob("prv", "how epsilon is counted", choices=("prv", "rdp"))
    gradients: str = knob(
        "auto", "how gradients of single units are had: one by one, or by Opacus' hooks where these are right",
        choices=("auto", "single", "hooks"),
    )  # fmt: skip
    batch_norm: str = knob(
        "refuse", "BatchNorm mixes units: refuse such a model, or replace it by GroupNorm", choices=("refuse", "group")
    )
    secure_aggregation: bool = knob(False, "the server learns only the sum of the sites' models, none alone")
    secure_share: float = knob(
        0.67, "share of a round's sites that must last it out, more than half", low=0.51, high=1.0
    )
    central_clipping: str = knob(
        "adaptive",
        "central: privacy.clipping_norm fixed, or adapted to the median change",
        choices=("fixed", "adaptive"),
    )


# What of [federation] also decides how long a model is trained that nobody shares; the rest is the federation's alone.
_LENGTH = [f"federation.{name}" for name in ("rounds", "fraction", "min_sites", "round_timeout", "start_timeout")]


def nothing_shared() -> dict[str, Scalar]:
    """The settings of a federation that merge, weigh, code or correct, at their defaults: how a model is trained that
    a federated one is held against. It has no rounds in which its optimiser would begin anew."""
    shared = {f"federation.{item.name}": cast(Scalar, item.default) for item in fields(Federation)}
    return {key: value for key, value in shared.items() if key not in _LENGTH} | {"train.keep_optimizer": True}

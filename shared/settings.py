"""Every setting of a job, table by table: its default, what it means, which values are allowed.

[federation], the longest, has a module of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from shared.knobs import knob
from shared.rules import PERCENTS, RULES
from shared.tasks import TASKS

# How a folder of images may be laid out; each task reads some of them. "cases" is what a partition writes.
FORMATS = (*dict.fromkeys(form for facts in TASKS.values() for form in facts.formats), "cases")


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
    labels: str = knob(
        "",
        "segmentation: classes of the whole image, learnt beside the mask, comma-separated",
        tasks=("segmentation",),
    )
    frames: int = knob(
        0, "sequences: at most so many frames or samples, evenly picked; 0 takes all", low=0, high=100_000
    )
    normal: str = knob(
        "",
        "reconstruction: the class trained on, all others are anomalies; '' is the first class",
        tasks=("reconstruction",),
    )
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
    overlap: float = knob(
        0.25, "segmentation: share by which sliding windows overlap", low=0.0, high=0.9, tasks=("segmentation",)
    )
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

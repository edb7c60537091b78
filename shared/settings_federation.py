"""The settings of [federation]: rounds, and how many models become one; ``shared.settings`` has the other tables."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import cast

from shared.knobs import Scalar, knob
from shared.strategies import AGGREGATORS, CODEC_NAMES, CORRECTIONS, LOCAL, SERVER_OPTIMIZERS, STRATEGIES


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


# What of [federation] also decides how long a model is trained that nobody shares; the rest is the federation's alone.
_LENGTH = [f"federation.{name}" for name in ("rounds", "fraction", "min_sites", "round_timeout", "start_timeout")]


def nothing_shared() -> dict[str, Scalar]:
    """The settings of a federation that merge, weigh, code or correct, at their defaults: how a model is trained that
    a federated one is held against. It has no rounds in which its optimiser would begin anew."""
    shared = {f"federation.{item.name}": cast(Scalar, item.default) for item in fields(Federation)}
    return {key: value for key, value in shared.items() if key not in _LENGTH} | {"train.keep_optimizer": True}

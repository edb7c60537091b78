"""Client corrections where the answer is known: sites whose losses are parabolas, trained by the real loop.

Site i has the loss a_i / 2 (w - b_i)^2. The optimum of the weighted sum is known; so is, for every number of local
steps, where averaging stops short of it. All but the messages is real: training loop, both parts, memory, aggregator.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from client.corrections import SiteCorrection
from client.memory import Memory
from server.admission import Update
from server.algorithm import Algorithm
from server.corrections import travelled
from shared.config import Job, job_from_flat
from shared.tasks import Part
from shared.training import train


class Site(NamedTuple):
    """Its loss is curve / 2 (w - at)^2; it counts ``weight`` and takes ``steps`` gradient steps a round."""

    curve: float
    at: float
    weight: float
    steps: int = 5


SITES = (Site(1.0, -2.0, 1.0), Site(4.0, 1.0, 2.0), Site(0.5, 9.0, 1.0))
RATE = 0.2


class Point(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1, dtype=torch.float64))


def task_of(site: Site) -> Any:
    return SimpleNamespace(
        parts=lambda job: (Part(),),
        batch=lambda *_, **__: None,
        step=lambda model, *_: (site.curve / 2 * (model.w - site.at) ** 2).sum(),
    )


def job_of(correction: str, rounds: int, **more: Any) -> Job:
    flat = {
        "federation.correction": correction,
        "federation.rounds": rounds,
        "train.optimizer": "sgd",
        "train.momentum": 0.0,
        "train.weight_decay": 0.0,
        "train.learning_rate": RATE,
        "train.schedule": "constant",
        "train.warmup": 0.0,
        "train.local_steps": 100,
        "train.batch_size": 1,
        "train.device": "cpu",
    }
    return job_from_flat(flat | {key.replace("__", "."): value for key, value in more.items()})


def always(place: int, number: int) -> bool:
    return True


def by_turns(place: int, number: int) -> bool:
    return place != number % 3


def federate(folder: Path, job: Job, sites: Sequence[Site] = SITES, takes_part: Any = always) -> float:
    """Where the common weight is after the job's rounds; it starts at 0."""
    algorithm, common = Algorithm(job, ["w"]), {"w": torch.zeros(1, dtype=torch.float64)}
    algorithm.everyone = sum(site.weight for site in sites)
    memories = [Memory(folder, f"site-{place}", job) for place in range(len(sites))]

    def replies(number: int, beside: Mapping[str, dict[str, Tensor]]) -> Iterator[tuple[float, dict[str, Tensor]]]:
        for place, site in enumerate(sites):
            if takes_part(place, number):
                heard = algorithm.correction.heard(str(place))
                content = RecordDict({"config": ConfigRecord({"round": number, "heard": heard})})
                for name, arrays in beside.items():
                    content[name] = ArrayRecord(arrays)  # type: ignore[arg-type]
                update = answer(content, job, site, memories[place], common, number)
                yield algorithm.take(update, str(place), number, common)

    for number in range(1, job.federation.rounds + 1):
        common = algorithm.merge(replies(number, algorithm.outgoing(common)), common, number)
    return common["w"].item()


def answer(content: Any, job: Job, site: Site, memory: Memory, common: dict[str, Tensor], number: int) -> Update:
    model = Point()
    model.load_state_dict(common)
    correction = SiteCorrection(model, job, SimpleNamespace(content=content), memory, "s")  # type: ignore[arg-type]
    trained = train(
        model, task_of(site), [0], job, site="s", first_step=0, steps=site.steps, class_weights=[],  # type: ignore[arg-type]
        moments=memory.load("moments", number) if job.train.keep_optimizer else None, correction=correction.term,
    )  # fmt: skip
    kept, sent = correction.after()
    memory.save(number, kept | {"moments": trained.moments}, needed=[correction.heard])
    return Update(site.weight, {"w": model.w.detach().clone()}, site.steps, 1, 0.0, [], math.nan, beside=sent)


def optimum(sites: Sequence[Site] = SITES) -> float:
    return sum(s.weight * s.curve * s.at for s in sites) / sum(s.weight * s.curve for s in sites)


def where_it_stops(strengths: Sequence[float], sites: Sequence[Site]) -> float:
    """The fixed point where each site moves a share ``strengths`` of its way to its own optimum."""
    weights = [site.weight * strength for site, strength in zip(sites, strengths, strict=True)]
    return sum(weight * site.at for weight, site in zip(weights, sites, strict=True)) / sum(weights)


def test_averaging_stops_where_theory_says_and_not_at_the_optimum(tmp_path: Path) -> None:
    found = federate(tmp_path, job_of("none", 50))
    assert found == pytest.approx(where_it_stops([1 - (1 - RATE * s.curve) ** s.steps for s in SITES], SITES), abs=1e-9)
    assert abs(found - optimum()) > 0.05


@pytest.mark.parametrize("mu", [0.1, 1.0, 4.0])
def test_fedprox_stops_at_its_fixed_point(mu: float, tmp_path: Path) -> None:
    """A site's step is w - rate (a (w - b) + mu (w - x)): towards (a b + mu x) / (a + mu), by a known factor."""
    found = federate(tmp_path, job_of("proximal", 60, federation__proximal_mu=mu))
    strengths = [(1 - (1 - RATE * (s.curve + mu)) ** s.steps) * s.curve / (s.curve + mu) for s in SITES]
    assert found == pytest.approx(where_it_stops(strengths, SITES), abs=1e-9)


@pytest.mark.parametrize("takes_part", [always, by_turns])
@pytest.mark.parametrize("correction", ["scaffold", "feddyn"])
def test_it_reaches_the_optimum_of_the_sum(correction: str, takes_part: Any, tmp_path: Path) -> None:
    """Also where each round only some take part, of unequal weight: then what sites keep is of different rounds."""
    job = job_of(correction, 60, federation__feddyn_alpha=1.0)
    assert federate(tmp_path, job, takes_part=takes_part) == pytest.approx(optimum(), abs=1e-6)


def test_scaffolds_control_is_the_papers_option_two(tmp_path: Path) -> None:
    """(start - end) / (steps x rate) less the shift, from the definition, against the mean gradient that we keep."""
    job, memory = job_of("scaffold", 2), Memory(tmp_path, "site", job_of("scaffold", 2))
    memory.save(1, {"control": {"w": torch.full((1,), 0.7, dtype=torch.float64)}})
    content = RecordDict({"config": ConfigRecord({"round": 2, "heard": 1})})
    content["control"] = ArrayRecord({"w": torch.full((1,), -0.4, dtype=torch.float64)})  # type: ignore[arg-type]
    update = answer(content, job, SITES[0], memory, {"w": torch.ones(1, dtype=torch.float64)}, 2)
    steps = SITES[0].steps
    option_two = 0.7 - (-0.4) + (1 - update.arrays["w"]) / (steps * RATE)
    assert update.beside["control"]["w"] == pytest.approx(option_two - 0.7, abs=1e-12)


UNEQUAL = (Site(1.0, -2.0, 1.0, 20), Site(1.0, 1.0, 2.0, 3), Site(1.0, 5.0, 1.0, 1))


def test_fednova_finds_the_optimum_with_unequal_steps_where_averaging_does_not(tmp_path: Path) -> None:
    """Averaging pulls to whoever took most steps. FedNova's own fixed point is known, too, and tends to the optimum."""
    small = {"train__learning_rate": 0.02}
    plain = federate(tmp_path / "plain", job_of("none", 100, **small), UNEQUAL)
    nova = federate(tmp_path / "nova", job_of("fednova", 100, **small), UNEQUAL)
    kept = [(1 - (1 - 0.02) ** site.steps) / site.steps for site in UNEQUAL]
    assert nova == pytest.approx(where_it_stops(kept, UNEQUAL), abs=1e-5)
    assert abs(plain - optimum(UNEQUAL)) > 1.5
    assert abs(nova - optimum(UNEQUAL)) < 0.3


@settings(max_examples=30, deadline=None)
@given(steps=st.integers(1, 40), momentum=st.floats(0, 0.99))
def test_how_far_a_site_travels_is_what_torchs_optimiser_does_on_a_slope(steps: int, momentum: float) -> None:
    job = job_of("fednova", 1, train__momentum=momentum, train__keep_optimizer=False)
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], 1.0, momentum, nesterov=momentum > 0)
    for _ in range(steps):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert travelled(steps, job) == pytest.approx(-weight.item(), rel=1e-9)


@pytest.mark.parametrize("keep", [True, False])
def test_scaffold_with_momentum_ends_nearer_the_optimum_than_averaging_with_it(keep: bool, tmp_path: Path) -> None:
    """Kept moments are of corrected gradients, which agree between sites: they fit the next round."""
    more = {"train__momentum": 0.5, "train__keep_optimizer": keep}
    plain = federate(tmp_path / "plain", job_of("none", 60, **more))
    found = federate(tmp_path / "scaffold", job_of("scaffold", 60, **more))
    assert abs(plain - optimum()) > 0.05
    assert found == pytest.approx(optimum(), abs=1e-3)


def test_what_no_gradient_trains_is_left_to_the_aggregator() -> None:
    """Statistics and counters: FedNova and FedDyn move weights alone."""
    for name in ("fednova", "feddyn"):
        algorithm = Algorithm(job_of(name, 1), ["w"])
        algorithm.everyone = 2.0
        before = {"w": torch.zeros(1), "running_mean": torch.zeros(1), "seen": torch.tensor(4)}
        after = {"w": torch.ones(1), "running_mean": torch.ones(1), "seen": torch.tensor(6)}
        updates = [Update(1.0, after, steps, 1, 0.0, [], math.nan) for steps in (1, 9)]
        replies = (algorithm.take(update, str(place), 1, before) for place, update in enumerate(updates))
        merged = algorithm.merge(replies, before, 1)
        assert (merged["running_mean"].item(), merged["seen"].item()) == (1.0, 6)
        assert merged["w"].item() == pytest.approx({"fednova": 5 * (1 + 1 / 9) / 2, "feddyn": 2.0}[name])


def test_a_round_done_again_after_a_loss_counts_once() -> None:
    algorithm = Algorithm(job_of("scaffold", 2), ["w"])
    algorithm.everyone = 1.0
    before = {"w": torch.zeros(1)}
    algorithm.outgoing(before)
    update = Update(1.0, before, 1, 1, 0.0, [], math.nan, beside={"control": {"w": torch.ones(1)}})

    def breaks() -> Iterator[tuple[float, dict[str, Tensor]]]:
        yield algorithm.take(update, "a", 1, before)
        raise ValueError("the line broke")

    with pytest.raises(ValueError, match="the line broke"):
        algorithm.merge(breaks(), before, 1)
    assert algorithm.correction.heard("a") == 0
    algorithm.merge((algorithm.take(update, "a", 1, before) for _ in range(1)), before, 1)
    assert algorithm.held["control"]["w"].item() == 1.0
    assert algorithm.correction.heard("a") == 1

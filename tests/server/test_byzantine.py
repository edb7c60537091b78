"""Sites that lie, in federations of real ClientApps: what robust aggregators make of them, and the plain mean does not.

One pool of workers plays all federations. How sites lie, and how many, stands in the job's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message
from flwr.clientapp import ClientApp

from client.app import app as real
from server.rounds import Run
from server.store import read_events
from shared.config import Job, Scalar
from simulations.engine import LocalGrid
from simulations.pool import WorkerPool
from tests.conftest import write_site

Attack = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]

# Of an array before and after honest training, and a generator that is one for all liars of a round, what is sent.
ATTACKS: dict[str, Attack] = {
    "flipped": lambda before, after, own: before - 10 * (after - before),
    "turned": lambda before, after, own: before - 200 * (after - before),
    "scaled": lambda before, after, own: before + 200 * (after - before),
    "noise": lambda before, after, own: before + own.normal(0, 2, before.shape).astype(before.dtype),
    "colluding": lambda before, after, own: before - own.choice([-1.0, 1.0], before.shape).astype(before.dtype),
}


def liars() -> ClientApp:
    """The real app; the first sites of the run send what the attack named in the job's name makes of their training."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        before = {name: array.numpy() for name, array in message.content["arrays"].items()}
        reply = real(message, context)
        attack, _, count = str(context.run_config["name"]).partition(" ")
        place = int(context.node_config["name"].removeprefix("s"))
        if attack in ATTACKS and place < int(count):
            alike = 0 if attack == "colluding" else place
            own = np.random.default_rng([int(message.metadata.group_id), alike])
            sent = {name: array.numpy() for name, array in reply.content["arrays"].items()}
            sent = {name: ATTACKS[attack](before[name], array, own) for name, array in sent.items()}
            reply.content["arrays"] = ArrayRecord({name: Array(np.asarray(array)) for name, array in sent.items()})
        return reply

    app.query()(lambda message, context: real(message, context))
    app.evaluate()(lambda message, context: real(message, context))
    return app


Measure = Callable[..., float]


@pytest.fixture(scope="module")
def auroc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Measure]:
    """The AUROC on all sites' test images after a run: attack, sites, liars, settings of the federation."""
    folder = tmp_path_factory.mktemp("byzantine")
    files = [write_site(folder / "data" / f"s{number}", f"s{number}", 48, seed=number) for number in range(7)]
    clean: dict[int, float] = {}
    with WorkerPool(liars(), 2) as pool:

        def measure(job: Job, attack: str, sites: int, bad: int, **federation: Scalar) -> float:
            name = f"{attack} {bad}"
            asked = job.replace(name=name, **{f"federation__{key}": value for key, value in federation.items()})
            out = folder / f"{len(list(folder.iterdir()))}"
            nodes = [
                {"site": str(file), "home": str(out / "homes" / file.parent.name), "name": file.parent.name}
                for file in files[:sites]
            ]
            Run(LocalGrid(pool, nodes, asked.flat()), asked, out, store=None).run()
            tests = [event for event in read_events(out) if event["event"] == "evaluation" and event["split"] == "test"]
            return float(tests[-1]["metrics"]["auroc"]["value"])

        def cached(job: Job, attack: str, sites: int, bad: int, **federation: Scalar) -> float:
            if attack != "clean":
                return measure(job, attack, sites, bad, **federation)
            if sites not in clean:
                clean[sites] = measure(job, attack, sites, bad)
            return clean[sites]

        yield cached


@pytest.fixture
def job(tiny_job: Job) -> Job:
    return tiny_job.replace(
        federation__rounds=6,
        evaluation__every=6,
        train__class_weights="none",
        train__local_steps=4,
        train__learning_rate=0.015,
    )


ROBUST: list[dict[str, Scalar]] = [
    {"aggregator": "median"},
    {"aggregator": "trimmed_mean", "trim": 0.3},
    {"aggregator": "geometric_median"},
    {"aggregator": "krum"},
    {"aggregator": "multikrum"},
    {"aggregator": "clipped_mean"},
]


@pytest.mark.slow
@pytest.mark.parametrize("crowd", [(5, 1), (7, 2)])
@pytest.mark.parametrize("attack", ATTACKS)
def test_robust_choices_end_where_the_clean_run_does_and_the_mean_does_not(
    attack: str, crowd: tuple[int, int], auroc: Measure, job: Job
) -> None:
    sites, bad = crowd
    clean = auroc(job, "clean", sites, 0)
    assert clean > 0.95
    if attack != "scaled":  # too far in the right direction: what it learns here it learns all the same
        assert auroc(job, attack, sites, bad) < clean - 0.1
    for federation in ROBUST:
        assert auroc(job, attack, sites, bad, byzantine=bad, **federation) >= clean - 0.03, federation


@pytest.mark.slow
@pytest.mark.parametrize("attack", ATTACKS)
def test_bulyan_bears_one_liar_of_seven(attack: str, auroc: Measure, job: Job) -> None:
    assert auroc(job, attack, 7, 1, aggregator="bulyan", byzantine=1) >= auroc(job, "clean", 7, 0) - 0.03

"""docs/strategies.md keeps its word: its ten lines, run as they stand, add an aggregator that trains."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from consilium.strategies import lines
from server.algorithm import aggregator
from shared.config import job_from_flat
from shared.errors import UserError
from shared.strategies import AGGREGATORS, SERVER_OPTIMIZERS, STRATEGIES
from simulations.simulate import run
from tests.conftest import write_site
from tests.server.algorithms import replies, zeros

SETTINGS = {
    "data.classes": "left,right",
    "data.size": 16,
    "model.width": 4,
    "train.batch_size": 8,
    "federation.rounds": 2,
    "evaluation.every": 1,
    "federation.aggregator": "midrange",
}


def code(root: Path) -> str:
    """The page's one block of Python."""
    (block,) = re.findall(r"```python\n(.*?)```", (root / "docs" / "strategies.md").read_text(), re.DOTALL)
    return str(block)


@pytest.fixture
def added(root: Path) -> Iterator[None]:
    exec(compile(code(root), "docs/strategies.md", "exec"), {"__name__": "added"})
    try:
        yield
    finally:
        del AGGREGATORS["midrange"]


def test_it_is_ten_lines(root: Path) -> None:
    assert len([line for line in code(root).splitlines() if line]) <= 10


@pytest.mark.usefixtures("added")
def test_the_added_aggregator_is_the_one_it_says_and_trains_a_federation(tmp_path: Path) -> None:
    job, models = job_from_flat(SETTINGS), replies(0, 4)
    stacked = np.stack([model["conv.weight"].numpy() for model in models])
    result = aggregator("midrange")([(1.0, model) for model in models], zeros(models[0]), job)
    np.testing.assert_allclose(result["conv.weight"].numpy(), (stacked.min(0) + stacked.max(0)) / 2, rtol=1e-6)
    assert any("midrange" in line for line in lines())
    for name in "abc":
        write_site(tmp_path / "data" / name, name)
    scores = run(job, tmp_path / "data", tmp_path / "run", workers=2).scores["federated"]
    assert scores["dropped"] == []
    assert set(scores["sites"]) == {"a", "b", "c"}


def test_afterwards_it_is_unknown_again() -> None:
    with pytest.raises(UserError, match=r"federation\.aggregator = 'midrange': must be one of mean, "):
        job_from_flat(SETTINGS)


@pytest.mark.parametrize("names", [STRATEGIES, AGGREGATORS, SERVER_OPTIMIZERS], ids=["names", "aggregators", "steps"])
def test_the_pages_and_the_command_name_all_there_are(names: dict[str, object], root: Path) -> None:
    pages = "".join((root / "docs" / name).read_text() for name in ("strategies.md", "personalisation.md"))
    unsaid = [name for name in names if f"`{name}`" not in pages]
    assert not unsaid, (
        f"{unsaid}: each needs its row, its name in backticks, in docs/strategies.md (what the server does, who trains "
        "when) or docs/personalisation.md (what a site does)"
    )
    listed = "\n".join(lines())
    unlisted = [name for name in names if f" {name} " not in listed]
    assert not unlisted, f"{unlisted}: `consilium strategies` (consilium/strategies.py) does not list them"

"""Which sites train in a round: a share, equally often; and the circle of a cycle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.admission import Place
from server.sampling import Arrays, pass_on, sample
from shared.config import Job
from tests.server.algorithms import job


def places(count: int, empty: int = 0) -> list[Place]:
    return [Place(node, f"site-{node:03}", {"train": 0 if node < empty else 5}, [], 0) for node in range(count + empty)]


def rounds(there: list[Place], asked: Job, count: int) -> list[list[str]]:
    seen: Counter[str] = Counter()
    drawn = []
    for number in range(1, count + 1):
        chosen = [place.name for place in sample(there, asked, number, seen)]
        seen.update(chosen)
        drawn.append(chosen)
    return drawn


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.floats(0.01, 1.0), st.integers(1, 40))
def test_every_site_is_asked_equally_often(count: int, fraction: float, number: int) -> None:
    drawn = rounds(places(count, empty=2), job(fraction=fraction), number)
    assert len({len(names) for names in drawn}) == 1
    assert all(len(set(names)) == len(names) and names == sorted(names) for names in drawn)
    often = Counter(name for names in drawn for name in names)
    assert max(often.values()) - min(often.get(place.name, 0) for place in places(count, 2)[2:]) <= 1
    assert not {place.name for place in places(count, 2)[:2]} & set(often)  # nothing to train on


def test_who_trains_together_changes() -> None:
    assert len({tuple(names) for names in rounds(places(6), job(fraction=0.5), 20)}) > 4


def test_the_draw_is_the_seeds() -> None:
    asked = job(fraction=0.3)
    assert rounds(places(9), asked, 8) == rounds(places(9), asked, 8)
    assert rounds(places(9), asked, 8) != rounds(places(9), asked.replace(seed=1), 8)


def test_drawn_anew_sites_are_asked_unequally() -> None:
    often = Counter(name for names in rounds(places(10), job(fraction=0.2, sampling="random"), 50) for name in names)
    assert max(often.values()) - min(often.values()) > 1


def test_a_robust_aggregator_draws_as_many_as_it_needs() -> None:
    assert len(rounds(places(9), job(fraction=0.1, aggregator="krum", byzantine=2), 1)[0]) == 7


def test_a_round_that_ends_with_some_replies_asks_as_many() -> None:
    assert len(rounds(places(9), job(fraction=0.1, order="buffered", buffer=4), 1)[0]) == 4
    assert len(rounds(places(3), job(fraction=0.1, order="buffered", buffer=4), 1)[0]) == 3


@pytest.mark.parametrize(("number", "order"), [(1, "abc"), (2, "bca"), (3, "cab"), (4, "abc")])
def test_a_cycle_passes_the_model_on_and_begins_one_further_each_round(number: int, order: str) -> None:
    there = [Place(i, name, {"train": 1}, [], 0) for i, name in enumerate("abc")]
    visited = []

    def train(asked: list[Place], arrays: Arrays) -> Iterator[tuple[float, Arrays]]:
        visited.append((asked[0].name, arrays["w"].item()))
        if asked[0].name != "b":  # b does not answer: the next one gets what b got
            yield 1.0, {"w": arrays["w"] * 2}

    result = pass_on(train, there, {"w": torch.tensor(1.0)}, number)
    assert "".join(name for name, _ in visited) == order
    assert result["w"].item() == 4.0
    assert max(value for _, value in visited) <= 4.0


def test_a_cycle_without_any_reply_is_an_error() -> None:
    with pytest.raises(ValueError, match="no reply"):
        pass_on(lambda asked, arrays: iter(()), places(2), {"w": torch.tensor(1.0)}, 1)

"""Where a round's time went: the parts add up, and what is not known is not made up."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.timing import PARTS, split_time, total_time

seconds = st.floats(0, 1e4)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy
@given(st.lists(st.tuples(seconds, st.floats(0, 1)), min_size=1, max_size=9), seconds)
def test_the_parts_add_up_to_the_round(sites: list[tuple[float, float]], more: float) -> None:
    whole = max(took for took, _ in sites) + more
    parts = split_time(whole, [{"seconds": took, "train_seconds": took * share} for took, share in sites])
    assert all(value is not None and value >= -1e-9 for value in parts.values())
    assert sum(parts[name] or 0 for name in PARTS) == pytest.approx(whole, abs=1e-6)


def test_by_hand() -> None:
    rows = [{"seconds": 4.0, "train_seconds": 3.0}, {"seconds": 8.0, "train_seconds": 5.0}]
    assert split_time(10.0, rows) == {"train": 4.0, "transfer": 2.0, "wait": 4.0}


def test_what_a_site_does_not_say_is_not_known() -> None:
    told, silent = {"seconds": 4.0, "train_seconds": 3.0}, {"seconds": 6.0}
    assert split_time(8.0, [told, silent]) == {"train": None, "transfer": None, "wait": 3.0}
    assert split_time(8.0, [{"site": "a"}]) == dict.fromkeys(PARTS)
    assert split_time(None, [told]) == split_time(8.0, []) == dict.fromkeys(PARTS)


def test_a_total_of_something_unknown_is_unknown() -> None:
    known = {"train": 1.0, "transfer": 2.0, "wait": 3.0}
    assert total_time([known, known]) == {"train": 2.0, "transfer": 4.0, "wait": 6.0}
    assert total_time([known, known | {"train": None}])["train"] is None
    assert total_time([]) == dict.fromkeys(PARTS)

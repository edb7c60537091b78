"""Invented journals for the tests: any events that the round loop may write, in any order."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

Event = dict[str, Any]

sites = st.sampled_from(["north", "south", "east", "node 18446744073709551615", "ß-\u2028"])
# Not only round numbers: any float must come back to the bit.
floats = st.floats(allow_nan=True, allow_infinity=True)
counts = st.integers(0, 2**53)
numbers = st.integers(0, 4)
words = st.text(max_size=20)
plain = st.recursive(
    st.none() | st.booleans() | counts | floats | words, lambda x: st.lists(x, max_size=3), max_leaves=4
)

figure = st.fixed_dictionaries({"value": floats, "low": floats, "high": floats, "n": counts})
metrics = st.dictionaries(st.sampled_from(["auroc", "loss", "dice:liver"]), figure, max_size=3)
dropped = st.lists(st.fixed_dictionaries({"site": sites, "reason": words}), max_size=3)
trained = st.lists(
    st.fixed_dictionaries(
        {"site": sites, "weight": floats, "steps": counts, "images": counts, "loss": floats},
        optional={"epsilon": floats, "losses": st.dictionaries(words, floats, max_size=2)},
    ),
    max_size=4,
)
secure = st.fixed_dictionaries({"sites": counts, "needed": counts, "images": counts, "loss": floats, "silent": dropped})
sums = st.dictionaries(sites, st.dictionaries(words, counts | st.lists(floats, max_size=3), max_size=3), max_size=3)
place = st.fixed_dictionaries(
    {
        "node": st.integers(0, 2**64 - 1),
        "name": sites,
        "images": st.fixed_dictionaries(dict.fromkeys(("train", "val", "test"), counts)),
        "classes": st.lists(counts, max_size=3),
        "skipped": counts,
    }
)


@st.composite
def evaluated(draw: st.DrawFn) -> Event:
    here = draw(st.lists(sites, unique=True, max_size=4))
    facts: Event = {
        "round": draw(numbers),
        "split": draw(st.sampled_from(["val", "test"])),
        "metrics": draw(metrics),
        "dropped": draw(dropped),
        "images": draw(counts),
        "sites": {name: draw(metrics) for name in here},
        "site_images": {name: draw(counts) for name in here},
    }
    if draw(st.booleans()):
        facts["sums"] = draw(sums)
    if draw(st.booleans()):
        facts |= {"server": draw(metrics), "server_images": draw(counts)}
    if draw(st.booleans()):
        facts["pictures"] = draw(st.lists(words, max_size=2))
    return {"kind": "evaluation", **facts}


def one(kind: str, required: Event, optional: Event | None = None) -> st.SearchStrategy[Event]:
    return st.fixed_dictionaries({"kind": st.just(kind), **required}, optional=optional or {})


happenings = st.one_of(
    one(
        "start",
        {"job": words, "name": words, "rounds": numbers, "version": words},
        {"resumed_after": numbers},
    ),
    one("survey", {"sites": st.lists(place, max_size=3), "dropped": dropped}),
    one(
        "round",
        {"round": numbers, "trained": trained, "dropped": dropped, "seconds": st.floats(0, 1e6)},
        {
            "bytes": st.dictionaries(sites, st.lists(counts, min_size=2, max_size=2), max_size=3),
            "central": st.fixed_dictionaries({"bound": floats, "epsilon": floats}),
            "secure": secure,
        },
    ),
    evaluated(),
    one("warning", {"text": words}),
    one("failed", {"reason": words}),
    one("finish", {"seconds": floats}),
    one("something new", {"x": plain}, {"round": numbers, "split": words}),
)
journals = st.lists(happenings, min_size=1, max_size=12)

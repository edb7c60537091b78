"""Of whom figures are said to be."""

from __future__ import annotations

from server.coverage import able_sites, few_words, whose, whose_course


def test_all_sites_are_those_that_have_such_images() -> None:
    places = [{"name": n, "images": {"train": t, "val": v}} for n, t, v in (("a", 1, 2), ("b", 5, 0), ("c", 0, 3))]
    assert able_sites(places, "val") == ["a", "c"]
    assert able_sites(places, "val", common=False) == ["a"], "a part of the model stayed where it was trained"
    assert whose(["a", "c"], ["a", "c"]) == "all sites"
    assert whose(["a"], ["a", "c"], "12 images") == "1 of 2 sites (a, 12 images)"
    assert whose([], ["a", "c"], "0 images") == "0 of 2 sites"
    assert whose([str(k) for k in range(9)], [str(k) for k in range(30)], "90 images") == "9 of 30 sites (90 images)"


def test_figures_of_several_rounds_may_be_of_different_sites() -> None:
    assert whose_course([["a", "b"], ["b", "a"]], ["a", "b"]) == "all sites"
    assert whose_course([["a"], ["a"]], ["a", "b"]) == "1 of 2 sites (a)"
    assert whose_course([["a"], ["a", "b"]], ["a", "b"]).startswith("those of 2 sites that told theirs, not the same")
    assert whose_course([], ["a"]) == "all sites", "nothing was evaluated yet"


def test_few_validation_cases_are_warned_of() -> None:
    assert "So few cases" in few_words(12)
    assert few_words(50) == ""

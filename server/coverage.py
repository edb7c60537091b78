"""Of whom figures are: of all sites, or of those that told theirs where others kept them back or did not answer."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

NAMED = 4  # sites at most that are named one by one
FEW = 50  # validation cases below which a threshold is not firm


def whose(told: Collection[str], able: Collection[str], more: str = "") -> str:
    """``all sites``, or ``1 of 3 sites (hospital-north, 12 images)``.

    Args:
        told: the sites that the figures are of.
        able: the sites that have such images, whether they told figures or not.
        more: what else to say of those that told, as their images.
    """
    if set(able) <= set(told):
        return "all sites"
    names = [", ".join(sorted(told))] if 0 < len(told) <= NAMED else []
    inside = ", ".join(names + ([more] if more and told else []))
    return f"{len(told)} of {len(set(able) | set(told))} sites" + (f" ({inside})" if inside else "")


def whose_course(rounds: Iterable[Collection[str]], able: Collection[str], more: str = "") -> str:
    """The same of figures of several rounds, of which each may be of other sites."""
    found = {frozenset(told) for told in rounds}
    if len({whose(told, able) for told in found}) > 1:
        return f"those of {len(set(able).union(*found))} sites that told theirs, not the same in every round"
    return whose(next(iter(found), frozenset(able)), able, more)


def able_sites(places: Iterable[Mapping[str, Any]], split: str, common: bool = True) -> list[str]:
    """The sites of a survey that have images of the split; where no model is ``common``, only those that trained."""
    images = {str(place["name"]): place["images"] for place in places}
    return [name for name, own in images.items() if own.get(split) and (common or own.get("train"))]


def of_event(event: Mapping[str, Any], able: Collection[str], case: str) -> str:
    """Of whom the figures of an evaluation's event are."""
    n = event.get("images") or 0
    return whose(event.get("sites", {}), able, f"{n:,} {case if n == 1 else f'{case}s'}")


def missing_words(event: Mapping[str, Any], able: Collection[str], case: str, why: Mapping[str, str]) -> str:
    """A warning where an evaluation on validation images is not of all sites that have such; else "".

    Args:
        why: words for the reason that each site gave, by its name.
    """
    told = event.get("sites", {})
    if not (missing := sorted(set(able) - set(told))):
        return ""
    names = [f"{name} ({why[name]})" if name in why else name for name in missing[:NAMED]]
    names += [f"{len(missing) - NAMED} more"] if len(missing) > NAMED else []
    return (
        f"the kept round was chosen by the validation {case}s of {of_event(event, able, case)}; "
        f"without figures of {', '.join(names)}"
    )


def few_words(n: int) -> str:
    """A caution where a threshold was chosen on few cases; else ""."""
    return f" So few cases (fewer than {FEW}) do not fix a threshold: choose it anew on more." if n < FEW else ""

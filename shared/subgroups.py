"""The subgroups of patients for which a job asks test figures: what they are called, and who belongs to which.

``evaluation.subgroups`` lists them, comma-separated, each as ``name=value|value``:

    sex                    the same as sex=F|M
    age                    the same as age=18|40|65, the ages at which a new band begins
    scanner=Siemens|GE     a maker or model that holds the word
    smoker=yes|no          any other column of the site's table, by its values

Whoever fits none of the values belongs to ``other``, also where the value is not known. So all that a site can say of a
patient is one of a few words that the job names: no text of its own leaves it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from shared.errors import UserError
from shared.tasks import Sums

if TYPE_CHECKING:
    from shared.config import Job

USUAL = {"sex": ("F", "M"), "age": ("18", "40", "65")}
OTHER = "other"
_NAME, _VALUE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,31}"), re.compile(r"[\w .,+/-]{1,40}")
# What people write for a sex, in a few languages; DICOM writes M, F and O.
_SEXES = {"F": ("f", "female", "woman", "w", "weiblich", "femme", "mujer"),
          "M": ("m", "male", "man", "männlich", "homme", "hombre", "h")}  # fmt: skip

_PER_YEAR = {"D": 365.25, "W": 52.18, "M": 12, "Y": 1}


class Dimension(NamedTuple):
    """By what patients are told apart: its name, the values or edges that the job gives, and the groups' names."""

    name: str
    values: tuple[str, ...]
    labels: tuple[str, ...]

    def label_of(self, value: str) -> str:
        """The group of a patient of whom this is known, "" for nothing; ``other`` where it fits none."""
        value = value.strip()
        if not value:
            return OTHER
        if self.name == "age":
            return self._band(value)
        low = value.casefold()
        if self.name == "sex":
            low = next((sex for sex, words in _SEXES.items() if low in words), low).casefold()
        within = self.name == "scanner"
        for known in self.values:
            if known.casefold() == low or (within and known.casefold() in low):
                return known
        return OTHER

    def _band(self, value: str) -> str:
        stated = re.fullmatch(r"(\d{1,3})([DWMY])", value.upper())  # as DICOM writes it
        try:
            years = int(stated[1]) / _PER_YEAR[stated[2]] if stated else float(value)
        except ValueError:
            return OTHER
        if not 0 <= years < 150:
            return OTHER
        return self.labels[sum(years >= float(edge) for edge in self.values)]


def parse_subgroups(text: str) -> list[Dimension]:
    """The dimensions that a job names, in its order.

    Raises:
        UserError: one is not written as it must be; one line that says how.
    """
    found: list[Dimension] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, rest = (piece.strip() for piece in part.partition("="))
        values = tuple(value.strip() for value in rest.split("|")) if equals else USUAL.get(name, ())
        wrong = f"evaluation.subgroups = {text!r}: "
        if not _NAME.fullmatch(name):
            raise UserError(f"{wrong}{name!r} is no name; write for example: sex, age=18|65, scanner=Siemens|GE")
        if not values:
            raise UserError(f"{wrong}name the values of {name}, for example {name}=one|other")
        if name in {one.name for one in found} or len({value.casefold() for value in values}) < len(values):
            raise UserError(f"{wrong}something stands there twice in {part!r}")
        found.append(Dimension(name, values, _labels(name, values, wrong)))
    return found


def _labels(name: str, values: tuple[str, ...], wrong: str) -> tuple[str, ...]:
    if name == "age":
        edges = [float(value) if re.fullmatch(r"\d{1,3}", value) else math.nan for value in values]
        if not all(low < high for low, high in zip([0.0, *edges], edges, strict=False)):  # false of NaN, too
            raise UserError(f"{wrong}the ages at which a band begins must be whole and rise, for example age=18|40|65")
        whole = [int(edge) for edge in edges]
        between = (f"{low}-{high - 1}" for low, high in pairwise(whole))
        return (f"<{whole[0]}", *between, f">={whole[-1]}")
    for value in values:
        if not _VALUE.fullmatch(value) or value.casefold() == OTHER:
            raise UserError(f"{wrong}{value!r} cannot be the name of a group")
    return values


def groups_of(job: Job) -> dict[str, tuple[str, str]]:
    """Every group that the job asks for: its key as in ``sex=F``, with the dimension and the label."""
    return {
        f"{one.name}={label}": (one.name, label)
        for one in parse_subgroups(job.evaluation.subgroups)
        for label in (*one.labels, OTHER)
    }


def group_sums(parts: Mapping[str, Sums]) -> Sums:
    """The sums of all groups in one flat dict, ``sex=F/n`` for ``n`` of the group ``sex=F``."""
    return {f"{group}/{key}": value for group, sums in parts.items() for key, value in sums.items()}


def sums_of_groups(sums: Mapping[str, object], groups: Mapping[str, object]) -> dict[str, Sums]:
    """The inverse of ``group_sums``."""
    found: dict[str, Sums] = {group: {} for group in groups}
    for name, value in sums.items():
        group, _, key = name.rpartition("/")
        found[group][key] = value  # type: ignore[assignment]
    return found

"""The rules of ``data.harmonise`` by name, and which of them a job may ask for. What they do: shared.imaging.harmonise.

They stand apart from the code that applies them, because a job is checked where neither NumPy nor torch is loaded.
"""

from __future__ import annotations

import difflib
import itertools
import math

from shared.errors import UserError

#: What each rule looks at, in words; the order is that of the help.
RULES = {
    "polarity": "dark on bright becomes bright on dark",
    "zscore": "each image by its own mean and sd",
    "percentiles": "each image by its own 0.5 and 99.5 % values",
    "site-zscore": "all images of a site by the mean and sd of its training images",
    "site-percentiles": "all images of a site by the 0.5 and 99.5 % values of its training images",
    "nyul": "the histogram of each image onto data.landmarks",
    "reinhard": "each image to one mean and sd of colour",
    "macenko": "the two stains of each image to two that are the same everywhere",
}
STAINS = ("reinhard", "macenko")  # want colour
OF_SITE = ("site-zscore", "site-percentiles")  # look at the site's training images, not at one image alone
PERCENTS = (1, 10, 20, 30, 40, 50, 60, 70, 80, 90, 99)  # of Nyúl's landmarks


def rules_of(text: str) -> tuple[str, ...]:
    """The rules of ``data.harmonise`` in their order; none for ``none``.

    Raises:
        UserError: a rule that is not known, none beside others, one twice, two of the site.
    """
    words = tuple(word.strip() for word in text.split(","))
    if words == ("none",):
        return ()
    for word in words:
        if word not in RULES:
            close = difflib.get_close_matches(word, [*RULES, "none"], n=1, cutoff=0.5)
            hint = f" (did you mean {close[0]!r}?)" if close and word != "none" else ""
            beside = "none stands alone; " if word == "none" else ""
            raise UserError(
                f"data.harmonise = {text!r}: {beside}must be none, or one or more of {', '.join(RULES)}{hint}"
            )
    if len(set(words)) < len(words):
        raise UserError(f"data.harmonise = {text!r}: a rule stands there twice")
    if len(set(words) & set(OF_SITE)) > 1:
        raise UserError(f"data.harmonise = {text!r}: a site has one scale; keep one of {', '.join(OF_SITE)}")
    return words


def site_rule(text: str) -> str:
    """The rule that looks at a site's training images; "" where there is none."""
    return next((rule for rule in rules_of(text) if rule in OF_SITE), "")


def landmarks_of(text: str) -> tuple[float, ...]:
    """The grey values of ``data.landmarks``, one for each of PERCENTS; none for "".

    Raises:
        UserError: not so many growing numbers between 0 and 1.
    """
    if not text.strip():
        return ()
    try:
        values = tuple(float(word) for word in text.replace(",", " ").split())
    except ValueError:
        values = ()
    ends = (0.0, *values, 1.0)
    if len(values) != len(PERCENTS) or not all(a < b for a, b in itertools.pairwise(ends)):
        raise UserError(
            f"data.landmarks = {text!r}: write {len(PERCENTS)} growing numbers between 0 and 1, the grey values of the "
            f"percentiles {' '.join(map(str, PERCENTS))}; `consilium survey` names some"
        )
    return values


def check_rules(rules: str, landmarks: str, channels: int, spacing: float, task: str, several: bool) -> None:
    """Refuse rules that do not fit the rest of a job.

    Args:
        several: whether a case is several images.

    Raises:
        UserError: one line that says what to set.
    """
    asked, values = rules_of(rules), landmarks_of(landmarks)
    if "nyul" in asked and not values:
        raise UserError(
            'data.harmonise = "nyul": set data.landmarks, the grey values that the histogram is brought to; '
            "`consilium survey` names some, from the sums of all sites"
        )
    if values and "nyul" not in asked:
        raise UserError('data.landmarks: is for data.harmonise = "nyul" only; take it out')
    for rule in asked:
        if rule in STAINS and channels != 3:
            raise UserError(f"data.harmonise = {rule!r}: stains are told by colour; set data.channels = 3")
        if rule in OF_SITE and several:
            raise UserError(
                f"data.harmonise = {rule!r}: the images of a case have no common scale; write "
                f"{rule.removeprefix('site-')!r}, which takes each alone"
            )
    if task == "sequence" and asked:
        raise UserError(
            f"data.harmonise = {rules!r}: films keep the grey values that their frames have in common, and signals "
            'have none; write "none"'
        )
    if task in ("sequence", "detection") and not math.isclose(spacing, 0.0):
        raise UserError(f"data.spacing = {spacing:g}: {task} fits images into data.size; set it to 0")

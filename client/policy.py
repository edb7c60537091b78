"""The site's own rules, [privacy] of its site.toml: what a job must grant before anything is trained or leaves.

    [privacy]
    require_dp = true               # only jobs with differential privacy
    max_epsilon = 8.0               # most that may ever be spent on these images, by all runs; 0: no limit
    max_delta = 1e-5                # largest delta a job may use; this is the default where max_epsilon is set
    unit = "patient"                # who must be protected: one image, or all images of a patient
    min_patients = 20               # with fewer training patients the site takes no part
    metrics = "all"                 # or names of all that may be computed; a job that computes more is refused
    subgroups = "sex, age"          # test figures may be told by these, if a job asks; "all"; "" for none
    min_cell = 5                    # no count of 1 to 4 images of a class leaves
    exact_counts = false            # the number of training images does not leave, declared_images stands for it
    declared_images = 400
    allow_shared_noise = false      # whether noise shared among the sites is enough for require_dp
    require_secure_aggregation = true  # the site's model leaves only masked
    max_update_norm = 10.0          # no larger change of the model leaves; 0 is no limit
    cryptographic_noise = true      # noise from the operating system's cryptographic generator; slower
    audit_in_model_card = false     # whether the figures of `consilium audit` may stand in the model's card

A job may grant more than a site asks, never less: it is then refused by that site alone, before any training, with a
code that names the rule. What the site does not say is as the defaults of ``shared.sitefile.PRIVACY``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from shared.config import Job, nearest, read_toml
from shared.errors import SiteRefusal, UserError
from shared.sitefile import PRIVACY
from shared.tasks import TASKS

USUAL_DELTA = 1e-5
LEAST = 5  # images of a group, and of a class in it, whatever privacy.min_cell says: a group is a few patients


@dataclass(frozen=True)
class Policy:
    """The rules of one site; see the module."""

    require_dp: bool
    max_epsilon: float
    max_delta: float
    unit: str
    min_patients: int
    metrics: tuple[str, ...]
    subgroups: tuple[str, ...]
    min_cell: int
    exact_counts: bool
    declared_images: int
    allow_shared_noise: bool
    require_secure_aggregation: bool
    max_update_norm: float
    cryptographic_noise: bool
    audit_in_model_card: bool


def read_policy(path: Path) -> Policy:
    """The rules in a site.toml that ``shared.sitefile.read_site`` has accepted.

    Raises:
        UserError: a value that is not allowed; one line that names the file.
    """
    values = PRIVACY | read_toml(Path(path)).get("privacy", {})
    try:
        _check(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    metrics, groups = _words(values.pop("metrics")), _words(values.pop("subgroups"))
    return Policy(metrics=() if metrics == ("all",) else metrics, subgroups=groups, **values)


def _words(text: object) -> tuple[str, ...]:
    return tuple(word.strip() for word in str(text).split(",") if word.strip())


def _check(values: dict[str, bool | float | int | str]) -> None:
    def wrong(name: str, allowed: str) -> UserError:
        return UserError(f"privacy.{name} = {values[name]!r}: must be {allowed}")

    for name in ("max_epsilon", "max_update_norm", "declared_images", "min_patients", "min_cell"):
        if not 0 <= float(values[name]) < 1e9:
            raise wrong(name, "0 or more")
    if not 0 <= float(values["max_delta"]) <= 0.1:
        raise wrong("max_delta", "above 0 and at most 0.1, well below one over the number of patients")
    if values["max_epsilon"] and not values["max_delta"]:
        values["max_delta"] = USUAL_DELTA  # an epsilon without a delta says nothing
    if values["unit"] not in ("image", "patient"):
        raise wrong("unit", '"image" or "patient"')
    if values["require_dp"] and not values["max_epsilon"]:
        raise UserError("privacy.require_dp = true: say with privacy.max_epsilon how much may ever be spent")
    if not values["exact_counts"] and not values["declared_images"]:
        raise UserError("privacy.exact_counts = false: say with privacy.declared_images which number stands for it")
    known = {metric for facts in TASKS.values() for metric in facts.metrics}
    words = [word.strip() for word in str(values["metrics"]).split(",") if word.strip()]
    if not words:
        raise wrong("metrics", '"all", or names of figures')
    if "all" in words and len(words) > 1:
        raise wrong("metrics", 'either "all" alone, or names of figures without it')
    if words != ["all"]:
        for word in words:
            if word not in known:
                raise UserError(f"privacy.metrics: no task has a metric {word!r}{nearest(word, known)}")


def together(policies: Sequence[Policy], images: Sequence[int]) -> Policy:
    """The strictest of several sites' rules on what leaves: those of a node that pools their images.

    Args:
        images: for training, of each site; where a site tells no exact number, what it declares stands for it.
    """
    first = policies[0]
    if len(policies) == 1:
        return first
    told = [
        own if policy.exact_counts else policy.declared_images for policy, own in zip(policies, images, strict=True)
    ]
    norms = [policy.max_update_norm for policy in policies if policy.max_update_norm]
    return replace(
        first,
        subgroups=(),  # whose patient is whose cannot be told any more
        min_cell=max(policy.min_cell for policy in policies),
        exact_counts=all(policy.exact_counts for policy in policies),
        declared_images=sum(told),
        max_update_norm=min(norms, default=0.0),
        require_dp=any(policy.require_dp for policy in policies),
        cryptographic_noise=any(policy.cryptographic_noise for policy in policies),
        allow_shared_noise=all(policy.allow_shared_noise for policy in policies),
        audit_in_model_card=all(policy.audit_in_model_card for policy in policies),
    )


def require(policy: Policy, job: Job, patients: int) -> None:
    """Refuse a job that grants less than the site asks.

    Args:
        patients: with at least one training image at the site.

    Raises:
        SiteRefusal: its code names the rule.
    """
    for code, broken, why in _rules(policy, job, patients):
        if broken:
            raise SiteRefusal(code, why)


def forbidden(policy: Policy, job: Job) -> list[str]:
    """The figures that the job computes and the site's list does not name."""
    return sorted(set(TASKS[job.task].computed(job)) - set(policy.metrics)) if policy.metrics else []


def _rules(policy: Policy, job: Job, patients: int) -> Sequence[tuple[str, bool, str]]:
    asked, private = job.privacy, job.privacy.dp in ("local", "distributed")
    kept_back = forbidden(policy, job)
    return (
        (
            "dp-required",
            policy.require_dp and not private,
            "require_dp, but the job has no privacy.dp of the site's own",
        ),
        (
            "shared-noise-forbidden",
            policy.require_dp and asked.dp == "distributed" and not policy.allow_shared_noise,
            "the job shares the noise among the sites (privacy.dp), allow_shared_noise is false",
        ),
        (
            "unit-too-small",
            private and policy.unit == "patient" and asked.unit != "patient",
            "the job protects single images (privacy.unit), the site asks for patients",
        ),
        (
            "epsilon-over-limit",
            private and 0 < policy.max_epsilon < asked.epsilon,
            f"the job plans epsilon {asked.epsilon:g}, max_epsilon is {policy.max_epsilon:g}",
        ),
        (
            "delta-over-limit",
            private and 0 < policy.max_delta < asked.delta,
            f"the job's delta {asked.delta:g} is above max_delta = {policy.max_delta:g}",
        ),
        (
            "delta-too-large",
            private and asked.delta * patients >= 1,
            f"delta {asked.delta:g} is not below one over the {patients} training patients",
        ),
        (
            "too-few-patients",
            patients < policy.min_patients,
            f"{patients} training patients, min_patients is {policy.min_patients}",
        ),
        ("metric-forbidden", bool(kept_back), f"the job computes {', '.join(kept_back)}, which metrics does not allow"),
        (
            "secure-aggregation-required",
            policy.require_secure_aggregation and not asked.secure_aggregation,
            "require_secure_aggregation, but the job has privacy.secure_aggregation = false",
        ),
    )


def tells(policy: Policy, dimension: str) -> bool:
    """Whether figures by this dimension of patients (sex, age, scanner …) may leave."""
    return dimension in policy.subgroups or policy.subgroups == ("all",)


def least_of(policy: Policy) -> int:
    """Images of the smallest group of patients that is told of."""
    return max(policy.min_cell, LEAST)

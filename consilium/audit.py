"""What a run tells of a site's images, measured by the site on its own machine: membership inference and inversion.

See ``client.membership`` and ``client.inversion`` for the attacks. Nothing is sent anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from client import inversion, membership
from client.membership import Attack
from client.policy import Policy, read_policy
from client.privacy import units
from consilium.trained import TrainedModel, open_run
from server.store import read_events
from shared.accounting import job_noise
from shared.cases import derived_seed
from shared.config import Job, load_job
from shared.errors import SiteRefusal, UserError
from shared.imaging.augment import shift_and_scale
from shared.imaging.dataset import Dataset, load_dataset, to_float
from shared.norms import is_private
from shared.samples import read_samples
from shared.sitefile import read_site

AUDITED = ("classification", "segmentation", "sequence", "reconstruction")
FEWEST = 10  # members, and others: with fewer no figure says anything
WOULD_BE = (0.05, 0.5, 1.0)  # noise multipliers shown where the job itself adds none

Progress = Callable[[int, int], None]  # hears (done, of all): models trained and images rebuilt


class Membership(NamedTuple):
    """One attack on one model, or on several in turn; members and others are cases per model."""

    attack: str
    model: str
    members: int
    others: int
    found: Attack


class Rebuilt(NamedTuple):
    """An image rebuilt from an update: grey values 0..1 (channels, size, size), against the original.

    ``noise`` is in clipping norms, None where nothing is clipped either; ``sent``: the job sends such updates.
    """

    update: str
    noise: float | None
    sent: bool
    psnr: float
    correlation: float
    picture: npt.NDArray[np.float32]


@dataclass
class Audit:
    """All that was measured. The pictures show a patient: they stay at the site."""

    site: str
    job: Job
    round: int
    steps: int
    shadows: int
    noise: float
    policy: Policy
    membership: list[Membership] = field(default_factory=list)
    original: npt.NDArray[np.float32] | None = None
    rebuilt: list[Rebuilt] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def audit(
    run: Path,
    site_file: Path,
    shadows: int = 8,
    steps: int | None = None,
    inversion_steps: int = inversion.STEPS,
    weights: str = "best",
    device: str = "auto",
    progress: Progress | None = None,
) -> Audit:
    """Attack the model of ``run``, and models trained as it was, with the images of a site.

    Args:
        shadows: models that LiRA compares with, besides the one attacked; 0 leaves LiRA out.
        steps: gradient steps of each of them; None takes those of one site in the run.
        inversion_steps: of each rebuilt image; 0 leaves inversion out.

    Raises:
        UserError: no run, a site whose images do not fit it, too few of them, a task that is not audited; one line.
    """
    _check(run, shadows, steps, inversion_steps)
    trained = open_run(run, weights, device)
    job = trained.job.replace(train__device=str(trained.device))
    if steps is not None:
        job = job.replace(federation__rounds=steps, train__local_steps=1, train__local_epochs=0.0)
    site, policy = read_site(site_file), read_policy(site_file)
    try:
        data = load_dataset(read_samples(site, job), site, job)
        members, others = _members(data, job, site.name)
        result = Audit(
            site.name,
            trained.job,
            int(trained.facts.get("round", 0)),
            job.federation.rounds * job.local_steps(len(members)),
            shadows,
            job_noise(trained.job) if is_private(trained.job) else 0.0,
            policy,
        )
        _note(result, run, len(others))
        levels = _levels(job, result.noise) if inversion_steps and _invertible(result) else []
        hear = _Counter(progress, (shadows + 1 if shadows else 0) + len(levels))
        _attack_run(result, trained, members, others)
        if shadows:
            _attack_local(result, trained, members, job, hear)
        if levels:
            _invert(result, trained, members, job, levels, inversion_steps, hear)
    except SiteRefusal as refusal:
        raise UserError(f"{site_file}: {refusal}") from None
    return result


class _Counter:
    """Counts what is done for the bar."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.done, self.total = progress, 0, total

    def __call__(self) -> None:
        self.done += 1
        if self.progress:
            self.progress(self.done, self.total)


def _check(run: Path, shadows: int, steps: int | None, inversion_steps: int) -> None:
    """Refuse what needs no model to be refused: the network of a detector takes a while to open."""
    if shadows < 0 or shadows == 1:
        raise UserError(f"--shadows {shadows}: must be 0, which leaves LiRA out, or 2 or more")
    if steps is not None and steps < 1:
        raise UserError(f"--steps {steps}: must be 1 or more")
    if inversion_steps < 0:
        raise UserError(f"--inversion-steps {inversion_steps}: must be 0, which leaves inversion out, or more")
    if (run / "job.toml").is_file() and (task := load_job(run / "job.toml").task) not in AUDITED:
        raise UserError(f"{run}: is a run of {task}, which cannot be audited; {', '.join(AUDITED)} can")


def _members(data: Dataset, job: Job, name: str) -> tuple[Dataset, Dataset]:
    """The site's training cases, and those of the other splits that are of the kind trained on."""
    members = data.subset("train")
    outside = [i for i, sample in enumerate(data.samples) if sample.split != "train"]
    if job.task == "reconstruction":  # anomalies are fitted badly by any model
        from shared.tasks.reconstruction.metrics import normal_class

        outside = [i for i in outside if data.samples[i].target == (normal_class(job),)]
    if min(len(members), len(outside)) < FEWEST:
        raise UserError(
            f"{name}: {len(members)} images for training and {len(outside)} for validation and testing; "
            f"an audit needs {FEWEST} of each"
        )
    return members, membership.some(data, outside)


def _note(result: Audit, run: Path, others: int) -> None:
    """What a reader must know of these figures in particular."""
    job = result.job
    surveyed = [event for event in read_events(run) if event["event"] == "survey"]
    names = [place["name"] for place in surveyed[-1]["sites"]] if surveyed else []
    if names and result.site not in names:
        result.notes.append(
            f"{result.site} is not among the run's sites ({', '.join(names)}): if none of its images was trained on, "
            "an area of .5 is all that the run's model can have"
        )
    if others * membership.RATE < 1:
        result.notes.append(
            f"fewer than {1 / membership.RATE:.0f} images outside of training: at 1 % false alarms none is allowed"
        )
    if job.privacy.dp == "central":
        result.notes.append("the server's noise (privacy.dp = central) is in the run's model, not in the local models")
    if job.privacy.dp == "distributed":
        result.notes.append("privacy.dp = distributed: local models have all the noise, which in a run the sites share")
    if result.shadows and not membership.by_confidence(job):
        result.notes.append("LiRA compares the logarithm of each case's loss: there is no one class to be confident of")
    if 0 < result.shadows < membership.FEW:
        result.notes.append(f"fewer than {membership.FEW} shadow models: LiRA uses only those without the image")


def _attack_run(result: Audit, trained: TrainedModel, members: Dataset, others: Dataset) -> None:
    inside, outside = (
        membership.memory(trained.model, trained.task, data, trained.job, trained.device) for data in (members, others)
    )
    found = membership.judge(inside, outside)
    name = f"the run's (round {result.round})"
    result.membership.append(Membership("loss threshold", name, len(members), len(others), found))


def _attack_local(result: Audit, trained: TrainedModel, data: Dataset, job: Job, hear: Callable[[], None]) -> None:
    """Train the shadow models and one more, and attack each by the others."""
    task, device = trained.task, trained.device
    inside = membership.random_halves(units(data, job), len(data), result.shadows + 1, job.seed)
    values = []
    for number, row in enumerate(inside):
        rows = np.flatnonzero(row).tolist()
        model = membership.train_on(rows, task, data, job, name=f"audit-{number}", noise=result.noise, device=device)
        values.append(membership.memory(model, task, data, job, device))
        hear()
    table = np.stack(values)
    name, half = f"{len(table)} local ones", int(inside[0].sum())
    kind = "online" if result.shadows >= membership.FEW else "offline"
    for attack, found in (
        ("loss threshold", membership.threshold_attack(table, inside)),
        (f"LiRA {kind}, {result.shadows} shadows", membership.lira(table, inside)),
    ):
        result.membership.append(Membership(attack, name, half, len(data) - half, found))


# --- inversion --------------------------------------------------------------------------------------------------------


def _invertible(result: Audit) -> bool:
    if result.job.task == "classification" and not result.job.modalities:
        return True
    what = "cases of several images" if result.job.modalities else f"{result.job.task}"
    result.notes.append(f"inversion of an update is measured for classifiers of single images, not for {what}")
    return False


def _levels(job: Job, noise: float) -> list[tuple[str, float | None, bool]]:
    """The kinds of update that are inverted: in words, their noise, whether the job sends such."""
    clip = f"clipped to {job.privacy.clipping_norm:g}"
    private = is_private(job)
    plain: list[tuple[str, float | None, bool]] = [("raw gradient", None, not private), (clip, 0.0, False)]
    levels = [noise] if private else list(WOULD_BE)
    return [*plain, *((f"{clip}, noise {level:.3g}", level, private) for level in levels)]


def _invert(
    result: Audit,
    trained: TrainedModel,
    data: Dataset,
    job: Job,
    levels: list[tuple[str, float | None, bool]],
    steps: int,
    hear: Callable[[], None],
) -> None:
    """Rebuild one training image from its gradient at the job's starting weights, which everyone in a run knows."""
    import torch

    task, device = trained.task, trained.device
    model = task.build_model(job).to(device).eval()
    index = derived_seed(job.seed, "audit image") % len(data)
    batch = task.batch(data, [index], job, device, train=False)
    pictures = to_float(data.columns["image"].take(range(len(data))))
    original = pictures[[index]]
    shift, scale = shift_and_scale(original.to(device), job)
    weights = task.class_weights(task.count_classes(data, job), job)
    gradient = inversion.gradient_of(model, task, batch, job, weights)

    def add(update: str, noise: float | None, sent: bool, picture: torch.Tensor) -> None:
        figures = inversion.psnr(picture, original), inversion.correlation(picture, original)
        result.rebuilt.append(Rebuilt(update, noise, sent, *figures, picture[0].numpy()))

    result.original = original[0].numpy()
    everyone_else = (pictures.sum(0, keepdim=True) - original) / (len(data) - 1)
    add("none: the mean of the site's other images", None, False, everyone_else)
    for number, (update, noise, sent) in enumerate(levels):
        seen = gradient if noise is None else inversion.clipped(gradient, job.privacy.clipping_norm)
        if noise:
            generator = torch.Generator().manual_seed(derived_seed(job.seed, "audit noise", number))
            seen = inversion.noised(seen, noise * job.privacy.clipping_norm, generator)
        image = inversion.reconstruct(
            model, task, batch, job, weights, seen, low=-shift / scale, high=(1 - shift) / scale, steps=steps
        )
        add(update, noise, sent, (image * scale + shift).clamp(0, 1).cpu())
        hear()

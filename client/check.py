"""Are a site's images fit to join? Reads every one, counts, names what is wrong; nothing leaves the machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from shared.cases import SPLITS, Sample, SiteData
from shared.config import Job, load_job, nearest
from shared.errors import SiteRefusal, UserError
from shared.imaging.errors import CODES, UnreadableImage
from shared.imaging.read import is_image_name, read_image
from shared.samples import read_samples
from shared.settings import FORMATS
from shared.sitefile import read_site
from shared.tasks import load_task


@dataclass
class Report:
    """What the check found; ``refused`` holds the reason if the site is not fit."""

    where: str
    read: int = 0
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    images: dict[str, int] = field(default_factory=dict)
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    refused: str = ""
    labels: bool = False

    @property
    def fit(self) -> bool:
        """Whether the site may join."""
        return not self.refused

    def lines(self) -> Iterator[str]:
        """The report as a data manager reads it."""
        yield f"{self.where}: {self.read + len(self.unreadable)} files looked at, {self.read} images can be read"
        for path, code in self.unreadable:
            yield f"  cannot be read: {path}: {CODES[code]} ({code})"
        for split, counter in self.counts.items():
            listed = ", ".join(f"{name} {number}" for name, number in counter.items())
            yield f"  {split}: {self.images[split]} images{f' ({listed})' if listed else ''}"
        if not self.labels and not self.refused:
            yield "  labels were not looked at; add --job JOB.toml to check them"
        yield f"REFUSED: {self.refused}" if self.refused else "FIT to join"


def check_site(file: Path | None, data: Path | None, form: str, job_file: Path | None, limit: float | None) -> Report:
    """Check the site of a site.toml, or the images below a folder.

    Raises:
        UserError: neither or both are given, or a file is wrong.
    """
    if (file is None) == (data is None):
        raise UserError("name a site.toml, or a folder with --data FOLDER")
    if form not in (*FORMATS, "dicom"):
        raise UserError(
            f"--format {form}: must be one of {', '.join(FORMATS)}, dicom{nearest(form, [*FORMATS, 'dicom'])}"
        )
    if limit is not None and not 0 <= limit <= 1:
        raise UserError(f"--limit {limit}: must be from 0 to 1, for example 0.05 for 5 %")
    site = read_site(file) if file else SiteData("check", Path(data or "."), form)
    if not site.root.is_dir():
        raise UserError(f"{site.root}: no such folder")
    report = Report(str(file or data))
    job = load_job(job_file) if job_file else None
    if job and form != "dicom":
        _labelled(report, site, job)
    else:
        paths = sorted(path for path in site.root.rglob("*") if path.is_file())
        shown = [path for path in paths if not any(part.startswith(".") for part in path.relative_to(site.root).parts)]
        names = [path.relative_to(site.root).as_posix() for path in shown if form == "dicom" or is_image_name(path)]
        samples = [Sample(name, (), "", "") for name in names]
        _read_all(report, samples, lambda sample: _read(site.root / sample.path, sample, form == "dicom"))
    _judge(report, site.max_unreadable if limit is None else limit)
    return report


def _labelled(report: Report, site: SiteData, job: Job) -> None:
    report.labels = True
    try:
        samples = read_samples(site, job)
    except SiteRefusal as refusal:
        report.refused = str(refusal)
        return
    task = load_task(job.task)
    good = _read_all(report, samples, lambda sample: task.decode(sample, site, job))
    for split in SPLITS:
        report.images[split] = sum(sample.split == split for sample in good)
        counter = Counter(dict.fromkeys(job.classes, 0))
        named = [sample for sample in good if sample.split == split]
        counter.update(job.classes[k] for sample in named for k in sample.target if not job.labels)
        counter.update(job.classes[box[0]] for sample in named for box in sample.boxes)
        report.counts[split] = Counter({name: n for name, n in counter.items() if counter.total()})
    if not report.images["train"]:
        report.refused = "no image is in the training split"


def _read_all(report: Report, samples: list[Sample], read: Callable[[Sample], object]) -> list[Sample]:
    """Decode every sample into ``report``; gives the readable ones."""
    good = []
    for sample in samples:
        try:
            read(sample)
        except UnreadableImage as error:
            report.unreadable.append((sample.path, error.code))
        else:
            report.read += 1
            good.append(sample)
    return good


def _read(path: Path, sample: Sample, only_dicom: bool) -> None:
    if only_dicom:
        from shared.imaging.dicom import read_dicom

        read_dicom(path, sample.frame)
        return
    read_image(path, sample.frame, sample.box, sample.key or None)


def _judge(report: Report, limit: float) -> None:
    # What is no image at all (a table, a report, a plan) is named, but nobody expects to train on it.
    broken = sum(code not in ("not-dicom", "no-pixels") for _, code in report.unreadable)
    total = report.read + broken
    if report.refused:
        return
    if not total:
        report.refused = "no image was found here"
    elif broken > limit * total + 1e-9:  # 29 of 100 are not above 0.29
        share = broken / total
        report.refused = (
            f"{broken} of {total} images ({share:.0%}) cannot be read, the limit is {limit:.0%}; "
            "mend or remove them, or raise [limits] max_unreadable in site.toml"
        )

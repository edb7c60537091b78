"""Are a site's images fit to join? Reads every one, counts, names what is wrong; nothing leaves the machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from shared.cases import SPLITS, Sample, SiteData
from shared.config import Job, load_job, nearest
from shared.errors import SiteRefusal, UserError
from shared.imaging.errors import UnreadableImage, explained
from shared.imaging.nifti import is_nifti_name
from shared.imaging.read import is_image_name, read_image
from shared.imaging.scale import with_scale
from shared.imaging.video import is_video_name
from shared.imaging.volumes import read_stack
from shared.samples import read_samples
from shared.settings import FORMATS
from shared.sitefile import read_site
from shared.tasks import load_task

#: Files that no task reads as an image: without a job nobody has said that they are any.
_NO_IMAGES = ("not-dicom", "no-pixels")


class Unreadable(NamedTuple):
    """A case that cannot be read, with the code and the detail of its UnreadableImage."""

    path: str
    code: str
    detail: str


@dataclass
class Report:
    """What the check found; ``refused`` holds the reason if the site is not fit.

    ``dropped`` counts, by image, the boxes that nothing can be learnt of; ``patients`` are those with a training image;
    ``decoded`` are the bytes that the images take in the cache, 0 where no job says what is made of them.
    """

    where: str
    root: Path = Path()
    read: int = 0
    unreadable: list[Unreadable] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    images: dict[str, int] = field(default_factory=dict)
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    refused: str = ""
    labels: bool = False
    patients: int = 0
    decoded: int = 0

    @property
    def fit(self) -> bool:
        """Whether the site may join."""
        return not self.refused

    def lines(self) -> Iterator[str]:
        """The report as a data manager reads it."""
        yield from self.details()
        if not self.labels and not self.refused:
            yield "  labels were not looked at; add --job JOB.toml to check them"
        yield f"REFUSED: {self.refused}" if self.refused else "FIT to join"

    def details(self) -> Iterator[str]:
        """The report without what follows from it."""
        yield f"{self.where}: {self.read + len(self.unreadable)} files looked at, {self.read} images can be read"
        for case, times in Counter(self.unreadable).items():  # a film is looked at once for each annotated frame
            yield f"  cannot be read: {explained(*case, self.root)}" + (f" ({times} times)" if times > 1 else "")
        if self.dropped:
            names = ", ".join(list(self.dropped)[:5]) + (", …" if len(self.dropped) > 5 else "")
            yield f"  left out: {self.dropped.total()} boxes of no extent, or too small in the fitted image, in {names}"
        for split, counter in self.counts.items():
            listed = ", ".join(f"{name} {number}" for name, number in counter.items())
            yield f"  {split}: {self.images[split]} images{f' ({listed})' if listed else ''}"


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
    report = Report(str(file or data), site.root)
    job = load_job(job_file) if job_file else None
    if job and form != "dicom":
        _labelled(report, site, job)
    else:
        paths = sorted(path for path in site.root.rglob("*") if path.is_file())
        shown = [path for path in paths if not any(part.startswith(".") for part in path.relative_to(site.root).parts)]
        names = [path.relative_to(site.root).as_posix() for path in shown if form == "dicom" or _is_image(path)]
        samples = [Sample(name, (), "", "") for name in names]
        _read_all(report, samples, lambda sample: _read(site.root / sample.path, sample, form == "dicom"))
    _judge(report, site.max_unreadable if limit is None else limit)
    return report


def _labelled(report: Report, site: SiteData, job: Job) -> None:
    report.labels = True
    try:
        samples = read_samples(site, job)
        site = with_scale(samples, site, job)
        task = load_task(job.task)
        good = _read_all(report, samples, lambda sample: task.decode(sample, site, job))
    except SiteRefusal as refusal:
        report.refused = str(refusal)
        return
    report.patients = len({sample.patient for sample in good if sample.split == "train"})
    for split in SPLITS:
        report.images[split] = sum(sample.split == split for sample in good)
        counter = Counter(dict.fromkeys(job.classes, 0))
        named = [sample for sample in good if sample.split == split]
        counter.update(job.classes[k] for sample in named for k in sample.target if not job.labels)
        counter.update(job.classes[box[0]] for sample in named for box in sample.boxes)
        report.counts[split] = Counter({name: n for name, n in counter.items() if counter.total()})


def _read_all(
    report: Report, samples: list[Sample], read: Callable[[Sample], Mapping[str, Any] | None]
) -> list[Sample]:
    """Decode every sample into ``report``; gives the readable ones."""
    good = []
    for sample in samples:
        try:
            columns = read(sample) or {}
        except UnreadableImage as error:
            report.unreadable.append(Unreadable(sample.path, error.code, error.detail))
            continue
        report.read += 1
        report.decoded += sum(int(column.nbytes) for column in columns.values())
        good.append(sample)
        if "dropped" in columns and columns["dropped"].sum():
            report.dropped[sample.path] += int(columns["dropped"].sum())
    return good


def _is_image(path: Path) -> bool:
    """Whether any task reads the file as an image by itself."""
    return is_image_name(path) or is_nifti_name(path) or is_video_name(path)


def _read(path: Path, sample: Sample, only_dicom: bool) -> None:
    if only_dicom:
        from shared.imaging.dicom import read_dicom

        read_dicom(path, sample.frame)
    elif is_nifti_name(path):
        read_stack(path)
    else:
        read_image(path, sample.frame, sample.box, sample.key or None)


def _judge(report: Report, limit: float) -> None:
    # With labels every file was named as an image, and each that cannot be read counts, as when the site trains.
    broken = sum(report.labels or case.code not in _NO_IMAGES for case in report.unreadable)
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
    elif report.labels and not report.images["train"]:
        report.refused = "no image is in the training split"

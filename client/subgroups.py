"""Test figures by groups of patients, as far as the site's rules name them: who belongs to which, and what is told.

What is known of a patient stands in the site's table (columns ``sex``, ``age``, ``scanner`` or any other that the job
names), else in the DICOM header. Only the job's own words for a group, and sums over it, ever leave.

A group with fewer images than may be told of is left out. So that it does not follow from the others, which add up to
all, further groups are left out until the rest is either empty or large enough itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from client.counts import is_small
from client.policy import Policy, least_of, tells
from client.workspace import Workspace, times_looked
from shared.config import Job
from shared.errors import SiteRefusal
from shared.imaging.dataset import Dataset
from shared.imaging.dicom import patient_words
from shared.imaging.series import slice_files
from shared.samples import CASES, read_rows
from shared.sitefile import read_site
from shared.subgroups import groups_of, parse_subgroups

Groups = dict[str, list[int]]  # rows of a data set, by the key of the group


def told_groups(workspace: Workspace, job: Job, split: str) -> Groups:
    """The images of every group of the job, rows of the split; none for a group that is not told of."""
    found: Groups = {name: [] for name in groups_of(job)}
    data, policy = workspace.data.subset(split), workspace.policy
    allowed = [one for one in parse_subgroups(job.evaluation.subgroups) if tells(policy, one.name)]
    if not allowed or len(workspace.files) != 1 or workspace.told[split].small:
        return found
    paths = tuple(sample.path for sample in data.samples)
    names = tuple(one.name for one in allowed)
    known = _known(workspace.files[0], paths, names, times_looked(workspace.home))
    for one in allowed:
        groups: Groups = {}
        for row, words in enumerate(known):
            groups.setdefault(f"{one.name}={one.label_of(words[one.name])}", []).append(row)
        found |= large_enough(groups, data, job, policy)
    return found


def large_enough(groups: Mapping[str, list[int]], data: Dataset, job: Job, policy: Policy) -> Groups:
    """The groups that may be told of together; ``groups`` share all of ``data`` among them."""
    strict = replace(policy, min_cell=least_of(policy))
    shown = {name: rows for name, rows in groups.items() if not is_small(data, rows, job, strict)}
    while shown:
        rest = sorted(row for name, rows in groups.items() if name not in shown for row in rows)
        if not is_small(data, rest, job, strict):
            break
        del shown[min(shown, key=lambda name: (len(shown[name]), name))]
    return shown


@lru_cache(maxsize=8)
def _known(file: Path, paths: tuple[str, ...], names: tuple[str, ...], looked: int) -> list[dict[str, str]]:
    """What is known of the patient of each image, by the name of the dimension; "" where nothing is.

    ``looked`` is another number where a run began since: the table may have been corrected.
    """
    site = read_site(file)
    table = _table(file, paths)
    found = []
    for path in paths:
        words = {name: (table.get(path, {}).get(name) or "").strip() for name in names}
        if not all(words.values()):
            header = _header(site.root / path)
            words = {name: value or header.get(name, "") for name, value in words.items()}
        found.append(words)
    return found


def _table(file: Path, paths: Sequence[str]) -> dict[str, dict[str, str]]:
    """The rows of the site's table by the images they name, where it has a table."""
    site = read_site(file)
    if site.format == CASES:
        return {}
    try:
        _, rows = read_rows(site, [])
    except SiteRefusal:  # class folders, COCO: there is none
        return {}
    wanted, found = set(paths), dict[str, dict[str, str]]()
    for row in rows:
        low = {str(key).casefold(): value for key, value in row.items() if isinstance(value, str)}
        for key, value in row.items():
            if key and key.partition(":")[0] == "path" and value in wanted:
                found.setdefault(value, low)
    return found


def _header(path: Path) -> dict[str, str]:
    """``sex``, ``age`` and ``scanner`` of a DICOM file, or of the first in a folder."""
    if path.is_dir():
        with contextlib.suppress(OSError):
            path = next(iter(slice_files(path)), path)
    return patient_words(path)

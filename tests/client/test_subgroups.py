"""Groups of patients at the site: small ones stay, none follows from the others, and the gate looks again."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
from flwr.app import MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from client.counts import tell
from client.egress import records
from client.egress_sums import Asked, Refused, subgroup_sums
from client.policy import LEAST, Policy, read_policy
from client.subgroups import large_enough, told_groups
from client.workspace import Workspace, open_model
from shared.cases import Sample
from shared.config import Job, job_from_flat
from shared.imaging.dataset import Dataset, load_dataset
from shared.samples import read_samples
from shared.sitefile import read_site
from shared.subgroups import group_sums, groups_of
from shared.tasks import load_task
from shared.training import pick_device
from simulations.cohorts.chest import make
from tests.conftest import write_site

JOB = job_from_flat(
    {"data.classes": "left,right", "data.size": 16, "model.width": 4, "evaluation.subgroups": "sex, age=40"}
)


def policy(folder: Path, text: str) -> Policy:
    file = folder / "rules.toml"
    file.write_text(f'name = "x"\n[privacy]\n{text}\n')
    return read_policy(file)


def data_of(classes: Sequence[int]) -> Dataset:
    samples = [Sample(f"{k}.png", (target,), f"p{k}", "test") for k, target in enumerate(classes)]
    return Dataset.of(samples, image=np.zeros((len(classes), 1, 16, 16), np.uint16))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1)), min_size=1, max_size=80), st.integers(1, 9))
def test_neither_a_small_group_is_told_nor_one_that_follows_from_the_rest(
    cases: list[tuple[int, int]], min_cell: int
) -> None:
    import tempfile

    rules = policy(Path(tempfile.mkdtemp()), f"min_cell = {min_cell}")
    data = data_of([target for _, target in cases])
    groups: dict[str, list[int]] = {}
    for row, (group, _) in enumerate(cases):
        groups.setdefault(f"g{group}", []).append(row)
    shown = large_enough(groups, data, JOB, rules)
    least = max(min_cell, LEAST)

    def cells(rows: Sequence[int]) -> list[int]:
        return [sum(data.samples[row].target == (k,) for row in rows) for k in (0, 1)]

    for name, rows in shown.items():
        assert rows == groups[name]
        assert all(n == 0 or n >= least for n in cells(rows)), "a class of a few images"
    rest = [row for name, rows in groups.items() if name not in shown for row in rows]
    if shown:  # else nothing follows from anything
        assert all(n == 0 or n >= least for n in cells(rest)), "what is left out follows from the rest"


def test_large_groups_are_all_told(tmp_path: Path) -> None:
    data = data_of([0, 1] * 20)
    groups = {"a": list(range(20)), "b": list(range(20, 40))}
    assert large_enough(groups, data, JOB, policy(tmp_path, "")) == groups


# ---------------------------------------------------------------------- a real site


def site_with(folder: Path, name: str, rules: str, columns: bool = True) -> Path:
    """120 images; sex by patient, age by patient, in the table."""
    file = write_site(folder, name, 120)
    if columns:
        rows = list(csv.reader((folder / "labels.csv").open()))
        for number, row in enumerate(rows):
            row += ["Sex", "age"] if not number else ["female" if number // 8 % 2 else "M", str(20 + number * 7 % 60)]
        csv.writer((folder / "labels.csv").open("w", newline="")).writerows(rows)
    file.write_text(file.read_text() + f"[privacy]\n{rules}\n")
    return file


def workspace(file: Path, job: Job = JOB) -> Workspace:
    site, rules = read_site(file), read_policy(file)
    data = load_dataset(read_samples(site, job), site, job)
    return Workspace(site.name, file.parent, data, rules, tell(data, job, rules), (file,))


def test_the_table_says_who_is_who_and_the_rules_what_is_told(tmp_path: Path) -> None:
    own = workspace(site_with(tmp_path / "a", "a", 'subgroups = "sex"'))
    found = told_groups(own, JOB, "test")
    test = own.data.subset("test").samples
    table = {row["path"]: row for row in csv.DictReader((tmp_path / "a" / "labels.csv").open())}
    by_hand = [k for k, sample in enumerate(test) if table[sample.path]["Sex"] == "female"]
    assert found["sex=F"] == by_hand
    assert len(found["sex=F"]) + len(found["sex=M"]) == len(test) == 30
    assert not any(rows for name, rows in found.items() if name.startswith("age"))  # not named
    everything = told_groups(replace(own, policy=replace(own.policy, subgroups=("all",))), JOB, "test")
    assert sum(len(everything[name]) for name in everything if name.startswith("age")) == 30
    nothing = told_groups(replace(own, policy=replace(own.policy, subgroups=())), JOB, "test")
    assert not any(nothing.values())


def test_a_site_without_a_table_of_it_knows_nobody(tmp_path: Path) -> None:
    found = told_groups(workspace(site_with(tmp_path / "a", "a", 'subgroups = "all"', columns=False)), JOB, "test")
    assert {name for name, rows in found.items() if rows} == {"sex=other", "age=other"}


def test_the_dicom_header_says_what_the_table_does_not(tmp_path: Path) -> None:
    [folder] = make(tmp_path / "cohort", sites=1, patients=60, seed=3)
    rows = list(csv.DictReader((folder / "labels.csv").open()))
    with (folder / "labels.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["path", "label", "patient"], extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)
    (folder / "site.toml").write_text((folder / "site.toml").read_text() + '\n[privacy]\nsubgroups = "all"\n')
    job = job_from_flat({"data.classes": "normal,opacity", "data.size": 16, "data.test_fraction": 0.6,
                         "evaluation.subgroups": "sex, age=50, scanner=Phantom|Siemens"})  # fmt: skip
    own = workspace(folder / "site.toml", job)
    found = told_groups(own, job, "test")
    for name, rows_ in found.items():
        for row in rows_:
            header = pydicom.dcmread(folder / own.data.subset("test").samples[row].path, stop_before_pixels=True)
            sex, age = str(header.PatientSex), int(str(header.PatientAge)[:3])
            assert name in (f"sex={sex}", "age=<50" if age < 50 else "age=>=50", "scanner=Phantom")
    told = {name for name, rows_ in found.items() if rows_}
    assert {"sex=F", "sex=M", "scanner=Phantom"} <= told


# ---------------------------------------------------------------------- the gate


@pytest.fixture
def asked(tmp_path: Path) -> Asked:
    return Asked(JOB, workspace(site_with(tmp_path / "a", "a", 'subgroups = "sex"')), RecordDict())


def record(asked: Asked, groups: dict[str, list[int]]) -> MetricRecord:
    data, task = asked.workspace.data.subset("test"), load_task(JOB.task)

    def sums(rows: list[int]) -> dict[str, object]:
        part = Dataset({n: c.rows(rows) for n, c in data.columns.items()}, tuple(data.samples[r] for r in rows))
        return task.collect(open_model(JOB), part, JOB, pick_device(JOB))  # type: ignore[no-any-return]

    return MetricRecord(group_sums({name: sums(groups.get(name, [])) for name in groups_of(JOB)}))  # type: ignore[arg-type]


def test_the_gate_lets_the_honest_answer_out_and_builds_it_anew(asked: Asked) -> None:
    honest = record(asked, told_groups(asked.workspace, JOB, "test"))
    out = records("evaluate.subgroups", RecordDict({"metrics": honest}), asked)
    assert dict(out["metrics"]) == dict(honest)
    assert out["metrics"]["sex=F/n"] > 0


@pytest.mark.parametrize(
    ("groups", "why"),
    [({"age=<40": list(range(10))}, "does not name it"), ({"sex=F": [0, 1, 2, 3]}, "fewer images")],
)
def test_the_gate_refuses_what_the_rules_do_not_grant(asked: Asked, groups: dict[str, list[int]], why: str) -> None:
    with pytest.raises(Refused, match=why):
        subgroup_sums(record(asked, groups), asked)


def test_the_gate_refuses_figures_of_no_image_and_other_names(asked: Asked) -> None:
    honest = record(asked, told_groups(asked.workspace, JOB, "test"))
    hidden = dict(honest) | {"age=<40/loss": 3.5}
    with pytest.raises(Refused, match="no image"):
        subgroup_sums(MetricRecord(hidden), asked)  # type: ignore[arg-type]
    with pytest.raises(Refused, match="not on the list"):
        subgroup_sums(MetricRecord(dict(honest) | {"ward=7/n": 6}), asked)  # type: ignore[arg-type]

"""What a study asks for, and what is refused before anything runs."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from consilium.study.cell import stamp
from consilium.study.collect import ALONE, POOLED
from consilium.study.file import BASELINE_NAMES
from consilium.study.plan import BASELINES, FEDERATED, TRIVIAL, Plan, read_plan
from server.admission import Place
from server.sampling import sample
from shared.config import load_job
from shared.errors import UserError

JOB = "[data]\nclasses = 'left,right'\n"
HEAD = "job = 'j.toml'\ndata = 'd'\n"


def plan(folder: Path, text: str, head: str = HEAD, **more: bool) -> Plan:
    (folder / "j.toml").write_text(JOB)
    (folder / "d").mkdir(exist_ok=True)
    (folder / "s.toml").write_text(head + text)
    return read_plan(folder / "s.toml", **more)  # type: ignore[arg-type]


def kinds(found: Plan) -> Counter[str]:
    return Counter(cell.kind for cell in found.cells)


def test_every_combination_is_a_cell_and_baselines_are_run_once_for_each_seed_and_partition(tmp_path: Path) -> None:
    found = plan(
        tmp_path,
        """
        seeds = [0, 1, 2]
        [grid]
        "federation.weighting" = ["examples", "equal"]
        [[partition]]
        name = "even"
        "data.partition" = "iid"
        [[partition]]
        name = "uneven"
        data.partition = "dirichlet"
        [[privacy]]
        name = "none"
        [[privacy]]
        name = "epsilon 8"
        "privacy.dp" = "local"
        "privacy.epsilon" = 8
        "train.class_weights" = "none"
        """,
    )
    assert kinds(found) == {FEDERATED: 3 * 2 * 2 * 2, BASELINES: 3 * 2, TRIVIAL: 2}
    seeds = [cell.seed for cell in found.cells]
    assert seeds == sorted(seeds)  # broken off, there are whole seeds, and each begins with its longest cells
    assert [cell.kind for cell in found.cells[:3]].count(BASELINES) == 2
    assert found.settings == ("s, even", "s, uneven")
    assert found.methods == (
        "weighting examples, none",
        "weighting examples, epsilon 8",
        "weighting equal, none",
        "weighting equal, epsilon 8",
    )
    assert found.levels[found.settings[0], "weighting equal, epsilon 8"] == "local, epsilon 8"
    baselines = {cell.id: cell for cell in found.cells if cell.kind == BASELINES}
    for cell in found.cells:
        if cell.kind == FEDERATED:
            own = baselines[cell.baseline]
            assert (own.seed, own.setting) == (cell.seed, cell.setting)
            # A hospital alone shares nothing: neither noise nor the weights that noise asked for.
            assert own.job.privacy.dp == "none"
            assert own.job.train.class_weights == "balanced"
            assert own.job.federation.weighting == "examples"
    assert len({cell.id for cell in found.cells}) == len(found.cells)


def test_short_rounds_and_long_ones_share_baselines_and_another_rate_has_its_own(tmp_path: Path) -> None:
    found = plan(
        tmp_path,
        """
        [[variant]]
        name = "short"
        "federation.rounds" = 100
        "train.local_steps" = 1
        [[variant]]
        name = "long"
        "federation.rounds" = 20
        "train.local_steps" = 5
        [[variant]]
        name = "slow"
        "federation.rounds" = 100
        "train.learning_rate" = 0.0001
        """,
    )
    own = {cell.method: cell.baseline for cell in found.cells if cell.kind == FEDERATED}
    assert own["short"] == own["long"] != own["slow"]
    assert {cell.method for cell in found.cells if cell.kind == BASELINES} == {
        "learning rate 0.004",
        "learning rate 0.0001",
    }


def test_a_cell_is_the_job_that_simulate_would_run(tmp_path: Path) -> None:
    found = plan(tmp_path, "seeds = [7]\n[grid]\n'train.local_steps' = [3]\n[set]\nmodel.width = 8\n")
    (cell,) = (cell for cell in found.cells if cell.kind == FEDERATED)
    settings = ["train.local_steps=3", "model.width=8", "seed=7", "name='s, local steps 3'"]
    assert cell.job == load_job(tmp_path / "j.toml", settings)


def test_each_seed_may_deal_the_images_out_anew(tmp_path: Path) -> None:
    text = "seeds = [3, 4]\nredraw = true\n[set]\n'data.partition' = 'dirichlet'\n"
    found = plan(tmp_path, text)
    assert {cell.job.data.partition_seed for cell in found.cells} == {3, 4}
    assert kinds(found)[TRIVIAL] == 2
    assert {cell.job.data.partition_seed for cell in plan(tmp_path, text.replace("true", "false")).cells} == {0}


def test_quick_takes_two_seeds_and_a_few_rounds_of_every_cell(tmp_path: Path) -> None:
    found = plan(tmp_path, "seeds = [0, 1, 2]\n", quick=True)
    assert found.seeds == (0, 1)
    assert {cell.job.federation.rounds for cell in found.cells} == {4}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed = [0]", "unknown key 'seed' (did you mean 'seeds'?)"),
        ("seeds = []", "seeds = []: must be a list of whole numbers"),
        ("seeds = [1, 1]", "a seed stands there twice"),
        ("[grid]\n'federation.stratgy' = ['fedavg']", "(did you mean 'federation.strategy'?)"),
        ("[grid]\n'train.local_steps' = 3", "must be a list of values"),
        ("[grid]\n'train.local_steps' = [1, -3]", "s.toml: local steps -3: train.local_steps = -3: must be from 1 to"),
        ("[grid]\nseed = [0, 1]", "[grid] seed: is set by seeds = [0, 1, 2]"),
        ("[[variant]]\n'train.local_steps' = 3", "[[variant]]: each needs a name"),
        ("[[variant]]\nname = 'v'\n'train.local_steps' = [3]", "one value, not a list; lists stand in [grid]"),
        ("variant = 3", "write it as [[variant]]"),
        (
            "[grid]\n'train.local_steps' = [3]\n[[variant]]\nname = 'v'\n'train.local_steps' = 2",
            "train.local_steps stands in more than one of [grid], [[variant]] and [[privacy]]",
        ),
        ("[[variant]]\nname = 'pooled'", "a method would be called 'pooled', as are baselines; give it another name"),
        ("[[variant]]\nname = 'alone (small)'", "a method would be called 'alone (small)', as are baselines"),
        (
            "[grid]\n'federation.strategy' = ['fedavg', 'fedadam']\n'federation.server_optimizer' = ['none', 'adam']",
            'federation.server_optimizer = "none": fedadam stands for "adam"',
        ),
        ("redraw = 1", "must be true or false"),
        ("target = 'high'", "target = 'high': must be a number"),
        ("[[dataset]]\nname = 'x'", "name either one job, and its data, or several with [[dataset]]"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        plan(tmp_path, text)
    assert str(caught.value).startswith(str(tmp_path / "s.toml"))
    assert "\n" not in str(caught.value)


def test_missing_images_are_said_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such folder of images"):
        plan(tmp_path, "", head="job = 'j.toml'\ndata = 'nowhere'\n")
    with pytest.raises(UserError, match="name its images"):
        plan(tmp_path, "", head="job = 'j.toml'\n")


def test_several_data_sets_have_settings_of_their_own(tmp_path: Path) -> None:
    head = "seeds = [0]\n"
    sets = "[[dataset]]\nname = 'x'\njob = 'j.toml'\ndata = 'd'\n[[dataset]]\nname = 'y'\njob = 'j.toml'\ndata = 'd'\n"
    found = plan(tmp_path, sets + "'model.width' = 8\n", head=head)
    assert {cell.setting: cell.job.model.width for cell in found.cells} == {"x": 24, "y": 8}


def test_what_cannot_be_compared_or_told_apart_is_refused(tmp_path: Path) -> None:
    (tmp_path / "j.toml").write_text(JOB)
    with pytest.raises(UserError, match=r"evaluation\.best_metric cannot be compared"):
        plan(tmp_path, "[grid]\n'evaluation.best_metric' = ['auroc', 'loss']\n")
    one = "[[dataset]]\nname = 'chest'\njob = 'j.toml'\ndata = 'd'\n"
    with pytest.raises(UserError, match="have one name"):
        plan(tmp_path, one * 2, head="")


def test_each_data_set_has_the_level_of_privacy_of_its_own_job(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text(JOB + "[privacy]\ndp = 'local'\nepsilon = 8.0\n[train]\nclass_weights = 'none'\n")
    jobs = {"open": "j", "hid": "p"}
    sets = "".join(f"[[dataset]]\nname = '{name}'\njob = '{job}.toml'\ndata = 'd'\n" for name, job in jobs.items())
    found = plan(tmp_path, "[grid]\n'federation.strategy' = ['fedavg', 'fedprox']\n" + sets, head="")
    assert {found.levels["open", name] for name in found.methods} == {""}
    assert {found.levels["hid", name] for name in found.methods} == {"local, epsilon 8"}


def test_a_buffered_federation_is_held_against_models_of_as_many_steps_as_its_own(tmp_path: Path) -> None:
    found = plan(tmp_path, "[grid]\n'federation.strategy' = ['fedavg', 'fedbuff']\n")
    baselines = {cell.id: cell.job.federation for cell in found.cells if cell.kind == BASELINES}
    own = {cell.method: baselines[cell.baseline] for cell in found.cells if cell.kind == FEDERATED}
    assert {name: job.order for name, job in own.items()} == {
        name: "buffered" if "fedbuff" in name else "parallel" for name in own
    }


def test_a_robust_federation_on_a_share_of_its_sites_is_held_against_as_many_steps(tmp_path: Path) -> None:
    robust = "aggregator = 'krum'\nbyzantine = 2\n"
    found = plan(tmp_path, f"[[variant]]\nname = 'a'\n[variant.federation]\n{robust}fraction = 0.1\n")
    jobs = {cell.kind: cell.job for cell in found.cells}
    sites = [Place(node, f"s{node}", {"train": 5}, [], 0) for node in range(9)]
    drawn = {kind: len(sample(sites, jobs[kind], 1, {})) for kind in (BASELINES, FEDERATED)}
    assert drawn == {BASELINES: 7, FEDERATED: 7}


def test_the_names_of_baselines_are_those_that_no_method_may_have() -> None:
    assert BASELINE_NAMES == (TRIVIAL, POOLED, ALONE)


def test_the_images_of_a_cell_are_others_once_a_file_is_and_not_for_another_way_to_name_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "d" / "deeper").mkdir(parents=True)
    (tmp_path / "d" / "deeper" / "a.png").write_bytes(b"a")
    out = tmp_path / "d" / "studies"
    first = stamp(tmp_path / "d", out)
    monkeypatch.chdir(tmp_path)
    out.mkdir()
    (out / "study.csv").write_text("ours")
    (tmp_path / "d" / "study.toml").write_text("seeds = [0]")
    (tmp_path / "d" / ".consilium").mkdir()
    (tmp_path / "d" / ".consilium" / "cache").write_text("ours")
    assert stamp(Path("d"), Path("d/studies")) == first
    (tmp_path / "d" / "site.toml").write_text("name = 'a'")
    second = stamp(tmp_path / "d", out)
    (tmp_path / "d" / "deeper" / "a.png").write_bytes(b"other")
    assert len({first, second, stamp(tmp_path / "d", out)}) == 3

"""The job file: defaults, validation, the round trip through TOML, and the hash."""

from __future__ import annotations

import hashlib
import json
import math
import re
import string
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.config import Job, job_from_flat, knobs, load_job, parse_override
from shared.errors import UserError
from shared.tasks import TASKS


def refused(flat: dict[str, Any]) -> str:
    """The one line with which a job is refused."""
    with pytest.raises(UserError) as caught:
        job_from_flat(flat)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def pyproject(root: Path) -> dict[str, Any]:
    tables = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["flwr"]["app"]["config"]
    flat = {key: value for key, value in tables.items() if not isinstance(value, dict)}
    for name, table in tables.items():
        if isinstance(table, dict) and name != "run":
            flat |= {f"{name}.{key}": value for key, value in table.items()}
    return flat


def test_every_default_stands_in_pyproject_and_nothing_else_does(root: Path) -> None:
    expected = pyproject(root)
    flat = Job().flat()
    assert flat == expected
    assert {key: type(value) for key, value in flat.items()} == {key: type(value) for key, value in expected.items()}


def test_every_setting_has_one_line_of_help_and_an_allowed_default() -> None:
    found = knobs()
    assert list(found) == list(Job().flat())
    for key, item in found.items():
        meta = item.metadata
        assert meta["help"], key
        assert "\n" not in meta["help"], key
        assert job_from_flat({key: item.default}) == Job()


def test_no_settings_at_all_are_the_default_job_and_run_keys_are_passed_over() -> None:
    assert job_from_flat({}) == Job()
    assert job_from_flat({"run.out": "/tmp/x", "run.sites": "y"}) == Job()


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("train.local_step", "train.local_steps"),
        ("train.learningrate", "train.learning_rate"),
        ("model.nam", "model.name"),
        ("federation.round", "federation.rounds"),
        ("sede", "seed"),
    ],
)
def test_an_unknown_key_names_the_nearest_one(wrong: str, right: str) -> None:
    text = refused({wrong: 1})
    assert repr(wrong) in text
    assert f"did you mean '{right}'" in text


def test_an_unknown_key_like_nothing_else_guesses_nothing() -> None:
    text = refused({"qqqq.zzzz": 1})
    assert "'qqqq.zzzz'" in text
    assert "did you mean" not in text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.local_steps", True),
        ("train.local_steps", 3.0),
        ("train.local_steps", "3"),
        ("seed", None),
        ("train.learning_rate", "0.1"),
        ("train.learning_rate", False),
        ("data.multilabel", 1),
        ("data.multilabel", "true"),
        ("data.classes", ["a", "b"]),
        ("name", 7),
        ("model", 3),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_its_key(key: str, value: object) -> None:
    assert key in refused({key: value})


def company(key: str, value: Any) -> dict[str, Any]:
    """Other settings without which a setting is refused: its task, those of privacy (test_privacy_settings.py)."""
    if tasks := knobs()[key].metadata["tasks"]:
        return {"task": tasks[0]}
    if key in ("privacy.epsilon", "privacy.noise_multiplier"):
        both = {"privacy.epsilon": 1.0, "privacy.noise_multiplier": 1.0}
        return {"privacy.dp": "local", "train.class_weights": "none"} | both
    if key in ("federation.server_learning_rate", "federation.server_schedule"):
        return {"federation.server_optimizer": "adam"}
    if key == "data.landmarks":
        return {"data.harmonise": "nyul", key: "0.01 .1 .2 .3 .4 .5 .6 .7 .8 .9 .99"}
    if key == "privacy.secure_aggregation":
        return {"federation.max_update_norm": 1.0}
    if key != "privacy.dp" or value == "none":
        return {}
    return {
        "privacy.epsilon": 1.0,
        "privacy.secure_aggregation": value != "central",
        "federation.max_update_norm": 1.0,
        "train.class_weights": "none",
        "train.optimizer": "sgd",
        "federation.weighting": "equal",
    }


@pytest.mark.parametrize(
    "key", [key for key, item in knobs().items() if isinstance(item.default, float) and item.metadata["low"] == 0.0]
)
def test_a_whole_number_is_taken_where_a_number_is_wanted(key: str) -> None:
    value = job_from_flat(company(key, 0) | {key: 0}).flat()[key]
    assert value == 0.0
    assert type(value) is float


BOUNDED = {key: item for key, item in knobs().items() if type(item.default) in (int, float)}


@pytest.mark.parametrize("key", BOUNDED)
def test_a_number_outside_its_range_is_refused_and_its_ends_are_allowed(key: str) -> None:
    meta, kind = BOUNDED[key].metadata, type(BOUNDED[key].default)
    for end, beyond in ((meta["low"], -1), (meta["high"], 1)):
        if end is None:
            continue
        rest = {"data.val_fraction": 0.0, "data.test_fraction": 0.0}  # their sum is bounded too
        rest |= company(key, end)
        assert job_from_flat(rest | {key: kind(end)}).flat()[key] == end
        outside = kind(end) + beyond if kind is int else math.nextafter(end, beyond * math.inf)
        assert key in refused({key: outside})
    if kind is float:
        assert key in refused({key: math.nan})


@pytest.mark.parametrize("key", [key for key, item in knobs().items() if item.metadata["choices"]])
def test_a_choice_takes_each_of_its_words_and_no_other(key: str) -> None:
    choices = knobs()[key].metadata["choices"]
    for word in choices:
        # A layout of images is one of those that the task reads.
        task = {"task": next(t for t in TASKS if word in (*TASKS[t].formats, "cases"))} if key == "data.format" else {}
        assert job_from_flat(task | company(key, word) | {key: word}).flat()[key] == word
    near = choices[0] + "x"
    text = refused({key: near})
    assert key in text
    assert all(word in text for word in choices)
    assert f"did you mean {choices[0]!r}" in text


@pytest.mark.parametrize(
    ("flat", "words"),
    [
        ({"data.classes": "one"}, "data.classes"),
        ({"data.classes": " , "}, "data.classes"),
        ({"data.classes": "a,b,a"}, "twice"),
        ({"data.classes": "", "data.multilabel": True}, "data.classes"),
        ({"evaluation.best_metric": "auc"}, "auroc"),
        ({"data.val_fraction": 0.5, "data.test_fraction": 0.5}, "data.val_fraction"),
        ({"data.labels": "sick,well,sick"}, "data.labels"),
        ({"data.modalities": "t1,t1"}, "data.modalities"),
        ({"data.tabular": "age,age"}, "data.tabular"),
        ({"data.format": "voc"}, "data.format"),
        ({"task": "detection", "data.format": "npz"}, "data.format"),
        ({"task": "segmentation", "evaluation.best_metric": "map50"}, "dice"),
        ({"task": "segmentation", "data.classes": ","}, "data.classes"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(flat: dict[str, Any], words: str) -> None:
    assert words in refused(flat)


def test_one_label_is_enough_where_several_may_hold() -> None:
    assert job_from_flat({"data.classes": "finding", "data.multilabel": True}).classes == ("finding",)


@pytest.mark.parametrize("task", TASKS)
def test_the_best_round_is_picked_by_the_tasks_first_metric_or_any_other_of_its_own(task: str) -> None:
    metrics = list(TASKS[task].metrics)
    assert job_from_flat({"task": task}).best_metric == metrics[0]
    for metric in metrics:
        assert job_from_flat({"task": task, "evaluation.best_metric": metric}).best_metric == metric


def test_class_names_are_stripped_and_kept_in_order() -> None:
    assert job_from_flat({"data.classes": " b , a,ä b ,"}).classes == ("b", "a", "ä b")


# --- round trip -------------------------------------------------------------------------------------------------------

# Any text a TOML file can hold: all of Unicode but lone surrogates.
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


def values_of(key: str) -> st.SearchStrategy[Any]:
    item = knobs()[key]
    meta, kind = item.metadata, type(item.default)
    if meta["choices"]:
        return st.sampled_from(meta["choices"])
    if kind is bool:
        return st.booleans()
    if kind is int:
        return st.integers(int(meta["low"]), int(meta["high"]) if meta["high"] is not None else 2**62)
    if kind is float:
        return st.floats(meta["low"], meta["high"] if meta["high"] is not None else 1e300)
    return ANY_TEXT


FREE = [key for key in knobs() if key not in ("data.classes", "evaluation.best_metric")]
# Few keys at a time: every key is met, and hypothesis can name the one that fails.
JOBS = st.lists(st.sampled_from(FREE), unique=True, max_size=6).flatmap(
    lambda keys: st.fixed_dictionaries({key: values_of(key) for key in keys})
)
CLASSES = st.lists(
    ANY_TEXT.map(lambda text: text.replace(",", "").strip()).filter(bool), min_size=2, max_size=4, unique=True
)


@settings(max_examples=150, deadline=None)
@given(flat=JOBS, classes=CLASSES)
def test_a_job_written_as_toml_reads_back_equal_with_an_equal_hash(
    tmp_path_factory: pytest.TempPathFactory, flat: dict[str, Any], classes: list[str]
) -> None:
    flat = flat | {"data.classes": ",".join(classes)}
    try:
        job = job_from_flat(flat)
    except UserError:
        return  # settings that do not go together
    path = tmp_path_factory.getbasetemp() / "round.toml"
    path.write_text(job.toml(), encoding="utf-8", newline="\n")
    again = load_job(path)
    assert again == job
    assert again.sha256 == job.sha256
    assert again.classes == tuple(classes)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", 'quotes " and \\ and \t'),
        ("name", "Lungenröntgen 肺 😀"),
        ("name", "delete \x7f"),
        ("federation.round_timeout", math.inf),
        ("train.learning_rate", 1e-5),
    ],
)
def test_odd_values_that_are_allowed_survive_the_round_trip(tmp_path: Path, key: str, value: Any) -> None:
    """Or are refused at once: a job that cannot be written down must not run."""
    try:
        job = job_from_flat({key: value})
    except UserError:
        return
    (tmp_path / "job.toml").write_text(job.toml(), encoding="utf-8")
    assert load_job(tmp_path / "job.toml") == job


def other(key: str) -> Any:
    """Another allowed value than the default."""
    item = knobs()[key]
    if item.metadata["choices"]:
        return next((word for word in item.metadata["choices"] if word != item.default), None)
    special: dict[str, Any] = {"evaluation.best_metric": "loss", "data.channels": 3, "data.classes": "abnormal,normal"}
    special |= {"privacy.delta": 1e-6, "evaluation.subgroups": "sex"}
    special |= {"data.harmonise": "polarity,zscore", "data.landmarks": ".1 .2 .25 .3 .4 .5 .6 .7 .8 .85 .9"}
    if key in special:
        return special[key]
    if isinstance(item.default, bool):
        return not item.default
    if isinstance(item.default, str):
        return item.default + "x"
    step = 1 if isinstance(item.default, int) else 0.25
    high = item.metadata["high"]
    return item.default + step if high is None or item.default + step <= high else item.default - step


@pytest.mark.parametrize("key", [key for key in knobs() if other(key) is not None])
def test_the_hash_changes_with_every_setting(key: str) -> None:
    rest = company(key, other(key))
    changed = job_from_flat(rest | {key: other(key)})
    plain = job_from_flat(rest) if key != "privacy.dp" else Job()
    assert changed.sha256 != plain.sha256
    again = {name.replace(".", "__"): value for name, value in (rest | {key: other(key)}).items()}
    assert changed.sha256 == Job().replace(**again).sha256


def test_the_hash_does_not_depend_on_how_the_file_is_written(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('name = "x"\nseed = 3\n[train]\nlearning_rate = 1\nlocal_steps = 7\n')
    (tmp_path / "b.toml").write_text(
        '# a comment\ntrain = {local_steps = 0x7, learning_rate = 1.0}\nseed = 3\nname = "x"\n[run]\nout = "there"\n'
    )
    assert load_job(tmp_path / "a.toml").sha256 == load_job(tmp_path / "b.toml").sha256


# --- files and overrides ----------------------------------------------------------------------------------------------


def test_a_file_without_a_name_is_named_after_itself(tmp_path: Path) -> None:
    (tmp_path / "chest.toml").write_text("seed = 1\n")
    assert load_job(tmp_path / "chest.toml").name == "chest"
    assert load_job(tmp_path / "chest.toml", ["name=other"]).name == "other"


def test_overrides_win_over_the_file_and_the_last_one_over_the_others(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text('seed = 1\n[model]\nname = "resnet18"\n')
    job = load_job(tmp_path / "job.toml", ["seed=2", "seed = 3", "train.learning_rate=1e-3", "data.multilabel=true"])
    assert (job.seed, job.train.learning_rate, job.data.multilabel, job.model.name) == (3, 1e-3, True, "resnet18")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.b=3", ("a.b", 3)),
        ("a=3.0", ("a", 3.0)),
        ("a=true", ("a", True)),
        ('a="3"', ("a", "3")),
        ("a=normal,abnormal", ("a", "normal,abnormal")),
        (" a = some words ", ("a", "some words")),
        ("a=x=y", ("a", "x=y")),
        ("a=", ("a", "")),
    ],
)
def test_an_override_is_toml_or_a_plain_word(text: str, expected: tuple[str, object]) -> None:
    assert parse_override(text) == expected


@pytest.mark.parametrize("text", ["seed", "=3", ""])
def test_an_override_without_key_or_value_shows_how_to_write_it(text: str) -> None:
    with pytest.raises(UserError, match="key=value"):
        parse_override(text)


def test_a_bad_override_names_its_key_and_not_the_file(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text("")
    with pytest.raises(UserError) as caught:
        load_job(tmp_path / "job.toml", ["train.local_steps=many"])
    assert str(caught.value).startswith("train.local_steps = 'many'")


@pytest.mark.parametrize(
    "content",
    [b"seed = ", b"seed = 'x'", b"[train]\nlocal_step = 3", b"\xff\xfe\x00", b"a = 1\na = 2"],
    ids=["not toml", "wrong type", "unknown key", "not utf-8", "key twice"],
)
def test_a_bad_file_is_named_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_job(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_or_is_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "no.toml", tmp_path, tmp_path / "file" / "job.toml"):
        with pytest.raises(UserError, match=re.escape(str(path))):
            load_job(path)


@settings(max_examples=30)
@given(st.text(string.ascii_lowercase + "._", min_size=1, max_size=20))
def test_any_unknown_key_gives_one_line_that_names_it(key: str) -> None:
    if key not in knobs() and not key.startswith("run."):
        assert repr(key) in refused({key: 1})


def test_the_hash_is_sha256_over_sorted_json_of_all_settings() -> None:
    job = job_from_flat({"name": "ü"})
    text = json.dumps({key: job.flat()[key] for key in sorted(job.flat())})
    assert job.sha256 == hashlib.sha256(text.encode("ascii")).hexdigest()


# --- secure aggregation -----------------------------------------------------------------------------------------------


def test_secure_aggregation_needs_a_norm_to_clip_to() -> None:
    assert "federation.max_update_norm" in refused({"privacy.secure_aggregation": True})
    job_from_flat({"privacy.secure_aggregation": True, "federation.max_update_norm": 0.5})


def test_what_needs_single_replies_is_refused_together_with_secure_aggregation() -> None:
    secure = {"privacy.secure_aggregation": True, "federation.max_update_norm": 0.5}
    noised = {"privacy.epsilon": 1.0, "train.class_weights": "none"}
    text = refused(secure | noised | {"privacy.dp": "central"})
    assert text.startswith('privacy.dp = "central"')
    assert "privacy.secure_aggregation" in text
    job_from_flat(noised | {"privacy.dp": "central"})
    job_from_flat(secure | noised | {"privacy.dp": "local"})


@pytest.mark.parametrize("key", [key for key, item in knobs().items() if item.metadata["tasks"]])
def test_what_a_task_would_pass_over_is_refused(key: str) -> None:
    value, tasks = other(key), knobs()[key].metadata["tasks"]
    for task in TASKS:
        asked = {"task": task, key: value}
        if task not in tasks:
            assert f"{key} = {value!r}: {task} does not read it, only {', '.join(tasks)}" in refused(asked)
            assert job_from_flat({"task": task, key: knobs()[key].default})
        else:
            assert job_from_flat(asked).flat()[key] == value

"""A whole secure round between the real server part and the real site parts, handed over without processes or network:
the sum, every pattern of lost sites, replies that are not in order."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client import secure
from client.policy import Policy
from client.workspace import Workspace
from server.admission import Place
from server.aggregation import weighted_mean
from server.secure import Content, SecureRound
from shared.config import Job, job_from_flat
from shared.errors import SiteRefusal
from shared.fixedpoint import change, clip, worst_error
from shared.imaging.dataset import Dataset
from shared.masking import SEED, threshold
from shared.sitefile import PRIVACY

STAGES = ("train.keys", "train.shares", "train.masked", "train.unmask")
BOUND = 5.0
POLICY = Policy(metrics=(), **{name: value for name, value in PRIVACY.items() if name != "metrics"})  # type: ignore[arg-type]
Twist = Callable[[str, str, RecordDict], RecordDict]
Before = dict[str, torch.Tensor]
JOB = job_from_flat(
    {"privacy.secure_aggregation": True, "privacy.secure_share": 0.6, "federation.max_update_norm": BOUND}
)


@pytest.fixture(autouse=True)
def _sender() -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


def model(seed: int) -> Before:
    generator = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(3, 2, generator=generator) * 0.2,
        "bn.running_mean": torch.randn(2, generator=generator) * 0.1,
        "bn.running_var": torch.rand(2, generator=generator) + 0.5,
        "count": torch.tensor(seed % 4),
    }


_runs = itertools.count(1)


class Federation:
    """Sites that answer by ``client.secure``; ``lost`` gives the stage (0 to 3) from which a site is silent."""

    def __init__(
        self, home: Path, count: int, lost: Mapping[str, int] | None = None, twist: Twist | None = None, job: Job = JOB
    ) -> None:
        self.home, self.job, self.lost, self.twist = home, job, lost or {}, twist
        names = [f"s{number:02}" for number in range(count)]
        self.places = [Place(n, name, {"train": 10 + 3 * n}, [], 0) for n, name in enumerate(names, start=1)]
        self.models = {name: model(number) for number, name in enumerate(names, start=100)}
        run = next(_runs)  # a site remembers of a run in which round it told its shares
        self.contexts = {n: Context(run, n, {}, RecordDict(), {}) for n in range(1, count + 1)}
        self.before = model(7)
        self.sent: dict[str, dict[str, RecordDict]] = {stage: {} for stage in STAGES}

    def exchange(
        self, kind: str, content: Content, places: Iterable[Place], round_: int
    ) -> Iterator[tuple[Place, Message | None]]:
        for place in places:
            message = Message(content(place) if callable(content) else content, place.node, kind, group_id=str(round_))
            if self.lost.get(place.name, 9) <= STAGES.index(kind):
                yield place, None
                continue
            answer = self.answer(kind, place, message)
            self.sent[kind][place.name] = answer
            yield place, Message(self.twist(kind, place.name, answer) if self.twist else answer, reply_to=message)

    def answer(self, kind: str, place: Place, message: Message) -> RecordDict:
        stage = {
            "train.keys": secure.keys,
            "train.shares": secure.shares,
            "train.masked": secure.masked(self.train(place)),
            "train.unmask": secure.unmask,
        }[kind]
        workspace = Workspace(place.name, self.home / place.name, Dataset.of(()), POLICY, {})
        try:
            content = stage(message, self.contexts[place.node], self.job, workspace)
            content["status"] = ConfigRecord({"site": place.name, "ok": True, "code": ""})
        except SiteRefusal as refusal:
            content = RecordDict({"status": ConfigRecord({"site": place.name, "ok": False, "code": refusal.code})})
        return content

    def train(self, place: Place) -> secure.Train:
        def trained(*_: object) -> RecordDict:
            metrics = {"num-examples": place.images["train"], "images": 8, "loss": 4.0 * place.node}
            return RecordDict({"arrays": ArrayRecord(self.models[place.name]), "metrics": MetricRecord(metrics)})  # type: ignore[arg-type]

        return trained

    def round(self, number: int = 1) -> tuple[SecureRound, Before]:
        round_ = SecureRound(
            self.exchange, self.places, self.before, ConfigRecord({"round": number}), self.job, ["the whole"]
        )
        return round_, round_.run()

    def check(self, result: Before, names: list[str], sharing: int) -> None:
        """``result`` is the plain mean of the clipped models of ``names``, within the stated error."""
        equal = self.job.federation.weighting == "equal"
        weights = {place.name: 1.0 if equal else float(place.images["train"]) for place in self.places}
        assert all(clip(change(self.before, self.models[name]), BOUND) < BOUND for name in names)  # none is cut here
        plain = weighted_mean((weights[name], self.models[name]) for name in names)
        most = max(weights[name] for name in [*names, *self.sharing()])
        relative = sum(weights[name] / most for name in names)
        error = worst_error(BOUND, sharing, len(names), relative * (1 - 1e-6))
        for name, value in plain.items():
            room = error * (1 + 2 * BOUND) if "var" in name else error
            room += 2e-7 * float(value.abs().max())
            assert float((result[name].double() - value.double()).abs().max()) <= (room if "count" not in name else 0)

    def sharing(self) -> list[str]:
        return [place.name for place in self.places if self.lost.get(place.name, 9) > 1]


def expected(federation: Federation, count: int) -> tuple[list[str], int, int]:
    """Whose models should be in the sum, of how many in the masks, and how many were needed; [] if too few lasted."""
    last = {place.name: federation.lost.get(place.name, 9) for place in federation.places}
    there = [[name for name, stage in last.items() if stage > done] for done in range(4)]
    needed = threshold(len(there[0]), federation.job.privacy.secure_share) if len(there[0]) > 1 else 2
    enough = len(there[0]) >= 2 and all(len(names) >= needed for names in there[1:])
    return (there[2] if enough else []), len(there[1]), needed


def verify(federation: Federation, count: int) -> None:
    names, sharing, needed = expected(federation, count)
    round_, result = federation.round()
    if names:
        federation.check(result, names, sharing)
        assert round_.left == len(names) >= needed
        assert [row["site"] for row in round_.trained] == names
    else:
        assert round_.left < round_.needed
        assert result is federation.before
        assert not round_.trained
    lost = {name: stage for name, stage in federation.lost.items() if stage < 3}
    reached = {row["site"] for row in round_.dropped}
    assert reached <= set(lost)
    if names:
        assert reached == set(lost)
        assert {row["site"] for row in round_.facts["silent"]} == set(federation.lost) - set(lost)
        for stage, others in enumerate(STAGES[1:], start=1):  # who is gone is not asked again
            assert set(federation.sent[others]) == {n for n in federation.models if federation.lost.get(n, 9) > stage}


# ---------------------------------------------------------------------- the sum, and lost sites


@pytest.mark.parametrize("count", range(2, 17))
def test_the_sum_is_the_plain_sum_for_2_to_16_sites(count: int, tmp_path: Path) -> None:
    federation = Federation(tmp_path, count)
    round_, result = federation.round()
    federation.check(result, list(federation.models), count)
    assert round_.dropped == round_.facts["silent"] == []
    assert round_.facts["images"] == 8 * count
    mean = np.mean([4.0 * place.node / 8 for place in federation.places])
    assert round_.facts["loss"] / round_.facts["images"] == pytest.approx(mean, rel=1e-4)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_every_pattern_of_lost_sites(count: int, tmp_path: Path) -> None:
    """Before its keys, after its keys, after its shares, after its masked model, or never: 5 to the power of sites."""
    for pattern in itertools.product((0, 1, 2, 3, 9), repeat=count):
        lost = {f"s{number:02}": stage for number, stage in enumerate(pattern) if stage < 9}
        verify(Federation(tmp_path, count, lost), count)


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_loss_of_5_to_16_sites(data: st.DataObject, tmp_path: Path) -> None:
    count = data.draw(st.integers(5, 16))
    stages = st.sampled_from((9, 9, 9, 9, 0, 1, 2, 3))
    lost = {f"s{n:02}": stage for n in range(count) if (stage := data.draw(stages)) < 9}
    verify(Federation(tmp_path, count, lost), count)


def test_all_sites_count_the_same_where_the_job_says_so(tmp_path: Path) -> None:
    federation = Federation(tmp_path, 4, {"s01": 2}, job=JOB.replace(federation__weighting="equal"))
    round_, result = federation.round()
    federation.check(result, ["s00", "s02", "s03"], 4)
    assert {row["weight"] for row in round_.trained} == {1.0}


def test_a_long_change_is_clipped_at_the_site(tmp_path: Path) -> None:
    federation = Federation(tmp_path, 2)
    for name in federation.models:
        federation.models[name] = federation.before | {"w": federation.before["w"] + 1000.0}
    _, result = federation.round()
    moved = np.concatenate([(result[name].double() - federation.before[name].double()).ravel() for name in result])
    assert np.linalg.norm(moved) == pytest.approx(BOUND, rel=1e-6)


def test_the_quorum_of_the_job_holds_beside_the_threshold(tmp_path: Path) -> None:
    federation = Federation(tmp_path, 5, {"s00": 2}, job=JOB.replace(federation__min_sites=5))
    round_, result = federation.round()
    assert (round_.left, round_.needed) == (4, 5)
    assert result is federation.before


def test_rounds_follow_each_other_with_fresh_masks(tmp_path: Path) -> None:
    federation = Federation(tmp_path, 3)
    sent = []
    for number in (1, 2):
        federation.check(federation.round(number)[1], list(federation.models), 3)
        sent.append(federation.sent["train.masked"]["s00"]["arrays"]["masked"].numpy())
    assert np.mean(sent[0] == sent[1]) < 0.1


# ---------------------------------------------------------------------- replies that are not in order


def reply_with(kind: str, name: str, change_: Callable[[RecordDict], None]) -> Twist:
    def twist(stage: str, site: str, answer: RecordDict) -> RecordDict:
        if (stage, site) == (f"train.{kind}", name):
            change_(answer)
        return answer

    return twist


def put_array(values: Callable[[np.ndarray], np.ndarray]) -> Callable[[RecordDict], None]:
    def edit(answer: RecordDict) -> None:
        vector = answer["arrays"]["masked"].numpy()
        answer["arrays"] = ArrayRecord({"masked": Array(np.ascontiguousarray(values(vector)))})

    return edit


def put_bytes(record: str, key: str, value: object) -> Callable[[RecordDict], None]:
    def edit(answer: RecordDict) -> None:
        answer[record][key] = value  # type: ignore[index]

    return edit


def lacks(record: str) -> Callable[[RecordDict], None]:
    return lambda answer: answer.pop(record)  # type: ignore[return-value]


FAULTS: dict[str, tuple[str, Callable[[RecordDict], None], str]] = {
    "too long": ("masked", put_array(lambda v: np.append(v, v[:1])), "wrong-shape"),
    "too short": ("masked", put_array(lambda v: v[1:]), "wrong-shape"),
    "one column": ("masked", put_array(lambda v: v[:, None]), "wrong-shape"),
    "floats": ("masked", put_array(lambda v: v.astype(np.float32)), "wrong-dtype"),
    "signed": ("masked", put_array(lambda v: v.view(np.int32)), "wrong-dtype"),
    "no array": ("masked", lacks("arrays"), "wrong-records"),
    "no keys": ("keys", lacks("keys"), "wrong-records"),
    "short key": ("keys", put_bytes("keys", "mask", b"k" * 31), "wrong-shape"),
    "a key that is none": ("keys", put_bytes("keys", "seal", bytes(32)), "bad-keys"),
    "too few shares": ("shares", put_bytes("shares", "sealed", [b""]), "wrong-shape"),
    "shares of wrong length": ("shares", put_bytes("shares", "sealed", [b"x"] * 5), "wrong-shape"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_reply_out_of_order_drops_its_site_and_its_masks_leave_the_sum(fault: str, tmp_path: Path) -> None:
    kind, edit, reason = FAULTS[fault]
    federation = Federation(tmp_path, 5, twist=reply_with(kind, "s02", edit))
    round_, result = federation.round()
    assert round_.dropped == [{"site": "s02", "reason": reason}]
    if kind != "masked":
        federation.lost = {"s02": 1}
    federation.check(result, ["s00", "s01", "s03", "s04"], 5 if kind == "masked" else 4)


@pytest.mark.parametrize(
    "shares",
    [[b""] * 5, [bytes(SEED)] * 5, [b"short"] * 5, [bytes(SEED)] * 4],
    ids=["empty", "false", "of wrong length", "too few"],
)
def test_one_site_that_reveals_nonsense_does_not_stop_the_round(shares: list[bytes], tmp_path: Path) -> None:
    federation = Federation(
        tmp_path, 5, {"s04": 2}, reply_with("unmask", "s01", put_bytes("revealed", "shares", shares))
    )
    round_, result = federation.round()
    federation.check(result, ["s00", "s01", "s02", "s03"], 5)
    assert [row["site"] for row in round_.facts["silent"]] == (
        [] if set(map(len, shares)) <= {0, SEED} and len(shares) == 5 else ["s01"]
    )


def test_shares_that_are_garbled_on_their_way_only_cost_their_sender_its_share(tmp_path: Path) -> None:
    def garble(answer: RecordDict) -> None:
        answer["shares"]["sealed"] = [bytes(len(item)) for item in answer["shares"]["sealed"]]  # type: ignore[union-attr, arg-type]

    federation = Federation(tmp_path, 5, twist=reply_with("shares", "s01", garble))
    round_, result = federation.round()
    assert result is federation.before  # nobody can open a share of s01's seed: its mask stays on the sum
    assert round_.dropped == [{"site": "s01", "reason": "bad-shares"}]
    assert round_.left == 0 < round_.needed


def test_a_masked_model_with_an_impossible_weight_spoils_the_round_and_is_seen(tmp_path: Path) -> None:
    def heavy(vector: np.ndarray) -> np.ndarray:
        vector = vector.copy()
        vector[-4] ^= np.uint32(2**31)  # the weight, before images, told and loss
        return vector

    federation = Federation(tmp_path, 3, twist=reply_with("masked", "s01", put_array(heavy)))
    round_, result = federation.round()
    assert result is federation.before
    assert round_.dropped == [{"site": "all sites together", "reason": "wrong-sums"}]
    assert round_.left < round_.needed


def test_a_model_that_is_not_finite_is_declined_by_its_site(tmp_path: Path) -> None:
    federation = Federation(tmp_path, 4)
    federation.models["s03"]["w"][0, 0] = float("nan")
    round_, result = federation.round()
    assert round_.dropped == [{"site": "s03", "reason": "site-declined: not-finite"}]
    federation.check(result, ["s00", "s01", "s02"], 4)


def test_a_site_that_trained_on_more_than_it_named_is_declined(tmp_path: Path) -> None:
    federation = Federation(tmp_path, 4)
    real = federation.train
    federation.train = lambda place: real(Place(9, place.name, {"train": 10**6}, [], 0) if place.node == 2 else place)  # type: ignore[method-assign]
    round_, _ = federation.round()
    assert round_.dropped == [{"site": "s01", "reason": "site-declined: bad-weight"}]


# ---------------------------------------------------------------------- what the server holds


def test_what_a_site_sends_before_the_sum_tells_nothing_of_its_model(tmp_path: Path) -> None:
    """Two federations that differ in one site's model only: all that site sends has fresh randomness in it, and no
    number of its loss, its images or its weight leaves beside the masked vector."""
    federation = Federation(tmp_path, 3)
    federation.round()
    for stage, records in (("train.keys", {"keys"}), ("train.shares", {"shares"}), ("train.masked", {"arrays"})):
        for answer in federation.sent[stage].values():
            assert set(answer) == {*records, "status"}
    (vector,) = federation.sent["train.masked"]["s00"]["arrays"].values()
    assert vector.dtype == "uint32"
    assert not any(answer.metric_records for stage in STAGES for answer in federation.sent[stage].values())


def test_below_the_threshold_the_revealed_shares_give_nothing(tmp_path: Path) -> None:
    """The server keeps every message, and still lacks a seed when one reply too few came."""
    federation = Federation(tmp_path, 5, {"s03": 3, "s04": 3, "s02": 3})
    round_, result = federation.round()
    assert round_.left == 2 < round_.needed == 3
    assert result is federation.before
    from shared.masking import commitment, put_together

    told = {int(name[1:]): answer["revealed"]["shares"][0] for name, answer in federation.sent["train.unmask"].items()}
    proof = federation.sent["train.keys"]["s00"]["keys"]["commitment"]
    for needed in (2, 3):
        with pytest.raises(ValueError):
            put_together(told, needed, commitment, proof)  # type: ignore[arg-type]

"""The site's part of secure aggregation through the ClientApp: its answers, and what it refuses to a lying server."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client.app import app
from client.secure import STATE
from shared.config import Job
from shared.masking import SEED, new_seed, public_key
from shared.tasks import load_task
from shared.weights import exchanged

SITES = ["a", "b", "c"]


@pytest.fixture(autouse=True)
def _sender() -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


class Sites:
    """Three sites in the middle of a round; what lies between their messages is their state alone."""

    def __init__(self, folder: Path, job: Job) -> None:
        self.job = job
        self.contexts = {
            name: Context(7, n, {"site": str(folder / name / "site.toml")}, RecordDict(), dict(job.flat()))
            for n, name in enumerate(SITES, start=2)
        }
        self.arrays = exchanged(load_task(job.task).build_model(job), job)

    def ask(self, kind: str, site: str, round_: int = 1, config: object = None, **records: object) -> RecordDict:
        facts = {"round": round_, **(config or {})}  # type: ignore[dict-item]
        content = RecordDict({"config": ConfigRecord(facts)})
        for name, record in records.items():
            content[name] = ConfigRecord(record)  # type: ignore[arg-type]
        if kind in ("train", "train.masked"):
            content["arrays"] = ArrayRecord(self.arrays)  # type: ignore[arg-type]
        return app(Message(content, self.contexts[site].node_id, kind), self.contexts[site]).content

    def keys(self, round_: int = 1) -> dict[str, object]:
        shown = {name: self.ask("train.keys", name, round_)["keys"] for name in SITES}
        return {
            "names": SITES,
            "mask": [s["mask"] for s in shown.values()],
            "seal": [s["seal"] for s in shown.values()],
        }  # type: ignore[call-overload]

    def shares(self, round_: int = 1) -> dict[str, list[bytes]]:
        peers = self.keys(round_)
        return {name: self.ask("train.shares", name, round_, peers=peers)["shares"]["sealed"] for name in SITES}  # type: ignore[call-overload, misc]

    def masked(self, site: str, round_: int = 1, **more: object) -> RecordDict:
        config = {"class-weights": [1.0, 1.0], "sharing": SITES, "max-weight": 20.0, **more}
        return self.ask("train.masked", site, round_, config)

    def unmask(self, site: str, sealed: dict[str, list[bytes]], arrived: list[str], round_: int = 1) -> RecordDict:
        senders = [name for name in SITES if name != site]
        theirs = [sealed[name][SITES.index(site)] for name in senders]
        return self.ask("train.unmask", site, round_, unmask={"arrived": arrived, "senders": senders, "sealed": theirs})


@pytest.fixture
def sites(three_sites: Path, tiny_job: Job) -> Sites:
    job = tiny_job.replace(
        privacy__secure_aggregation=True, privacy__secure_share=0.51, federation__max_update_norm=50.0
    )
    return Sites(three_sites, job)


def code(reply: RecordDict) -> object:
    status = reply["status"]
    assert status["ok"] or set(reply) == {"status"}  # type: ignore[call-overload]
    return status["code"]  # type: ignore[call-overload]


def test_a_job_with_secure_aggregation_never_gets_the_model_in_plain(sites: Sites) -> None:
    assert code(sites.ask("train", "a", config={"class-weights": [1.0, 1.0]})) == "secure-aggregation-required"


def test_a_job_without_it_gets_no_keys(three_sites: Path, tiny_job: Job) -> None:
    assert code(Sites(three_sites, tiny_job).ask("train.keys", "a")) == "no-secure-aggregation"


def test_a_repeated_message_is_answered_the_same_or_refused(sites: Sites) -> None:
    peers = sites.keys()
    assert sites.keys() == peers
    sealed = {name: sites.ask("train.shares", name, peers=peers)["shares"]["sealed"] for name in SITES}  # type: ignore[call-overload]
    again = {name: sites.ask("train.shares", name, peers=peers)["shares"]["sealed"] for name in SITES}  # type: ignore[call-overload]
    assert sealed == again
    assert code(sites.ask("train.keys", "a")) == "wrong-round"  # new keys for the same round would be a second one
    first = sites.masked("a")
    assert code(first) == ""
    assert code(sites.masked("a")) == "wrong-stage"
    assert code(sites.ask("train.shares", "a", peers=peers)) == "wrong-stage"
    told = sites.unmask("a", sealed, SITES)  # type: ignore[arg-type]
    assert code(told) == ""
    assert sites.unmask("a", sealed, SITES)["revealed"] == told["revealed"]  # type: ignore[arg-type]


def test_after_the_last_answer_the_site_has_forgotten_its_secrets(sites: Sites) -> None:
    sealed = sites.shares()
    state = sites.contexts["a"].state
    secrets = [state[STATE][key] for key in ("mask_seed", "seal_seed", "own_seed")]  # type: ignore[call-overload]
    assert all(len(secret) == SEED for secret in secrets)
    sites.masked("a")
    sites.unmask("a", sealed, SITES)
    assert not any(secret in str(state[STATE]).encode() for secret in secrets)
    assert [state[STATE][key] for key in ("mask_seed", "seal_seed", "own_seed", "kept")] == [b""] * 4  # type: ignore[call-overload]


def test_messages_out_of_order_or_of_another_round_are_refused(sites: Sites) -> None:
    assert code(sites.masked("a")) == "wrong-round"
    sealed = sites.shares(2)
    assert code(sites.unmask("a", sealed, SITES, 2)) == "wrong-stage"
    for round_ in (1, 3):
        assert code(sites.masked("a", round_)) == "wrong-round"
        assert code(sites.unmask("a", sealed, SITES, round_)) == "wrong-round"
    assert code(sites.ask("train.keys", "a", 1)) == "wrong-round"
    assert code(sites.masked("a", 2)) == ""
    assert code(sites.ask("train.keys", "a", 3)) == ""  # a later round ends this one
    assert code(sites.unmask("a", sealed, SITES, 2)) == "wrong-round"
    assert code(sites.ask("train.keys", "a", 2)) == "wrong-round"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"names": ["a"], "mask": 1, "seal": 1}, "too-few-sites"),
        ({"names": ["b", "c"], "mask": 2, "seal": 2}, "wrong-list"),
        ({"names": ["b", "a", "c"]}, "wrong-list"),
        ({"names": ["a", "a", "c"]}, "wrong-list"),
        ({"names": ["a", "b", "../c"]}, "wrong-list"),
        ({"mask": 2}, "wrong-list"),
        ({"mask": "other"}, "key-changed"),
        ({"seal": "other"}, "key-changed"),
        ({"seal": "none"}, "bad-keys"),
    ],
)
def test_a_list_of_sites_that_is_not_in_order_is_refused(
    change: dict[str, object], expected: str, sites: Sites
) -> None:
    peers = sites.keys()
    for key, value in change.items():
        held: list[bytes] = peers[key]  # type: ignore[assignment]
        other, none = [public_key(new_seed()), *held[1:]], [held[0], bytes(32), held[2]]
        replaced = {"other": other, "none": none}.get(str(value), value)
        peers[key] = held[:value] if isinstance(value, int) else replaced
    assert code(sites.ask("train.shares", "a", peers=peers)) == expected


def test_the_quorum_of_the_job_holds_at_the_site_too(three_sites: Path, sites: Sites) -> None:
    strict = Sites(three_sites, sites.job.replace(federation__min_sites=4))
    assert code(strict.ask("train.shares", "a", peers=strict.keys())) == "too-few-sites"


def test_a_second_list_of_peers_is_refused(sites: Sites) -> None:
    peers = sites.keys()
    assert code(sites.ask("train.shares", "a", peers=peers)) == ""
    other = peers | {"mask": [*peers["mask"][:2], public_key(new_seed())]}  # type: ignore[index]
    assert code(sites.ask("train.shares", "a", peers=other)) == "wrong-list"


@pytest.mark.parametrize(
    ("sharing", "expected"),
    [
        (["a"], "too-few-sites"),
        (["b", "c"], "wrong-list"),
        (["a", "b", "d"], "wrong-list"),
        (["b", "a"], "wrong-list"),
        (["a", "b"], ""),
    ],
)
def test_a_model_is_masked_only_among_enough_known_sites(sharing: list[str], expected: str, sites: Sites) -> None:
    sites.shares()
    assert code(sites.masked("a", sharing=sharing)) == expected


@pytest.mark.parametrize(
    ("arrived", "expected"),
    [
        (["a"], "too-few-sites"),
        ([], "wrong-list"),
        (["b", "c"], "wrong-list"),  # its own model is not in the sum: then it tells nothing
        (["a", "b", "d"], "wrong-list"),
        (["a", "a"], "wrong-list"),
        (["a", "b"], ""),
    ],
)
def test_masks_are_revealed_only_for_enough_survivors(arrived: list[str], expected: str, sites: Sites) -> None:
    sealed = sites.shares()
    sites.masked("a")
    assert code(sites.unmask("a", sealed, arrived)) == expected


def test_other_survivors_in_a_second_request_are_refused_so_that_no_peer_is_told_both_ways(sites: Sites) -> None:
    sealed = sites.shares()
    sites.masked("a")
    told = sites.unmask("a", sealed, ["a", "b"])["revealed"]["shares"]  # type: ignore[call-overload]
    assert [len(share) for share in told] == [SEED] * 3
    for arrived in (SITES, ["a", "c"], ["a"]):
        assert code(sites.unmask("a", sealed, arrived)) == "changed-survivors"


def test_a_survivors_share_is_of_its_own_mask_and_a_lost_sites_of_its_pairs(sites: Sites) -> None:
    """Two sites of three together give back exactly one of the two seeds of each."""
    from shared.masking import commitment, put_together

    sealed = sites.shares()
    proofs = {}
    for name in ("a", "b", "c"):
        state = sites.contexts[name].state[STATE]
        proofs[name] = (commitment(state["own_seed"]), public_key(state["mask_seed"]))  # type: ignore[call-overload]
    for name in ("a", "b"):
        sites.masked(name)
    told = [sites.unmask(name, sealed, ["a", "b"])["revealed"]["shares"] for name in ("a", "b")]  # type: ignore[call-overload]
    for place, name in enumerate(SITES):
        shares = {teller: told[teller][place] for teller in (0, 1)}
        seen = [(commitment, proofs[name][0]), (public_key, proofs[name][1])]
        given, kept = seen if name != "c" else seen[::-1]
        put_together(shares, 2, *given)
        with pytest.raises(ValueError):
            put_together(shares, 2, *kept)


def test_the_masked_model_is_noise_and_names_no_number_of_the_site(sites: Sites) -> None:
    sites.shares()
    reply = sites.masked("a")
    assert set(reply) == {"arrays", "status"}
    vector = reply["arrays"]["masked"].numpy()  # type: ignore[call-overload]
    assert vector.dtype == np.uint32
    assert len(vector) == sum(array.numel() for array in sites.arrays.values()) + 4
    # Bytes of a change of fixed point would pile up at 0 and 255.
    counts = np.bincount(vector.view(np.uint8), minlength=256)
    assert abs(counts[[0, 255]].sum() / counts.sum() - 2 / 256) < 6 * np.sqrt(2 / 256 / counts.sum())


def test_the_site_writes_down_with_whom_its_model_was_summed(sites: Sites, three_sites: Path) -> None:
    sites.shares()
    sites.masked("b")
    assert "round 1: the model leaves masked, in a sum with a, c" in (three_sites / "b" / "site.log").read_text()


def test_a_resumed_run_does_no_round_twice_of_which_shares_were_revealed(three_sites: Path, sites: Sites) -> None:
    """A resumed run is another one to Flower, with a state of its own; two sums would tell one site's change."""

    def again() -> Sites:
        fresh = Sites(three_sites, sites.job)
        for context in fresh.contexts.values():
            context.run_id += 1
            context.run_config["run.id"] = "study-1"
        return fresh

    first, second = again(), again()
    sealed = first.shares()
    assert code(first.masked("a")) == ""
    others = second.shares()  # nothing of the round was revealed: it may be begun again
    assert code(second.masked("a")) == ""
    assert code(first.unmask("a", sealed, SITES)) == ""
    assert code(second.unmask("a", others, SITES)) == "wrong-round"
    assert code(first.unmask("a", sealed, SITES)) == ""  # the same once more, as it was told
    resumed = again()
    assert code(resumed.ask("train.keys", "a")) == "wrong-round"
    assert code(resumed.ask("train.keys", "b")) == ""  # which was not asked to reveal anything
    assert code(resumed.ask("train.keys", "a", 2)) == ""

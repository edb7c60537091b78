"""Who is behind the nodes: no site answers by another's name."""

from __future__ import annotations

from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from server.admission import Place
from server.roll import call, joined
from shared.config import Job


def answer(name: str, job: Job) -> Message:
    """As a site answers the first query."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    metrics = {"images-train": 4, "images-val": 2, "images-test": 2, "classes": [2, 2], "skipped": 0}
    facts = {"job": job.sha256, "frozen": ""}
    content = {
        "metrics": MetricRecord(metrics),  # type: ignore[arg-type]
        "facts": ConfigRecord(facts),  # type: ignore[arg-type]
        "status": ConfigRecord({"ok": True, "code": "", "site": name}),
    }
    return Message(RecordDict(content), 1, "query")  # type: ignore[arg-type]


def node(number: int, name: str) -> Place:
    return Place(number, name, {}, [], 0)


def test_a_site_that_calls_itself_by_anothers_name_is_not_admitted(tiny_job: Job) -> None:
    answers = [(node(1, "north"), answer("north", tiny_job)), (node(2, "south"), answer("north", tiny_job))]
    roll = call(answers, tiny_job, "", 2)
    assert [(place.node, place.name) for place in roll.places] == [(1, "north")]
    assert roll.dropped == [{"site": "south", "reason": "bad-name"}]
    assert roll.heard == {1, 2}


def test_without_registered_names_sites_name_themselves(tiny_job: Job) -> None:
    roll = call([(node(1, ""), answer("north", tiny_job)), (node(2, ""), None)], tiny_job, "", 2)
    assert [place.name for place in roll.places] == ["north"]
    assert roll.dropped == [{"site": "node 2", "reason": "no-reply"}]
    assert roll.heard == {1}


def test_a_registered_site_that_does_not_answer_is_named(tiny_job: Job) -> None:
    roll = call([(node(2, "south"), None)], tiny_job, "", 2)
    assert roll.dropped == [{"site": "south", "reason": "no-reply"}]


def test_a_site_with_a_new_key_takes_the_place_of_its_old_node_unless_that_is_still_there() -> None:
    before, renewed = [node(1, "north"), node(2, "south")], [node(5, "south")]
    found = joined(before, renewed, {5: "south"}, {1, 5})
    assert [(place.node, place.name) for place in found] == [(1, "north"), (5, "south")]
    # Both are there, or nobody vouches for the name: then two sites have one name, which the run refuses.
    for registered, there in (({5: "south"}, {1, 2, 5}), ({}, {1, 5})):
        assert [place.node for place in joined(before, renewed, registered, there)] == [1, 2, 5]

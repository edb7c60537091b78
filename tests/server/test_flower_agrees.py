"""Five rounds of each strategy that Flower has under the same name, with its own classes beside ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from flwr.supercore.task_identity import TaskIdentity

from server.algorithm import Algorithm
from shared.config import Scalar, job_from_flat
from tests.server.algorithms import Arrays, start, trained

SITES, ROUNDS = 9, 5
WEIGHTS = [10, 30, 5, 20, 20, 7, 11, 13, 40]
ETA = {"federation.server_learning_rate": 0.07}
BAD = {"federation.byzantine": 1}

# Our name with the settings that Flower's class is given.
CASES: dict[str, tuple[dict[str, Scalar], Callable[[], Any]]] = {
    "fedavg": ({}, flower.FedAvg),
    "fedavgm": (
        {"federation.server_learning_rate": 0.7, "federation.server_momentum": 0.8},
        lambda: flower.FedAvgM(server_learning_rate=0.7, server_momentum=0.8),
    ),
    "fedadam": (ETA, lambda: flower.FedAdam(eta=0.07)),
    "fedyogi": (ETA, lambda: flower.FedYogi(eta=0.07)),
    "fedadagrad": (ETA, lambda: flower.FedAdagrad(eta=0.07)),
    "fedmedian": ({}, flower.FedMedian),
    "fedtrimmedavg": ({"federation.trim": 0.3}, lambda: flower.FedTrimmedAvg(beta=0.3)),
    "krum": (BAD, lambda: flower.Krum(num_malicious_nodes=1)),
    "multikrum": (
        BAD | {"federation.selected": 4},
        lambda: flower.MultiKrum(num_malicious_nodes=1, num_nodes_to_select=4),
    ),
    "bulyan": (BAD, lambda: flower.Bulyan(num_malicious_nodes=1)),
}


class Nodes:
    """As much of a Grid as a strategy asks for to pick nodes."""

    def get_node_ids(self) -> list[int]:
        return list(range(1, SITES + 1))


def theirs(strategy: Any) -> Arrays:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    model = start()
    for number in range(1, ROUNDS + 1):
        sent = list(strategy.configure_train(number, ArrayRecord(model), ConfigRecord(), Nodes()))
        answers = []
        for message in sorted(sent, key=lambda message: message.metadata.dst_node_id):
            site = message.metadata.dst_node_id - 1
            reply = trained(message.content["arrays"].to_torch_state_dict(), site)
            records = {"arrays": ArrayRecord(reply), "metrics": MetricRecord({"num-examples": WEIGHTS[site]})}
            answers.append(Message(RecordDict(records), reply_to=message))  # type: ignore[arg-type]
        arrays, _ = strategy.aggregate_train(number, answers)
        model = {name: value.float() for name, value in arrays.to_torch_state_dict().items()}
    return model


def ours(name: str, settings: dict[str, Scalar]) -> Arrays:
    algorithm = Algorithm(job_from_flat({"federation.strategy": name, **settings}), list(start()))
    model = start()
    for number in range(1, ROUNDS + 1):
        replies = [(float(WEIGHTS[site]), trained(model, site)) for site in range(SITES)]
        model = algorithm.merge(replies, model, number)
    return model


@pytest.mark.parametrize("name", CASES)
def test_five_rounds_agree_with_flowers_strategy(name: str) -> None:
    settings, make = CASES[name]
    expected, model = theirs(make()), ours(name, settings)
    assert any((model[key] - value).abs().max() > 1e-2 for key, value in start().items())  # something was learnt
    for key, value in expected.items():
        torch.testing.assert_close(model[key], value, rtol=1e-6, atol=1e-6)

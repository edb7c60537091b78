"""Whatever is asked of the API, within its description or not, it never breaks."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

from server.dashboard.app import create_app
from server.dashboard.guard import Access

TOKEN = "a-token-of-the-tests-0123456789"
HEADERS = {"Authorization": f"Bearer {TOKEN}", "Host": "127.0.0.1"}


@pytest.fixture(scope="module")
def api(store: Path) -> Iterator[FastAPI]:
    app = create_app(store, Access(TOKEN))
    with TestClient(app):
        yield app


@pytest.mark.slow
def test_nothing_ends_in_a_server_error(api: FastAPI) -> None:
    asked: Counter[str] = Counter()

    def ask(case: schemathesis.Case) -> None:
        answer = case.call(headers=HEADERS)
        case.validate_response(answer, checks=[not_a_server_error])
        assert answer.status_code < 500
        asked[case.operation.label] += 1

    described = schemathesis.openapi.from_asgi("/api/openapi.json", api, headers=HEADERS)
    quiet = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    for found in described.get_all_operations():
        for mode in GenerationMode:
            with contextlib.suppress(Unsatisfiable):  # nothing can be wrong where nothing is asked for
                quiet(given(found.ok().as_strategy(generation_mode=mode))(ask))()
    assert len(asked) >= 14
    assert min(asked.values()) >= 1
    assert sum(asked.values()) >= 300

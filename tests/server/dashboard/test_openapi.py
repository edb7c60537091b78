"""Whatever is asked of the API, within its description or not, it never breaks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, settings
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


@pytest.fixture
def loaded(api: FastAPI) -> schemathesis.schemas.BaseSchema:
    return schemathesis.openapi.from_asgi("/api/openapi.json", api, headers=HEADERS)


schema = schemathesis.pytest.from_fixture("loaded")


@schema.parametrize()
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_nothing_ends_in_a_server_error(case: schemathesis.Case) -> None:
    answer = case.call(headers=HEADERS)
    case.validate_response(answer, checks=[not_a_server_error])
    assert answer.status_code < 500

"""What the server refuses is said in words, and a run that has ended is no failure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from server.control import Control, UnknownRun
from server.federation import Folder
from server.provision import provision
from shared.errors import UserError


class Refuses:
    """A server that answers every question with the same refusal."""

    def __init__(self, status: int, text: str) -> None:
        request = httpx.Request("POST", "https://127.0.0.1/")
        self.error = httpx.HTTPStatusError("no", request=request, response=httpx.Response(status, text=text))

    def __getattr__(self, name: str) -> Any:
        def ask(_: object) -> None:
            raise self.error

        return ask


def control_of(tmp_path: Path, status: int, text: str) -> Control:
    (tmp_path / "federation.toml").write_text('name = "f"\n[server]\nhost = "127.0.0.1"\n[sites.a]\n')
    provision(tmp_path / "federation.toml", tmp_path / "f", ())
    control = Control(Folder(tmp_path / "f"))
    control._client = Refuses(status, text)  # type: ignore[assignment]
    return control


def test_a_run_that_has_ended_need_not_be_stopped(tmp_path: Path) -> None:
    assert control_of(tmp_path, 412, '{"code":18,"detail":"Run is already finished."}').stop(5) is False


def test_a_run_that_the_server_does_not_know_is_unknown(tmp_path: Path) -> None:
    with pytest.raises(UnknownRun, match="knows no run"):
        control_of(tmp_path, 404, '{"code":16,"detail":"Run ID not found."}').status(5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"code":31,"detail":"Not your\\nrun."}', "the server refused: Not your run"),
        ("<html>Bad\nGateway</html>", "the server refused: <html>Bad Gateway</html>"),
        ("[1]", "the server refused: [1]"),
        ("", "the server refused: no"),
    ],
)
def test_a_refusal_is_one_line_without_json(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        control_of(tmp_path, 403, text).nodes()
    assert str(caught.value) == said


def test_a_flower_that_numbers_its_errors_otherwise_would_be_noticed() -> None:
    from flwr.supercore.error import ApiErrorCode

    assert (ApiErrorCode.RUN_ID_NOT_FOUND, ApiErrorCode.RUN_ALREADY_FINISHED) == (16, 18)

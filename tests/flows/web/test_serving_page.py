"""The page docs/serving.md: its requests are drawn, and it has every option, endpoint, metric and status."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import typer
from starlette.testclient import TestClient

from flows.cli import app
from flows.web.errors import FOR_A1111, FOR_OPENAI, STATUS, ClientGone, status_of
from registry.entities import Decision
from tasks.operations.draw_request import DrawRequest
from tasks.serving.job import Job, JobState
from tasks.serving.service import ImageService

PAGE = Path(__file__).parents[3] / "docs" / "serving.md"


def test_the_requests_of_the_page_are_drawn(client: TestClient) -> None:
    requests = re.findall(r"curl http://127.0.0.1:8188(\S+) .*?-d '([^']+)'", PAGE.read_text(), re.DOTALL)
    assert requests
    for path, body in requests:
        answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 200, answer.text
        assert answer.json()["job"]["adapters"] == ["zorb@1"]


def test_the_hook_of_the_page_decides() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    job = Job("0" * 32, "local", DrawRequest("a forbidden ring"), JobState.RUNNING, (), datetime.now(UTC))
    assert names["check"]([], job) == Decision(False, ("the prompt is forbidden",))


def test_the_page_has_every_option_endpoint_and_metric(client: TestClient, service: ImageService) -> None:
    text = PAGE.read_text()
    serve = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    options = {opt for parameter in serve.params for opt in (*parameter.opts, *parameter.secondary_opts)}
    documented = set(re.findall(r"--[a-z][a-z-]+", text)) - {"--expires", "--file", "--tenant"}
    assert options - {"--no-behind-proxy", "--no-json", "--help"} == documented
    paths = {path.partition("{")[0].rstrip("/") for path in client.get("/openapi.json").json()["paths"]}
    assert [path for path in paths if path.startswith("/v1") and f"{path}" not in text] == []
    names = set(re.findall(r"^# TYPE loraline_serving_(\w+) ", service.metrics.text().decode(), re.MULTILINE))
    assert [name for name in names if not name.endswith("_created") and f"`{name}`" not in text] == []


def test_the_pages_have_every_status_of_an_error() -> None:
    own, clients = PAGE.read_text(), (PAGE.parent / "serving-clients.md").read_text()
    rows = {int(number) for row in re.findall(r"^\| ([0-9, ]+) \|", own, re.MULTILINE) for number in row.split(", ")}
    assert {*STATUS.values()} - {status_of(ClientGone("gone"))} <= rows
    assert [status for status in (*FOR_A1111.values(), *FOR_OPENAI.values()) if str(status) not in clients] == []

"""What the own endpoints of `loraline serve` refuse, and how they answer it."""

from __future__ import annotations

import base64
import json
import threading
from contextlib import closing
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from flows.web.a1111_requests import UnknownSampler
from flows.web.app import create_app
from flows.web.errors import FOR_A1111, FOR_OPENAI, JobFailed, status_of
from flows.web.openai_models import UnknownModel
from lora_engine.errors import EngineError, SettingsError, WordedError
from lora_engine.serving.engine import PlainEngine
from registry.home import Home
from registry.versions.deletion import withdraw
from registry.versions.versions import Versions
from tasks.operations.draw_request import DrawRequest
from tasks.serving.job import Failure, QueueFull, TenantQueueFull
from tasks.serving.service import ImageService, ServiceSettings
from tests.flows.web.own_endpoints import ADDRESS, BODY, png_of
from tests.flows.web.server import copy_home


@pytest.mark.parametrize(
    "image",
    [
        "http://127.0.0.1:1/a.png",
        "file:///etc/passwd",
        "/etc/passwd",
        "../../etc/passwd",
        "AAAA",
        "data:image/png;base64,AAAA",
        base64.b64encode(b"<svg xmlns='http://www.w3.org/2000/svg'/>").decode(),
    ],
)
def test_an_image_field_reads_no_path_and_no_address(client: TestClient, image: str) -> None:
    answer = client.post("/v1/jobs", json={**BODY, "image": image})
    assert answer.status_code == 422
    assert answer.json()["error"]["where"] == "image"
    assert str(Path("/work")) not in answer.text
    assert "/tmp" not in answer.text


def test_an_image_that_decodes_to_too_many_pixels_is_refused(client: TestClient) -> None:
    assert "pixels" in client.post("/v1/jobs", json={**BODY, "image": png_of((5000, 4000))}).json()["error"]["problem"]


@pytest.mark.parametrize(
    ("body", "status", "where"),
    [
        ({"prompt": "a", "stepz": 3}, 422, "stepz"),
        ({"prompt": "a", "steps": "3"}, 422, "steps"),
        ({"prompt": "a", "steps": 0}, 422, "steps"),
        ({"prompt": "a", "guidance": 1e400}, 422, "guidance"),
        ({"prompt": "a", "width": 64}, 422, ""),
        ({"prompt": 3}, 422, "prompt"),
        ({}, 422, "prompt"),
        ({"prompt": "a <lora:zorb:x>"}, 422, ""),
        ({"prompt": "a <lora:../zorb:1>"}, 422, ""),
        ({"prompt": "a <lora:nothing:1>"}, 404, ""),
        ({"prompt": "a <lora:zorb@9:1>"}, 404, "zorb"),
        ({"prompt": "a", "sampler": "nothing"}, 422, ""),
        ({"prompt": "a", "steps": 999}, 422, ""),
    ],
)
def test_what_cannot_be_drawn_is_refused_with_the_parts_of_an_error(
    client: TestClient, body: dict[str, object], status: int, where: str
) -> None:
    content = json.dumps(body).replace("Infinity", "1e400")
    answer = client.post("/v1/jobs", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"type", "message", "problem", "where", "allowed", "remedy", "reasons"}
    assert error["problem"]
    assert where in error["where"]


def test_a_withdrawn_version_is_gone_with_the_reason(client: TestClient, home: Home) -> None:
    with closing(Versions(home)) as versions:
        withdraw(versions, "zorb", 2, reason="bad eyes")
    for path, body in (("/v1/jobs", BODY), ("/v1/images", BODY)):
        answer = client.post(path, json={**body, "prompt": "a <lora:zorb@2:1>"})
        assert answer.status_code == 410
        assert "bad eyes" in answer.json()["error"]["message"]
    assert [card["version"] for card in client.get("/v1/adapters/zorb").json()] == [1]


def test_a_full_queue_and_a_stopped_server_say_when_to_try_again(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    may_draw, has_begun = threading.Event(), threading.Event()

    class Held(PlainEngine):
        def draw(self, jobs):  # type: ignore[no-untyped-def]
            has_begun.set()
            may_draw.wait(60)
            return super().draw(jobs)

    home = copy_home(tmp_path_factory, tmp_path / "home")
    service = ImageService(home, ServiceSettings(queue_limit=2, tenant_limit=1), Held("tiny"))
    try:
        with TestClient(create_app(service), base_url=ADDRESS) as client:
            client.post("/v1/jobs", json=BODY)
            assert has_begun.wait(60)
            assert client.post("/v1/jobs", json=BODY).status_code == 202
            own = client.post("/v1/jobs", json=BODY)
            assert (own.status_code, own.json()["error"]["type"]) == (429, "TenantQueueFull")
            service.submit(DrawRequest("a ring", steps=1), tenant="ann")
            full = client.post("/v1/jobs", json=BODY)
            assert (full.status_code, full.headers["retry-after"]) == (503, "2")
            may_draw.set()
            service.close()
            stopped = client.post("/v1/jobs", json=BODY)
            assert (stopped.status_code, stopped.headers["retry-after"]) == (503, "10")
            assert client.get("/readyz").status_code == 503
            assert client.get("/healthz").status_code == 200
    finally:
        may_draw.set()


def test_the_document_names_every_error_of_the_routes_that_draw(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    for path in ("/v1/jobs", "/v1/images"):
        assert {"401", "403", "404", "409", "410", "413", "422", "429", "503", "507"} <= set(
            document["paths"][path]["post"]["responses"]
        )
    assert document["components"]["schemas"]["ImageRequest"]["additionalProperties"] is False


@pytest.mark.parametrize(
    ("error", "own", "a1111", "openai"),
    [
        (QueueFull("full"), 503, 429, 429),
        (TenantQueueFull("full"), 429, 429, 429),
        (SettingsError("wrong"), 422, 422, 400),
        (UnknownSampler("wrong"), 404, 404, 404),
        (UnknownModel("wrong"), 404, 404, 404),
        (JobFailed(Failure("GoneVersion", "gone")), 410, 410, 410),
        (JobFailed(Failure("SettingsError", "wrong")), 422, 422, 400),
        (EngineError("broken"), 500, 500, 500),
    ],
)
def test_an_error_has_one_status_in_each_api(error: WordedError, own: int, a1111: int, openai: int) -> None:
    assert (status_of(error), status_of(error, FOR_A1111), status_of(error, FOR_OPENAI)) == (own, a1111, openai)

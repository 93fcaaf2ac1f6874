"""The own endpoints of `loraline serve`, in this process, with the embedded base."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import threading
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from flows.cli import app
from flows.web.a1111_requests import UnknownSampler
from flows.web.app import create_app
from flows.web.errors import FOR_A1111, FOR_OPENAI, STATUS, ClientGone, JobFailed, status_of
from flows.web.openai_models import UnknownModel
from lora_engine.errors import EngineError, SettingsError, WordedError
from lora_engine.serving.engine import PlainEngine
from registry.entities import Decision
from registry.home import Home
from registry.versions.deletion import withdraw
from registry.versions.versions import Versions
from tasks.operations.draw_request import DrawRequest
from tasks.serving.job import Failure, Job, JobState, QueueFull, TenantQueueFull
from tasks.serving.service import ImageService, ServiceSettings
from tests.flows.web.server import copy_home, read_events

BODY = {"prompt": "a zorb <lora:zorb:0.7>", "steps": 2, "seed": 5}
ADDRESS = "http://127.0.0.1"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return copy_home(tmp_path_factory, tmp_path_factory.mktemp("endpoints") / "home")


@pytest.fixture(scope="module")
def service(home: Home) -> Iterator[ImageService]:
    service = ImageService(home, ServiceSettings(), PlainEngine("tiny"))
    yield service
    service.close()


@pytest.fixture(scope="module")
def client(service: ImageService) -> Iterator[TestClient]:
    with TestClient(create_app(service), base_url=ADDRESS, raise_server_exceptions=False) as client:
        yield client


def test_a_job_is_accepted_drawn_and_read_by_index(client: TestClient, service: ImageService) -> None:
    accepted = client.post("/v1/jobs", json={**BODY, "count": 2})
    assert accepted.status_code == 202
    assert accepted.json()["adapters"] == ["zorb@1"]
    job = service.wait(accepted.json()["id"], 60)
    body = client.get(f"/v1/jobs/{job.id}").json()
    assert (body["state"], body["step"], body["seed"]) == ("completed", 2, 5)
    images = [client.get(path) for path in body["images"]]
    assert [image.headers["content-type"] for image in images] == ["image/png"] * 2
    assert [Image.open(io.BytesIO(image.content)).size for image in images] == [(32, 32)] * 2
    assert images[0].content != images[1].content
    assert client.get(f"/v1/jobs/{job.id}/images/2").status_code == 404
    assert body["id"] in {entry["id"] for entry in client.get("/v1/jobs").json()}
    assert client.get(f"/v1/jobs/{'0' * 32}").status_code == 404


def test_one_request_returns_the_images_themselves(client: TestClient) -> None:
    answer = client.post("/v1/images", json=BODY).json()
    (image,) = answer["images"]
    with Image.open(io.BytesIO(base64.b64decode(image))) as drawn:
        drawn.load()
        assert "zorb@1" in drawn.text["loraline"]  # type: ignore[attr-defined]
    assert client.post("/v1/images", json=BODY).json()["images"] == [image]


@pytest.mark.parametrize("kind", ["webp", "jpeg"])
def test_images_are_answered_in_the_format_of_the_query(client: TestClient, kind: str) -> None:
    answer = client.post(f"/v1/images?format={kind}&quality=100", json=BODY).json()
    content = base64.b64decode(answer["images"][0])
    assert Image.open(io.BytesIO(content)).format == kind.upper()
    path = answer["job"]["images"][0]
    image = client.get(f"{path}?format={kind}&quality=100")
    assert (image.headers["content-type"], image.content) == (f"image/{kind}", content)
    assert len(client.get(f"{path}?format={kind}&quality=20").content) < len(content)
    for query in ("format=gif", "quality=0", "quality=101"):
        assert client.get(f"{path}?{query}").status_code == 422


def test_an_idempotency_key_gives_the_same_job_and_refuses_another_request(client: TestClient) -> None:
    unseeded = {"prompt": "a ring", "steps": 1}
    first, second = (
        client.post("/v1/jobs", json=unseeded, headers={"Idempotency-Key": "abc"}).json() for _ in range(2)
    )
    assert first["id"] == second["id"]
    assert first["seed"] == second["seed"]
    other = client.post("/v1/jobs", json=BODY, headers={"Idempotency-Key": "abc"})
    assert (other.status_code, other.json()["error"]["type"]) == (409, "KeyReused")
    assert client.post("/v1/jobs", json=unseeded).json()["seed"] != first["seed"]


def test_progress_is_streamed_until_the_job_has_ended(client: TestClient) -> None:
    job = client.post("/v1/jobs", json={**BODY, "steps": 6}).json()
    response = client.get(f"/v1/jobs/{job['id']}/events")
    assert response.headers["content-type"].startswith("text/event-stream")
    events = read_events(response.text.splitlines())
    assert events[-1]["state"] == "completed"
    steps = [event["step"] for event in events]
    assert steps == sorted(steps)


def test_a_preview_shows_a_running_job_and_a_canceled_one_ends(client: TestClient) -> None:
    job = client.post("/v1/jobs", json={**BODY, "steps": 150}).json()
    path = f"/v1/jobs/{job['id']}"
    while client.get(path).json()["state"] == "queued":
        pass
    preview = client.get(f"{path}/preview")
    assert preview.status_code == 200
    assert Image.open(io.BytesIO(preview.content)).size == (32, 32)
    assert client.delete(path).json()["state"] == "canceled"
    assert client.get(path).json()["images"] == []
    assert client.get(f"{path}/preview").status_code == 204
    assert client.delete(f"/v1/jobs/{'0' * 32}").status_code == 404


def _png(size: tuple[int, int] = (32, 32)) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 10, 10)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_an_image_to_start_from_comes_in_the_request(client: TestClient) -> None:
    mask = io.BytesIO()
    Image.new("L", (32, 32), 255).save(mask, "PNG")
    body = {**BODY, "image": _png(), "mask": base64.b64encode(mask.getvalue()).decode(), "strength": 0.5}
    assert client.post("/v1/images", json=body).status_code == 200


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
    assert "pixels" in client.post("/v1/jobs", json={**BODY, "image": _png((5000, 4000))}).json()["error"]["problem"]


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


def test_the_cards_of_adapters_have_what_a_user_chooses_by(client: TestClient) -> None:
    cards = client.get("/v1/adapters").json()
    ring = next(card for card in cards if card["name"] == "ring")
    assert (ring["version"], ring["aliases"], ring["license"], ring["tag"]) == (
        1,
        ["production"],
        "MIT",
        "<lora:ring@1:1>",
    )
    assert ring["sample"] is None
    assert client.get("/v1/adapters/ring/1/sample").status_code == 404
    assert client.get("/v1/adapters/nothing").json() == []


def test_a_client_that_goes_away_cancels_its_job(service: ImageService) -> None:
    application = create_app(service)
    gone = asyncio.Event()

    async def ask() -> None:
        body = b'{"prompt": "a ring", "steps": 150, "count": 16, "seed": 77}'
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, object]:
            if messages:
                return messages.pop()  # type: ignore[return-value]
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: object) -> None:
            del message

        headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/images",
            "raw_path": b"/v1/images",
            "query_string": b"",
            "headers": headers,
            "http_version": "1.1",
            "scheme": "http",
            "server": ("127.0.0.1", 80),
            "root_path": "",
        }

        async def leave() -> None:
            while not any(job.request.seed == 77 for job in service.jobs()):
                await asyncio.sleep(0.01)
            gone.set()

        await asyncio.gather(application(scope, receive, send), leave())

    asyncio.run(ask())
    (job,) = [job for job in service.jobs() if job.request.seed == 77]
    assert job.state == "canceled"


def test_health_and_metrics_say_what_the_server_does(client: TestClient, service: ImageService) -> None:
    client.post("/v1/images", json=BODY)
    client.post("/v1/images", json={**BODY, "prompt": "a <lora:nothing:1>"})
    assert client.get("/healthz").json() == client.get("/readyz").json() == {"status": "ok"}
    families = {family.name: family for family in text_string_to_metric_families(client.get("/metrics").text)}
    jobs = {
        (sample.labels["tenant"], sample.labels["state"]): sample.value
        for sample in families["loraline_serving_jobs"].samples
        if sample.name.endswith("_total")
    }
    assert jobs["local", "completed"] >= 1
    for name in ("images", "steps", "waiting_seconds", "drawing_seconds", "batch_images", "adapter_files", "rejected"):
        assert families[f"loraline_serving_{name}"].samples, name
    assert "loraline_serving_waiting_jobs" in families


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

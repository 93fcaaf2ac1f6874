"""The own endpoints of `loraline serve`, in this process, with the embedded base."""

from __future__ import annotations

import asyncio
import base64
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from flows.web.app import create_app
from lora_engine.inference.image_settings import read_image_settings
from tasks.serving.service import ImageService
from tests.flows.web.own_endpoints import BODY, png_of
from tests.flows.web.server import read_events


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


def test_regions_noise_and_clip_skip_count_and_the_image_says_how_to_draw_it_again(
    client: TestClient, tmp_path: Path
) -> None:
    def draw(body: dict[str, Any]) -> tuple[str, list[str]]:
        answer = client.post("/v1/images", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["images"][0], answer.json()["job"]["adapters"]

    advanced = {
        "regions": ["0,0,0.5,1=a ring <lora:ring:0.8>", "0.5,0,1,0.5=a cube"],
        "feather": 2.0,
        "adapter_guidance": 2.0,
        "variation": "8:0.25",
        "seed_size": "48x32",
        "clip_skip": 2,
    }
    drawn, adapters = draw({**BODY, **advanced})
    assert adapters == ["zorb@1", "ring@1"]
    for name in advanced:
        without = {key: value for key, value in advanced.items() if key not in {name, "feather"}}
        assert draw({**BODY, **without})[0] != drawn, name
    (tmp_path / "drawn.png").write_bytes(base64.b64decode(drawn))
    settings = read_image_settings(tmp_path / "drawn.png")
    assert settings.seed_size is not None
    again = {
        "prompt": settings.prompt,
        "seed": settings.seed,
        "steps": settings.steps,
        "regions": list(settings.regions),
        "feather": settings.feather,
        "variation": str(settings.variation),
        "seed_size": f"{settings.seed_size[1]}x{settings.seed_size[0]}",
        "clip_skip": settings.clip_skip,
    }
    assert draw(again)[0] == drawn


def test_a_region_with_a_mask_and_another_vae_are_refused(client: TestClient) -> None:
    for field, value, message in (
        ("regions", ["/etc/passwd=a ring"], "is no box"),
        ("clip_skip", 0, "clip_skip"),
        ("variation", "8", "SEED:STRENGTH"),
        ("vae", "/etc", "vae"),
    ):
        answer = client.post("/v1/jobs", json={**BODY, field: value})
        assert (answer.status_code, message in answer.json()["error"]["message"]) == (422, True), answer.text


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


def test_an_image_to_start_from_comes_in_the_request(client: TestClient) -> None:
    mask = io.BytesIO()
    Image.new("L", (32, 32), 255).save(mask, "PNG")
    body = {**BODY, "image": png_of(), "mask": base64.b64encode(mask.getvalue()).decode(), "strength": 0.5}
    assert client.post("/v1/images", json=body).status_code == 200


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

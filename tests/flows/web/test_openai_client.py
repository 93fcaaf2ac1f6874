"""The package `openai` against a running server: images, edits, streams, models, errors."""

from __future__ import annotations

import io
import json
import threading
import time
from base64 import b64decode
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from openai import OpenAI
from PIL import Image
from webuiapi import WebUIApi

from registry.home import Home
from tests.flows.web.served import Served, serving
from tests.flows.web.server import write_tokens

SMALL = {"size": "32x32", "extra_body": {"seed": 7, "steps": 2}}


@pytest.fixture
def client(served: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def pixels(b64_json: str | None) -> np.ndarray:
    assert b64_json is not None
    return np.asarray(Image.open(io.BytesIO(b64decode(b64_json))).convert("RGB"), int)


def png(image: Image.Image) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, "PNG")
    file.seek(0)
    file.name = "image.png"
    return file


@pytest.fixture
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 255, (32, 32, 3), dtype=np.uint8))


def test_images_are_generated_with_an_adapter_as_model_prompt_or_field(client: OpenAI) -> None:
    answer = client.images.generate(prompt="a ring", model="zorb", n=2, response_format="b64_json", **SMALL)
    assert answer.data is not None
    assert len(answer.data) == 2
    assert answer.size == "32x32"
    assert [image.seed for image in answer.data] == [7, 8]  # type: ignore[attr-defined]
    expected = pixels(answer.data[0].b64_json)
    by_prompt = client.images.generate(prompt="a ring <lora:zorb>", model="tiny", **SMALL)
    by_field = client.images.generate(
        prompt="a ring", size="32x32", extra_body={**SMALL["extra_body"], "loras": [{"name": "zorb"}]}
    )
    plain = client.images.generate(prompt="a ring", **SMALL)
    for other in (by_prompt, by_field):
        assert np.abs(pixels(other.data[0].b64_json) - expected).max() <= 1
    assert np.abs(pixels(plain.data[0].b64_json) - expected).max() > 1


def test_a_request_needs_only_a_prompt_and_draws_the_size_of_the_base(client: OpenAI) -> None:
    answer = client.images.generate(prompt="a ring", extra_body={"steps": 2})
    assert answer.size == "32x32"


def test_transparent_parts_of_a_mask_are_drawn_and_the_rest_is_kept(client: OpenAI, photo: Image.Image) -> None:
    mask = Image.new("RGBA", (32, 32), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (8, 8, 24, 24))
    answer = client.images.edit(
        image=png(photo), mask=png(mask), prompt="a ring", model="zorb", extra_body={"steps": "2", "seed": "3"}
    )
    changed = np.abs(pixels(answer.data[0].b64_json) - np.asarray(photo, int)).max(axis=2)
    inside = np.asarray(mask)[:, :, 3] == 0
    assert changed[~inside].max() == 0
    assert changed[inside].max() > 8


def test_transparent_parts_of_an_image_are_drawn_without_a_mask(client: OpenAI, photo: Image.Image) -> None:
    image = photo.convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 16, 32))
    answer = client.images.edit(image=png(image), prompt="a ring", extra_body={"steps": "2"})
    changed = np.abs(pixels(answer.data[0].b64_json) - np.asarray(photo, int)).max(axis=2)
    assert changed[:, 16:].max() == 0
    assert changed[:, :16].max() > 8


def test_an_image_is_edited_as_a_whole_by_a_strength(client: OpenAI, photo: Image.Image) -> None:
    def edit(strength: str) -> float:
        body = {"steps": "4", "seed": "3", "strength": strength}
        answer = client.images.edit(image=[png(photo)], prompt="a ring", size="32x32", extra_body=body)
        return float(np.abs(pixels(answer.data[0].b64_json) - np.asarray(photo, int)).mean())

    assert edit("0.25") < edit("1")


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")  # the package says so of variations
def test_a_variation_draws_the_whole_image_again_without_a_prompt(client: OpenAI, photo: Image.Image) -> None:
    image = photo.convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 16, 32))

    def vary(strength: str) -> np.ndarray:
        body = {"steps": "4", "seed": "3", "strength": strength}
        answer = client.images.create_variation(
            image=png(image),
            model="zorb",
            n=2,
            size="32x32",
            response_format="b64_json",
            extra_body=body,  # type: ignore[arg-type]
        )
        assert answer.data is not None
        assert [one.seed for one in answer.data] == [3, 4]  # type: ignore[attr-defined]
        assert answer.data[0].b64_json != answer.data[1].b64_json
        return pixels(answer.data[0].b64_json)

    opaque = np.asarray(photo, int)[:, 16:]
    little, much = (np.abs(vary(strength)[:, 16:] - opaque) for strength in ("0.25", "1"))
    assert 0 < little.mean() < much.mean(), "parts that are not transparent are drawn, too"
    files = {"image": ("a.png", png(photo)), "mask": ("b.png", png(photo))}
    refused = httpx.post(f"{client.base_url}images/variations", files=files)
    assert (refused.status_code, "one image" in refused.text) == (400, True)


def test_a_stream_has_previews_and_then_the_image(client: OpenAI) -> None:
    options = {"seed": 7, "steps": 24}
    stream = client.images.generate(prompt="a ring", size="32x32", stream=True, partial_images=2, extra_body=options)
    events = list(stream)
    assert [event.type for event in events] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    plain = client.images.generate(prompt="a ring", size="32x32", extra_body=options)
    assert np.array_equal(pixels(events[-1].b64_json), pixels(plain.data[0].b64_json))
    assert not np.array_equal(pixels(events[0].b64_json), pixels(events[-1].b64_json))


@pytest.mark.parametrize("kind", ["webp", "jpeg"])
def test_images_and_previews_have_the_format_that_is_asked_for_with_their_settings(client: OpenAI, kind: Any) -> None:
    options = {"seed": 7, "steps": 8}
    plain = client.images.generate(prompt="a ring", size="32x32", extra_body=options)
    answer = client.images.generate(prompt="a ring", size="32x32", output_format=kind, extra_body=options)
    assert (answer.output_format, answer.size) == (kind, "32x32")
    content = b64decode(answer.data[0].b64_json)
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == kind.upper()
        assert image.getxmp()["xmpmeta"]["RDF"]["Description"]["DigitalSourceType"].endswith("trainedAlgorithmicMedia")
        assert "Seed: 7" in image.getexif().get_ifd(0x8769)[0x9286].decode("utf-16-be", "replace")
    change = np.abs(pixels(answer.data[0].b64_json) - pixels(plain.data[0].b64_json)).max()
    assert change <= (0 if kind == "webp" else 8)
    small = client.images.generate(
        prompt="a ring", size="32x32", output_format=kind, output_compression=20, extra_body=options
    )
    assert len(b64decode(small.data[0].b64_json)) < len(content)
    events = list(
        client.images.generate(
            prompt="a ring", size="32x32", output_format=kind, stream=True, partial_images=1, extra_body=options
        )
    )
    assert [event.output_format for event in events] == [kind] * 2
    assert [Image.open(io.BytesIO(b64decode(event.b64_json))).format for event in events] == [kind.upper()] * 2


def test_a_stream_of_an_edit_has_its_events(client: OpenAI, photo: Image.Image) -> None:
    stream = client.images.edit(image=png(photo), prompt="a ring", stream=True, extra_body={"steps": "2"})
    assert [event.type for event in stream] == ["image_edit.completed"]


def test_a_client_that_leaves_a_stream_cancels_the_job(client: OpenAI, served: Served) -> None:
    stream = client.images.generate(
        prompt="left", size="64x64", stream=True, partial_images=3, extra_body={"steps": 900}
    )
    next(iter(stream))
    stream.close()
    (job,) = [job for job in served.service.jobs() if job.request.prompt == "left"]
    assert served.service.wait(job.id, 60).state == "canceled"


def test_the_models_are_the_base_and_the_adapters(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "ring", "zorb"]
    assert client.models.retrieve("ring").owned_by == "loraline"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("dall-e-3")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("options", "param", "code"),
    [
        ({"size": "large"}, None, "invalid_value"),
        ({"size": "33x33", "extra_body": {"steps": 2}}, None, "invalid_value"),
        ({"n": 11}, "n", "invalid_value"),
        ({"response_format": "url"}, "response_format", "invalid_value"),
        ({"output_format": "gif"}, "output_format", "invalid_value"),
        ({"output_compression": 50}, "output_compression", "invalid_value"),
        ({"background": "transparent"}, "background", "invalid_value"),
        ({"frame_count": 3}, "frame_count", "unknown_parameter"),
        ({"extra_body": {"steps": 0}}, "steps", "invalid_value"),
        ({"extra_body": {"image": "http://127.0.0.1/secret.png"}}, "image", "unknown_parameter"),
        ({"extra_body": {"loras": [{"name": "zorb:1> <lora:ring"}]}}, None, "invalid_value"),
    ],
)
def test_a_field_that_cannot_be_honored_is_a_bad_request(
    client: OpenAI, options: dict, param: str | None, code: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt="a ring", **options)
    assert (caught.value.param, caught.value.code) == (param, code)
    assert caught.value.type == "invalid_request_error"
    assert len(caught.value.message) > 20


def test_an_unknown_model_or_adapter_is_not_found(client: OpenAI) -> None:
    for options in ({"model": "dall-e-3"}, {"model": "a/b"}, {"prompt": "a <lora:nothing>"}):
        with pytest.raises(openai.NotFoundError) as caught:
            client.images.generate(**{"prompt": "a ring", **options})
        assert caught.value.code == "model_not_found"


def test_an_edit_refuses_what_is_no_image_or_no_mask(client: OpenAI, photo: Image.Image) -> None:
    broken = io.BytesIO(b"no image")
    broken.name = "image.png"
    for files, message in (
        ({"image": broken}, "is not a readable image"),
        ({"image": [png(photo), png(photo)]}, "one image, and one mask"),
        ({"image": png(photo), "mask": png(photo)}, "no transparent parts"),
        ({"image": png(photo), "mask": png(Image.new("RGBA", (8, 8)))}, "the mask has 8 x 8 pixels"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            client.images.edit(prompt="a ring", **files)


def test_a_full_queue_is_a_rate_limit(tmp_path: Path) -> None:
    with serving(Home.open(tmp_path / "home"), queue_limit=1, tenant_limit=1) as served, ExitStack() as stack:
        address = f"{served.url}/v1/images/generations"
        slow = {"prompt": "slow", "size": "64x64", "steps": 900}
        client = stack.enter_context(OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60))
        for state in ("running", "queued"):
            thread = threading.Thread(target=httpx.post, args=(address,), kwargs={"json": slow, "timeout": 60})
            thread.start()
            stack.callback(thread.join)
            wait_for_state(served, state)
        with pytest.raises(openai.RateLimitError) as caught:
            client.images.generate(prompt="a ring", **SMALL)
        assert caught.value.code == "rate_limit_exceeded"
        assert int(caught.value.response.headers["Retry-After"]) > 0
        for job in served.service.jobs():
            served.service.cancel(job.id)
        assert client.images.generate(prompt="a ring", **SMALL).size == "32x32"


def wait_for_state(served: Served, state: str) -> None:
    deadline = time.monotonic() + 60
    while state not in {job.state for job in served.service.jobs()}:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_token_is_the_key_and_tenants_see_their_own_jobs_only(tmp_path: Path) -> None:
    keys = write_tokens(tmp_path / "tokens.yaml", ("ann", "a"), ("bob", "b"))
    with serving(Home.open(tmp_path / "home"), tokens=tmp_path / "tokens.yaml") as served:
        address = f"{served.url}/v1"
        with OpenAI(base_url=address, api_key=keys[0], max_retries=0, timeout=60) as client:
            assert client.images.generate(prompt="a ring", **SMALL).size == "32x32"
        stranger = OpenAI(base_url=address, api_key="wrong", max_retries=0, timeout=60)
        with stranger, pytest.raises(openai.AuthenticationError):
            stranger.images.generate(prompt="a ring", **SMALL)
        ann, bob = (WebUIApi(port=served.port, username="user", password=key) for key in keys)
        result: list[Any] = []
        options = {"prompt": "a ring", "width": 64, "height": 64, "steps": 900, "sampler_name": "Euler"}
        drawing = threading.Thread(target=lambda: result.append(ann.txt2img(**options)))
        drawing.start()
        wait_for_state(served, "running")
        assert bob.get_progress()["state"]["job_count"] == 0
        bob.interrupt()
        assert ann.get_progress()["state"]["job_count"] == 1
        ann.interrupt()
        drawing.join()
        assert result[0].info["interrupted"] is True


def test_the_stream_of_a_job_that_fails_raises_the_message(client: OpenAI) -> None:
    stream = client.images.generate(prompt="a ring", size="33x33", stream=True, extra_body={"steps": 2})
    with pytest.raises(openai.APIError, match="33 pixels"):
        list(stream)


def test_the_answer_of_an_image_has_its_settings_in_the_file(client: OpenAI) -> None:
    answer = client.images.generate(prompt="a ring", **SMALL)
    image = Image.open(io.BytesIO(b64decode(answer.data[0].b64_json)))
    assert "Seed: 7" in image.info["parameters"]
    assert json.loads(image.info["loraline"])["prompt"] == "a ring"

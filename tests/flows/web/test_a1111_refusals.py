"""Requests of A1111's API that cannot be honored: status and message, and neutral values that change nothing."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from flows.web.a1111_infotext import fill_unset, infotext_values
from registry.versions.deletion import withdraw
from registry.versions.promotion import promote
from registry.versions.versions import Versions
from tests.flows.web.served import Served

SMALL = {"prompt": "a ring", "width": 32, "height": 32, "steps": 2, "seed": 1}


def encoded(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


GRAY = encoded(Image.new("RGB", (32, 32), "gray"))


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{served.url}/sdapi/v1", timeout=60) as made:
        yield made


def refused(client: httpx.Client, path: str, body: dict[str, Any]) -> tuple[int, str]:
    """Returns status and message of an error, whose form it checks."""
    response = client.post(path, json=body)
    answer = response.json()
    assert answer.keys() == {"error", "detail", "body", "errors"}
    assert answer["detail"] == answer["errors"]
    return response.status_code, answer["detail"]


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"sampler_name": "No such"}, 404, "Sampler not found"),
        ({"scheduler": "no_such"}, 404, "Sampler not found"),
        ({"prompt": "a <lora:nothing:1>"}, 404, "nothing"),
        ({"prompt": "a <lora:zorb@99:1>"}, 404, "zorb"),
        ({"prompt": "a <lora:../../etc/passwd:1>"}, 422, "invalid adapter"),
        ({"prompt": "a <lora:zorb:x>"}, 422, "tag"),
        ({"lora": [{"path": "/etc/passwd"}]}, 422, "invalid adapter"),
        ({"lora": [{"name": "zorb:1> <lora:ring"}]}, 422, "invalid adapter"),
        ({"alwayson_scripts": {"ControlNet": {"args": []}}}, 422, "always on script 'ControlNet' not found"),
        ({"script_name": "X/Y/Z plot"}, 422, "Script 'X/Y/Z plot' not found"),
        ({"restore_faces": True}, 422, "restore_faces"),
        ({"tiling": True}, 422, "tiling"),
        ({"subseed_strength": 1.5}, 422, "subseed_strength"),
        ({"seed_resize_from_w": 16_000, "seed_resize_from_h": 16_000}, 422, "pixels of an image"),
        ({"seed_resize_from_w": 33, "seed_resize_from_h": 32}, 422, "33 pixels"),
        ({"styles": ["film"]}, 422, "styles"),
        ({"eta": 0.5}, 422, "eta"),
        ({"s_churn": 1}, 422, "s_churn"),
        ({"refiner_checkpoint": "xl-refiner"}, 422, "refiner_checkpoint"),
        ({"enable_hr": True, "hr_second_pass_steps": 7}, 422, "hr_second_pass_steps"),
        ({"enable_hr": True, "hr_scale": 9}, 422, "enlarge"),
        ({"override_settings": {"sd_model_checkpoint": "other"}}, 422, "sd_model_checkpoint"),
        ({"override_settings": {"sd_vae": "other.pt"}}, 422, "sd_vae"),
        ({"override_settings": {"CLIP_stop_at_last_layers": 3}}, 422, "has 2 layers"),
        ({"override_settings": {"CLIP_stop_at_last_layers": "x"}}, 422, "CLIP_stop_at_last_layers"),
        ({"steps": 0}, 422, "steps"),
        ({"steps": "many"}, 422, "steps"),
        ({"n_iter": 100, "batch_size": 8}, 422, "images"),
        ({"width": 33}, 422, "33 pixels"),
        ({"cfg_scale": -1}, 422, "guidance"),
        ({"infotext": "a\nSteps: x, Sampler: Euler, Seed: 1"}, 422, "Steps is 'x'"),
    ],
)
def test_a_field_that_cannot_be_honored_is_refused(
    client: httpx.Client, fields: dict[str, Any], status: int, message: str
) -> None:
    body = fields if "infotext" in fields else {**SMALL, **fields}
    code, detail = refused(client, "/txt2img", body)
    assert (code, message in detail) == (status, True), detail


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"init_images": []}, 404, "Init image not found"),
        ({"init_images": ["http://127.0.0.1:1/secret.png"]}, 422, "base64"),
        ({"init_images": ["file:///etc/passwd"]}, 422, "base64"),
        ({"init_images": ["/etc/passwd"]}, 422, "init_images"),
        ({"init_images": [base64.b64encode(b"no image").decode()]}, 422, "is not a readable image"),
        ({"init_images": [""]}, 422, "the image is empty"),
        ({"init_images": [GRAY, GRAY]}, 422, "2 images"),
        ({"mask": "https://example.com/mask.png"}, 422, "base64"),
        ({"mask": encoded(Image.new("L", (8, 8), 255))}, 422, "the mask has 8 x 8 pixels"),
        ({"mask": encoded(Image.new("L", (32, 32), 0))}, 422, "the mask is empty"),
        ({"mask": GRAY, "inpainting_fill": 2}, 422, "inpainting_fill"),
        ({"mask": GRAY, "mask_blur_x": 1, "mask_blur_y": 2}, 422, "mask_blur_x"),
        ({"resize_mode": 3}, 422, "resize_mode"),
        ({"denoising_strength": 0}, 422, "denoising_strength"),
    ],
)
def test_an_image_that_cannot_be_used_is_refused(
    client: httpx.Client, fields: dict[str, Any], status: int, message: str
) -> None:
    code, detail = refused(client, "/img2img", {**SMALL, "init_images": [GRAY], **fields})
    assert (code, message in detail) == (status, True), detail
    assert "/tmp/" not in detail


def test_neutral_values_and_unknown_fields_change_nothing_and_are_named(client: httpx.Client) -> None:
    plain = client.post("/txt2img", json=SMALL).json()
    neutral = {
        "restore_faces": False,
        "tiling": False,
        "styles": [],
        "subseed": 5,
        "subseed_strength": 0,
        "eta": 1.0,
        "s_churn": 0,
        "s_tmax": 0,
        "s_noise": 1,
        "script_name": None,
        "refiner_checkpoint": None,
        "hr_prompt": "",
        "override_settings": {"CLIP_stop_at_last_layers": 1, "sd_vae": "Automatic", "samples_format": "webp"},
        "do_not_save_grid": True,
    }
    answer = client.post("/txt2img", json=SMALL | neutral).json()
    assert answer["images"] == plain["images"]
    assert json.loads(answer["info"])["ignored"] == [
        "do_not_save_grid",
        "override_settings.samples_format",
    ]
    assert json.loads(plain["info"])["ignored"] == []


def test_images_are_left_out_on_request_and_sources_are_repeated(client: httpx.Client) -> None:
    assert client.post("/txt2img", json=SMALL | {"send_images": False}).json()["images"] == []
    body = SMALL | {"init_images": [f"data:image/png;base64,{GRAY}"], "include_init_images": True}
    assert client.post("/img2img", json=body).json()["parameters"]["init_images"] == body["init_images"]


def test_another_alias_is_listed_and_a_withdrawn_version_is_gone(client: httpx.Client, served: Served) -> None:
    def listed() -> dict[str, str]:
        return {each["name"]: each["path"] for each in client.get("/loras").json()}

    bodies = [SMALL | {"prompt": f"a <lora:{name}:1>"} for name in ("zorb@trial", "zorb@2", "zorb-v2")]
    with closing(Versions(served.service.home)) as versions:
        promote(versions, "zorb", 2, "trial", reason="a test")
        assert listed() == {"zorb": "zorb@1", "ring": "ring@1", "zorb@trial": "zorb@2"}
        first, *others = [client.post("/txt2img", json=body).json()["images"] for body in bodies]
        assert [len(images) for images in (first, *others)] == [1, 1, 1]
        withdraw(versions, "zorb", 2, reason="a test")
    assert listed() == {"zorb": "zorb@1", "ring": "ring@1"}
    assert [refused(client, "/txt2img", body)[0] for body in bodies] == [404, 410, 410]


def test_half_of_a_character_is_refused(client: httpx.Client) -> None:
    response = client.post(
        "/txt2img", content=b'{"prompt": "\\ud800", "steps": 1}', headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 422
    assert "surrogate" in response.json()["detail"]


def test_a_source_image_is_deleted_when_its_job_has_ended(
    client: httpx.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.serving.uploads.find_scratch", lambda: str(tmp_path))
    assert client.post("/img2img", json=SMALL | {"init_images": [GRAY]}).status_code == 200
    assert refused(client, "/img2img", SMALL | {"init_images": [GRAY], "width": 33})[0] == 422
    assert list(tmp_path.iterdir()) == []


def test_an_infotext_is_read_as_a1111_reads_it() -> None:
    text = (
        "a ring, (red:1.2)\nsecond line\nNegative prompt: blue\ngreen\n"
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 3, Size: 512x768, "
        'Lora hashes: "a: 1, b: 2"'
    )
    settings = infotext_values(text)
    assert settings["Prompt"] == "a ring, (red:1.2)\nsecond line"
    assert settings["Negative prompt"] == "blue\ngreen"
    assert (settings["Size-1"], settings["Size-2"]) == ("512", "768")
    assert settings["Lora hashes"] == "a: 1, b: 2"
    assert infotext_values("only a prompt: here, nothing: else")["Prompt"] == "only a prompt: here, nothing: else"


def test_a_field_of_the_request_has_priority_over_the_infotext() -> None:
    text = "a ring\nSteps: 20, Sampler: Euler, Seed: 3, Hires upscale: 1.5, Clip skip: 2"
    filled = fill_unset({"steps": 5, "sampler_index": "DDIM"}, text)
    assert filled["steps"] == 5
    assert filled["seed"] == 3
    assert "sampler_name" not in filled
    assert filled["enable_hr"] is True
    assert filled["override_settings"] == {"CLIP_stop_at_last_layers": "2"}
    assert fill_unset({"override_settings": {"CLIP_stop_at_last_layers": 1}}, text)["override_settings"] == {
        "CLIP_stop_at_last_layers": 1
    }

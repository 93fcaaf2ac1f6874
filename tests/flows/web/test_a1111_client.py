"""webuiapi, a client of A1111's API, against a running server: all calls that it has methods for."""

from __future__ import annotations

import asyncio
import io
import json
import threading
import time
from base64 import b64decode
from functools import partial

import numpy as np
import pytest
import requests
from PIL import Image
from sd_parsers import ParserManager
from webuiapi import HiResUpscaler, WebUIApi, WebUIApiResult

from lora_engine.bases.samplers import SAMPLERS, SCHEDULE_TYPES
from tests.flows.web.served import Served

SMALL = {"width": 32, "height": 32, "steps": 2}


@pytest.fixture
def api(served: Served) -> WebUIApi:
    client = WebUIApi(port=served.port, sampler="Euler")
    client.session.request = partial(client.session.request, timeout=60)  # webuiapi waits forever
    return client


@pytest.fixture
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 255, (48, 48, 3), dtype=np.uint8))


def difference(first: Image.Image, second: Image.Image) -> np.ndarray:
    """Returns the largest difference of each pixel."""
    return np.abs(np.asarray(first.convert("RGB"), int) - np.asarray(second.convert("RGB"), int)).max(axis=2)


def test_a_prompt_with_an_adapter_is_drawn_and_described(api: WebUIApi) -> None:
    result = api.txt2img(prompt="a ring <lora:zorb:0.8>", negative_prompt="blue", seed=7, batch_size=2, **SMALL)
    assert [image.size for image in result.images] == [(32, 32)] * 2
    info = result.info
    assert info["all_seeds"] == [7, 8]
    assert info["seed"] == 7
    assert info["prompt"] == "a ring <lora:zorb:0.8>"
    assert info["adapters"] == ["zorb@1"]
    assert info["sampler_name"] == "Euler"
    assert info["infotexts"] == [image.info["parameters"] for image in result.images]
    assert "<lora:zorb-v1:0.8>" in info["infotexts"][0]
    assert "Lora hashes" in info["extra_generation_params"]
    assert result.parameters["steps"] == 2
    plain = api.txt2img(prompt="a ring", negative_prompt="blue", seed=7, **SMALL)
    assert difference(plain.image, result.image).max() > 0
    again = api.txt2img(prompt="a ring <lora:zorb@production:0.8>", negative_prompt="blue", seed=8, **SMALL)
    assert difference(again.image, result.images[1]).max() <= 1


def test_the_same_adapter_is_named_by_alias_label_version_and_entry(api: WebUIApi) -> None:
    def draw(prompt: str, **fields: object) -> Image.Image:
        payload = {"prompt": prompt, "seed": 3, "sampler_name": "Euler", **SMALL, **fields}
        return api.custom_post("sdapi/v1/txt2img", payload).image

    first = draw("a ring <lora:zorb:0.5>")
    for name in ("zorb@1", "zorb-v1", "zorb@production"):
        assert difference(first, draw(f"a ring <lora:{name}:0.5>")).max() == 0
    for entry in ({"name": "zorb", "weight": 0.5}, {"path": "zorb@1", "multiplier": 0.5, "is_high_noise": False}):
        assert difference(first, draw("a ring", lora=[entry])).max() == 0
    assert difference(first, draw("a ring")).max() > 0


def test_a_prompt_is_drawn_by_the_asynchronous_client(api: WebUIApi) -> None:
    async def draw() -> list[Image.Image]:
        tasks = [api.txt2img(prompt="a ring", seed=seed, use_async=True, **SMALL) for seed in (1, 1, 2)]
        return [result.image for result in await asyncio.gather(*tasks)]

    first, same, other = asyncio.run(draw())
    assert difference(first, same).max() == 0
    assert difference(first, other).max() > 0


def test_an_enlarged_image_has_the_size_that_is_asked_for(api: WebUIApi) -> None:
    options = {"prompt": "a ring", "seed": 1, "enable_hr": True, "hr_scale": 1.5, **SMALL}
    result = api.txt2img(**options)
    assert result.image.size == (48, 48)
    assert result.info["extra_generation_params"]["Hires upscaler"] == "Lanczos"
    assert api.txt2img(**{**options, "hr_resize_x": 64, "hr_resize_y": 64}).image.size == (64, 64)
    with pytest.raises(RuntimeError, match="hr_upscaler"):
        api.txt2img(**options, hr_upscaler=HiResUpscaler.ESRGAN_4x)
    with pytest.raises(RuntimeError, match="hr_resize"):
        api.txt2img(**{**options, "hr_resize_x": 64, "hr_resize_y": 48})


def test_an_image_is_changed_as_a_whole(api: WebUIApi, photo: Image.Image) -> None:
    near, far = (
        api.img2img(images=[photo], prompt="a ring", seed=1, denoising_strength=strength, width=32, height=32, steps=4)
        for strength in (0.25, 1.0)
    )
    assert near.image.size == (32, 32)
    small = photo.resize((32, 32), Image.Resampling.LANCZOS)
    assert difference(near.image, small).mean() < difference(far.image, small).mean()
    assert near.parameters["init_images"] is None


@pytest.mark.parametrize("only_masked", [True, False])
def test_an_image_is_changed_under_a_mask_only(api: WebUIApi, photo: Image.Image, only_masked: bool) -> None:
    mask = Image.new("RGB", photo.size, "black")
    mask.paste("white", (16, 16, 32, 32))
    result = api.img2img(
        images=[photo],
        mask_image=mask,
        mask_blur=0,
        inpaint_full_res=only_masked,
        inpaint_full_res_padding=4,
        prompt="a ring",
        seed=1,
        **{**SMALL, "width": 32 if only_masked else 48, "height": 32 if only_masked else 48},
    )
    assert result.image.size == photo.size
    changed = difference(result.image, photo)
    inside = np.asarray(mask.convert("L")) > 0
    assert changed[~inside].max() == 0
    assert changed[inside].max() > 8
    assert "Denoising strength: 0.75" in result.image.info["parameters"]


def test_the_model_is_set_by_its_title_and_another_is_refused(api: WebUIApi) -> None:
    (model,) = api.get_sd_models()
    assert model["title"] == f"tiny [{model['hash']}]"
    assert api.util_get_current_model() == model["title"]
    assert api.util_get_model_names() == ["tiny"] or api.util_get_model_names() == [model["title"]]
    api.util_set_model("tiny")
    api.util_wait_for_ready(check_interval=0.01)
    assert api.set_options(api.get_options()) is None
    refused = api.set_options({"sd_model_checkpoint": "v1-5-pruned"})
    assert refused["error"] == "SettingsError"
    assert model["title"] in refused["detail"]
    assert "CLIP_stop_at_last_layers" in api.set_options({"CLIP_stop_at_last_layers": 2})["detail"]


def test_the_lists_name_what_can_be_used(api: WebUIApi) -> None:
    loras = {each["name"]: each for each in api.get_loras()}
    assert loras.keys() == {"zorb", "ring"}
    assert loras["zorb"]["path"] == "zorb@1"
    assert loras["zorb"]["alias"] == "zorb-v1"
    assert [each["aliases"] for each in api.get_samplers()] == [[name] for name in SAMPLERS]
    assert [each["name"] for each in api.get_schedulers()] == list(SCHEDULE_TYPES)
    assert [each["name"] for each in api.get_upscalers()] == ["Lanczos"]
    assert api.get_scripts() == {"txt2img": [], "img2img": []}
    assert api.get_embeddings() == {"loaded": {}, "skipped": {}}
    assert api.get_memory()["ram"]["total"] > 0
    assert api.get_cmd_flags()["api"] is True
    empty = (
        *(api.get_latent_upscale_modes, api.get_sd_vae, api.get_hypernetworks, api.get_face_restorers),
        *(api.get_realesrgan_models, api.get_prompt_styles),
    )
    assert [call() for call in empty] == [[]] * len(empty)
    assert [api.custom_get(f"sdapi/v1/{name}") for name in ("sd-modules", "script-info")] == [[], []]
    assert api.refresh_checkpoints() is None
    for name in ("refresh-loras", "refresh-vae"):
        assert requests.post(f"{api.baseurl}/{name}", timeout=60).json() is None
    assert api.custom_get("internal/ping") == {}


# In the schedulers of diffusers, numpy passes tensors arguments that torch does not support yet.
@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
def test_every_sampler_of_the_list_draws_with_its_listed_name(api: WebUIApi) -> None:
    names = [each["name"] for each in api.get_samplers()]
    assert len(names) > 20
    for name in names:
        result = api.txt2img(prompt="a ring", seed=1, sampler_name=name, **{**SMALL, "steps": 3})
        assert result.info["sampler_name"] == name


@pytest.mark.parametrize(
    ("name", "scheduler", "written"),
    [
        ("DPM++ 2M", "Karras", "Karras"),
        ("DPM++ 2M Karras", "automatic", "Karras"),
        ("DPM++ 2M Karras", "Exponential", "Karras"),
        ("Euler", "sgm_uniform", "SGM Uniform"),
        ("Euler", "SGM Uniform", "SGM Uniform"),
    ],
)
def test_a_schedule_type_is_taken_from_the_sampler_or_its_own_field(
    api: WebUIApi, name: str, scheduler: str, written: str
) -> None:
    result = api.txt2img(prompt="a ring", seed=1, sampler_name=name, scheduler=scheduler, **SMALL)
    assert result.info["extra_generation_params"]["Schedule type"] == written


def test_progress_is_shown_and_an_interrupt_answers_without_images(api: WebUIApi, served: Served) -> None:
    idle = api.get_progress()
    assert idle["progress"] == 0.0
    assert idle["state"]["job_count"] == 0
    results = []
    drawing = threading.Thread(
        target=lambda: results.append(api.txt2img(prompt="a ring", seed=1, width=64, height=64, steps=900))
    )
    drawing.start()
    deadline = time.monotonic() + 60
    try:
        while (shown := api.get_progress())["progress"] == 0.0:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert 0.0 < shown["progress"] < 1.0
        assert shown["state"]["job_count"] == 1
        assert shown["state"]["sampling_steps"] == 900
        assert Image.open(io.BytesIO(b64decode(shown["current_image"]))).size[0] > 0
        assert api.custom_get("sdapi/v1/progress?skip_current_image=true")["current_image"] is None
    finally:
        assert api.interrupt() is None
    drawing.join()
    assert results[0].images == []
    assert results[0].info["interrupted"] is True
    assert api.skip() is None  # nothing is drawn any more
    assert api.get_progress()["state"]["job_count"] == 0


def test_a_client_that_goes_away_cancels_its_job(api: WebUIApi, served: Served) -> None:
    with pytest.raises(requests.exceptions.ReadTimeout):
        requests.post(
            f"{api.baseurl}/txt2img", json={"prompt": "left", "width": 64, "height": 64, "steps": 900}, timeout=1
        )
    (job,) = [job for job in served.service.jobs() if job.request.prompt == "left"]
    assert served.service.wait(job.id, 120).state == "canceled"


def test_the_infotext_of_an_image_draws_it_again(api: WebUIApi) -> None:
    drawn = api.txt2img(
        prompt="a ring <lora:zorb:0.8>",
        negative_prompt="blue",
        seed=11,
        cfg_scale=4.5,
        sampler_name="DPM++ 2M",
        scheduler="Karras",
        **SMALL,
    )
    text = drawn.image.info["parameters"]
    again = api.custom_post("sdapi/v1/txt2img", {"infotext": text})
    assert difference(again.image, drawn.image).max() <= 1
    assert again.info["seed"] == 11
    other = api.custom_post("sdapi/v1/txt2img", {"infotext": text, "seed": 12})
    assert other.info["seed"] == 12
    assert difference(other.image, drawn.image).max() > 1


def test_clip_skip_is_taken_from_override_settings_and_is_in_the_infotext(api: WebUIApi) -> None:
    def draw(**fields: object) -> WebUIApiResult:
        return api.txt2img(prompt="a ring", seed=11, **SMALL, **fields)

    plain, first = draw(), draw(override_settings={"CLIP_stop_at_last_layers": 2})
    assert (plain.info["clip_skip"], first.info["clip_skip"]) == (1, 2)
    assert "Clip skip" not in plain.info["infotexts"][0]
    assert "Clip skip: 2," in first.info["infotexts"][0]
    assert difference(first.image, plain.image).max() > 1
    again = api.custom_post("sdapi/v1/txt2img", {"infotext": first.info["infotexts"][0]})
    assert difference(again.image, first.image).max() <= 1


def test_a_variation_keeps_the_seed_and_counts_its_own_up(api: WebUIApi) -> None:
    def draw(**fields: object) -> WebUIApiResult:
        return api.txt2img(prompt="a ring", seed=11, **SMALL, **fields)

    plain, first = draw(), draw(subseed=3, subseed_strength=0.4, batch_size=2)
    assert (first.info["all_seeds"], first.info["all_subseeds"]) == ([11, 11], [3, 4])
    assert first.info["subseed_strength"] == 0.4
    assert difference(first.images[0], plain.image).max() > 1
    assert difference(first.images[0], first.images[1]).max() > 1
    assert ["Variation seed: 3" in text for text in first.info["infotexts"]] == [True, False]
    other = draw(subseed=4, subseed_strength=0.4)
    assert difference(other.image, first.images[1]).max() <= 1
    again = api.custom_post("sdapi/v1/txt2img", {"infotext": other.image.info["parameters"]})
    assert difference(again.image, other.image).max() <= 1


def test_noise_of_another_size_is_put_into_the_middle(api: WebUIApi) -> None:
    options = {"prompt": "a ring", "seed": 11, "width": 48, "height": 32, "steps": 2}
    plain = api.txt2img(**options)
    resized = api.txt2img(**options, seed_resize_from_w=32, seed_resize_from_h=32)
    assert (resized.info["seed_resize_from_w"], resized.info["seed_resize_from_h"]) == (32, 32)
    assert difference(resized.image, plain.image).max() > 1
    half = api.txt2img(**options, seed_resize_from_w=32)
    assert difference(half.image, plain.image).max() == 0, "as in A1111, one side alone has no effect"
    again = api.custom_post("sdapi/v1/txt2img", {"infotext": resized.image.info["parameters"]})
    assert difference(again.image, resized.image).max() <= 1


def test_png_info_reads_what_the_server_wrote(api: WebUIApi) -> None:
    drawn = api.txt2img(prompt="a ring", seed=5, **SMALL)
    payload = {"image": drawn.json["images"][0]}
    info = requests.post(f"{api.baseurl}/png-info", json=payload, timeout=60).json()
    assert info["info"] == drawn.image.info["parameters"]
    assert info["parameters"]["Seed"] == "5"
    assert info["parameters"]["Size-1"] == "32"
    assert json.loads(info["items"]["loraline"])["seed"] == 5
    assert api.png_info(drawn.image).info == info["info"]
    assert api.png_info(Image.new("RGB", (8, 8))).info == ""


def test_sd_parsers_reads_an_image_of_the_server(api: WebUIApi) -> None:
    drawn = api.txt2img(prompt="a ring", negative_prompt="blue", seed=5, **SMALL)
    parsed = ParserManager().parse(io.BytesIO(b64decode(drawn.json["images"][0])))
    assert parsed is not None
    (sampler,) = parsed.samplers
    assert sampler.name == "Euler"
    assert sampler.parameters["seed"] == "5"
    assert [prompt.value for prompt in sampler.prompts] == ["a ring"]
    assert [prompt.value for prompt in sampler.negative_prompts] == ["blue"]

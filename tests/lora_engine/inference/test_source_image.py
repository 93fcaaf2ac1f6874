"""Images drawn from other images, and under masks: parity with diffusers, and what masks keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from lora_engine.bases.base import BaseModel, load_base
from lora_engine.errors import InterruptedRun, SettingsError
from lora_engine.inference.composed_images import generate_composed
from lora_engine.inference.composition import compose
from lora_engine.inference.prompts.prompt import parse_prompt
from lora_engine.inference.source_image import SourceImage, fit_image, fit_mask
from tests.support.untrained import write_untrained_base

SIZE = (16, 16)


def source(strength: float, mask: Tensor | None = None) -> SourceImage:
    pixels = torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(5)) * 2 - 1
    return SourceImage(pixels, strength, mask)


def half_mask() -> Tensor:
    mask = torch.zeros(1, *SIZE)
    mask[:, :, 8:] = 1.0
    return mask


def draw(base: BaseModel, image: SourceImage | None, sampler: str | None = None, **settings: Any) -> Tensor:
    prompt, negative = parse_prompt("a ring"), parse_prompt("", is_negative=True)
    settings = {"seeds": [1, 2], "steps": 4, "height": SIZE[0], "width": SIZE[1], **settings}
    with compose(base, []) as composition:
        return generate_composed(
            base, prompt, composition, negative=negative, sampler=sampler, source=image, **settings
        )


def pipeline_of(base: BaseModel, task: str, sampler: str | None) -> Any:
    import diffusers

    model: Any = base
    scheduler = base.scheduler(sampler=sampler)
    parts = {"vae": model.vae, "tokenizer": model.tokenizer, "scheduler": scheduler, **base.modules}
    if base.family == "sd":
        extra = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = getattr(diffusers, f"StableDiffusion{task}Pipeline")(**parts, **extra)
    else:
        extra = {"tokenizer_2": model.tokenizer_2, "add_watermarker": False}
        pipeline = getattr(diffusers, f"StableDiffusionXL{task}Pipeline")(**parts, **extra)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def expected_of(pipeline: Any, base: BaseModel, image: SourceImage, **inputs: Any) -> Tensor:
    latents = base.encode_images(image.pixels[None]).expand(2, -1, -1, -1)
    return (
        2
        * pipeline(  # type: ignore[no-any-return]
            prompt=["a ring"] * 2,
            image=latents,
            strength=image.strength,
            num_inference_steps=4,
            guidance_scale=3.0,
            generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
            output_type="pt",
            **inputs,
        ).images
        - 1
    )


@pytest.mark.parametrize(("strength", "sampler"), [(0.5, None), (0.75, "euler"), (0.8, "ddim"), (0.5, "heun")])
def test_images_from_images_equal_those_of_diffusers(base: BaseModel, strength: float, sampler: str | None) -> None:
    image = source(strength)
    expected = expected_of(pipeline_of(base, "Img2Img", sampler), base, image)
    actual = draw(base, image, sampler)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-4)
    assert (actual - draw(base, None, sampler)).abs().max() > 0.01


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_masked_images_equal_those_of_diffusers_under_the_mask(base: BaseModel, strength: float) -> None:
    mask = half_mask()
    image = source(strength, mask)
    pipeline = pipeline_of(base, "Inpaint", None)
    same = {"height": SIZE[0], "width": SIZE[1], "masked_image_latents": torch.zeros(2, *base.latent_shape(SIZE))}
    expected = expected_of(pipeline, base, image, mask_image=mask[None].expand(2, -1, -1, -1), **same)
    actual = draw(base, image)
    torch.testing.assert_close(actual[..., 8:], expected[..., 8:], rtol=1e-4, atol=2e-4)


def test_what_a_mask_leaves_out_keeps_its_pixels(base: BaseModel) -> None:
    image = source(0.8, half_mask())
    drawn = draw(base, image)
    assert torch.equal(drawn[..., :8], image.pixels[None, ..., :8].expand(2, -1, -1, -1))
    assert (drawn[..., 8:] - image.pixels[None, ..., 8:]).abs().max() > 0.01


def test_full_strength_without_a_mask_is_an_image_from_the_prompt_alone(base: BaseModel) -> None:
    assert torch.equal(draw(base, source(1.0)), draw(base, None))


def test_an_inpainting_base_reads_the_mask_and_the_rest_of_the_image(tmp_path: Path) -> None:
    base = load_base(str(write_untrained_base(tmp_path / "base", "small-sd-inpainting")), device="cpu")
    drawn = draw(base, source(1.0, half_mask()))
    other = SourceImage(-source(1.0).pixels, 1.0, half_mask())
    assert torch.equal(drawn[..., :8], source(1.0).pixels[None, ..., :8].expand(2, -1, -1, -1))
    assert (drawn - draw(base, other))[..., 8:].abs().max() > 1e-4


def test_the_steps_that_run_are_counted_and_can_be_stopped(base: BaseModel) -> None:
    seen: list[tuple[int, int]] = []

    def note(done: int, total: int, latents: Tensor) -> None:
        assert latents.shape == (2, *base.latent_shape(SIZE))
        seen.append((done, total))
        if done == 3:
            raise InterruptedRun("stopped")

    with pytest.raises(InterruptedRun):
        draw(base, source(0.75), on_step=note)
    assert seen == [(2, 4), (3, 4)]


@pytest.mark.parametrize("strength", [0.0, -1.0, 1.5, float("nan")])
def test_a_strength_outside_0_to_1_is_refused(strength: float) -> None:
    with pytest.raises(SettingsError, match="strength is"):
        source(strength)


def test_a_mask_without_light_parts_is_refused() -> None:
    with pytest.raises(SettingsError, match="the mask is empty"):
        source(0.5, torch.zeros(1, *SIZE))


def test_an_image_and_its_mask_are_cropped_alike() -> None:
    image, mask = Image.new("RGB", (40, 20)), Image.new("L", (40, 20))
    image.paste((255, 255, 255), (20, 0, 40, 20))
    mask.paste(255, (20, 0, 40, 20))
    pixels, weights = fit_image(image, SIZE), fit_mask(mask, SIZE)
    assert pixels.shape == (3, *SIZE)
    torch.testing.assert_close((pixels[:1] + 1) / 2, weights)
    assert weights[0, 8, 3] == 0.0
    assert weights[0, 8, 12] == 1.0

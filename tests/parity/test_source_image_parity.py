"""Images from images and under masks with the flow families, against the pipelines of diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from lora_engine.bases.base import BaseModel, load_base
from lora_engine.inference.composed_images import generate_composed
from lora_engine.inference.composition import compose
from lora_engine.inference.prompts.prompt import parse_prompt
from lora_engine.inference.source_image import SourceImage
from tests.support.untrained import write_untrained_base

SIZE = (16, 24)
STEPS = 4
PIPELINES = {
    "small-sd3-wide": "StableDiffusion3{}Pipeline",
    "small-flux": "Flux{}Pipeline",
    "small-flux-schnell": "Flux{}Pipeline",
}


@pytest.fixture(scope="module", params=PIPELINES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, BaseModel, Path]:
    folder = write_untrained_base(tmp_path_factory.mktemp("base") / request.param, request.param)
    return PIPELINES[request.param], load_base(str(folder), device="cpu"), folder


def source(strength: float, *, masked: bool) -> SourceImage:
    pixels = torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(5)) * 2 - 1
    mask = torch.zeros(1, *SIZE)
    mask[:, :, 8:] = 1.0
    return SourceImage(pixels, strength, mask if masked else None)


def draw(base: BaseModel, image: SourceImage) -> Tensor:
    with compose(base, []) as composition:
        return generate_composed(
            base,
            parse_prompt("a ring"),
            composition,
            negative=parse_prompt("", is_negative=True),
            seeds=[1, 2],
            steps=STEPS,
            guidance=3.0,
            height=SIZE[0],
            width=SIZE[1],
            source=image,
        )


def expected_of(name: str, folder: Path, base: BaseModel, strength: float, **inputs: Any) -> Tensor:
    pipeline = getattr(diffusers, name).from_pretrained(str(folder))
    pipeline.set_progress_bar_config(disable=True)
    # The pipelines for masks sample the latents of the image; ours are the mode.
    pipeline._encode_vae_image = lambda image, generator: base.encode_images(image)
    # The pipeline of SD3 for masks decodes without the autoencoder's shift (diffusers 0.42.1).
    decodes = name != "StableDiffusion3InpaintPipeline"
    drawn: Tensor = pipeline(
        prompt=["a ring"] * 2,
        strength=strength,
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
        max_sequence_length=24,
        output_type="pt" if decodes else "latent",
        **inputs,
    ).images
    return 2 * drawn - 1 if decodes else base.decode_latents(drawn).clamp(-1, 1)


@pytest.mark.parametrize("strength", [0.5, 0.75])
@torch.no_grad()
def test_an_image_from_an_image_equals_that_of_the_pipeline(pair: tuple[str, BaseModel, Path], strength: float) -> None:
    name, base, folder = pair
    image = source(strength, masked=False)
    latents = base.encode_images(image.pixels[None]).expand(2, -1, -1, -1)
    expected = expected_of(name.format("Img2Img"), folder, base, strength, image=latents)
    torch.testing.assert_close(draw(base, image), expected, rtol=1e-4, atol=1e-4)
    assert (expected - draw(base, source(0.25, masked=False))).abs().max() > 0.01


@torch.no_grad()
def test_a_masked_image_equals_that_of_the_pipeline_under_the_mask(pair: tuple[str, BaseModel, Path]) -> None:
    name, base, folder = pair
    image = source(0.75, masked=True)
    assert image.mask is not None
    mask = image.mask[None].expand(2, -1, -1, -1)
    pixels = (image.pixels[None] / 2 + 0.5).expand(2, -1, -1, -1)
    expected = expected_of(name.format("Inpaint"), folder, base, image.strength, image=pixels, mask_image=mask)
    actual = draw(base, image)
    torch.testing.assert_close(actual[..., 8:], expected[..., 8:], rtol=1e-4, atol=2e-4)
    assert torch.equal(actual[..., :8], image.pixels[None, ..., :8].expand(2, -1, -1, -1))

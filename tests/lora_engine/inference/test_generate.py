from __future__ import annotations

from typing import Any

import pytest
import torch

from lora_engine.adapters import attach, create_adapter
from lora_engine.bases.base import BaseModel
from lora_engine.errors import SettingsError
from lora_engine.inference.generate import draw_noise, generate


def draw(base: BaseModel, prompts: list[str], seeds: list[int], **settings: Any) -> torch.Tensor:
    return generate(base, prompts, seeds=seeds, **{"steps": 3, **settings})


def test_images_have_the_requested_size_and_range(base: BaseModel) -> None:
    images = draw(base, ["a", "b"], [1, 2], height=16, width=24)
    assert images.shape == (2, 3, 16, 24)
    assert images.abs().max() <= 1.0


def test_the_same_seed_gives_the_same_bits(base: BaseModel) -> None:
    assert torch.equal(draw(base, ["a", "b"], [1, 2]), draw(base, ["a", "b"], [1, 2]))


def test_an_image_does_not_depend_on_other_seeds_of_the_batch(base: BaseModel) -> None:
    first, second = draw(base, ["a", "b"], [1, 2]), draw(base, ["a", "b"], [1, 99])
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])


def test_the_batch_size_does_not_change_the_images(base: BaseModel) -> None:
    prompts, seeds = ["a", "b", "c"], [1, 2, 3]
    together, alone = draw(base, prompts, seeds), draw(base, prompts, seeds, batch=1)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_the_global_generator_is_not_touched(base: BaseModel) -> None:
    state = torch.get_rng_state()
    draw(base, ["a"], [1])
    assert torch.equal(torch.get_rng_state(), state)


def test_prompt_and_guidance_change_the_image(base: BaseModel) -> None:
    plain = draw(base, ["a"], [1])
    assert not torch.equal(plain, draw(base, ["b"], [1]))
    assert not torch.equal(plain, draw(base, ["a"], [1], guidance=1.0))
    assert not torch.equal(plain, draw(base, ["a"], [1], negative="b"))


def test_an_attached_adapter_changes_the_image_and_a_new_one_does_not(base: BaseModel) -> None:
    plain = draw(base, ["a"], [1])
    adapter = create_adapter(base, "attention", "lora", 2, None, generator=torch.Generator().manual_seed(0))
    with attach(base, adapter, trainable=True) as attachment:
        assert torch.equal(draw(base, ["a"], [1]), plain)
        with torch.no_grad():
            for value in attachment.parameters():
                value.add_(0.5)
        assert not torch.equal(draw(base, ["a"], [1]), plain)
    assert torch.equal(draw(base, ["a"], [1]), plain)


def test_progress_counts_images(base: BaseModel) -> None:
    seen: list[tuple[int, int]] = []
    draw(base, ["a", "b", "c"], [1, 2, 3], batch=2, progress=lambda done, total, values: seen.append((done, total)))
    assert seen == [(2, 3), (3, 3)]


def test_no_prompts_give_no_images(base: BaseModel) -> None:
    assert draw(base, [], []).shape[0] == 0


@pytest.mark.parametrize(
    ("change", "problem"),
    [({"seeds": [1, 2]}, "1 prompts and 2 seeds"), ({"steps": 0}, "steps is 0"), ({"height": 15}, "15 x 16")],
)
def test_invalid_settings_are_refused(base: BaseModel, change: dict[str, Any], problem: str) -> None:
    with pytest.raises(SettingsError, match=problem):
        generate(base, ["a"], **{"seeds": [1], **change})


def test_images_equal_those_of_the_pipelines_of_diffusers(base: BaseModel) -> None:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    model: Any = base
    parts = {"vae": model.vae, "tokenizer": model.tokenizer, "scheduler": base.scheduler(), **base.modules}
    if base.family == "sd":
        extra = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = StableDiffusionPipeline(**parts, **extra)
    else:
        pipeline = StableDiffusionXLPipeline(**parts, tokenizer_2=model.tokenizer_2, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        prompt=["a", "b"],
        latents=torch.stack([draw_noise(base.latent_shape((16, 16)), seed) for seed in (1, 2)]),
        num_inference_steps=4,
        guidance_scale=3.0,
        height=16,
        width=16,
        output_type="pt",
    ).images
    actual = draw(base, ["a", "b"], [1, 2], steps=4, guidance=3.0, height=16, width=16)
    torch.testing.assert_close((actual + 1) / 2, expected, rtol=1e-4, atol=1e-4)

"""Images from prompts with adapters: weights over steps and blocks, texts that change, AND and BREAK."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from lora_engine.adapters import Adapter, collapse
from lora_engine.adapters.adapted import AdaptedLayer
from lora_engine.bases.base import BaseModel
from lora_engine.bases.long_text import count_chunks
from lora_engine.errors import SettingsError
from lora_engine.formats import Bundle, Card
from lora_engine.inference.composition import compose
from lora_engine.inference.generate import Guidance, draw_noise, generate, sample
from lora_engine.inference.prompts.blocks import block_lists, weight_of_module
from lora_engine.inference.prompts.prompt import parse_prompt
from tests.lora_engine.inference.composed import STEPS, draw_composed, fused, random_adapter


def _plain(base: BaseModel, prompt: str, negative: str = "", guidance: float = 3.0) -> Tensor:
    return generate(
        base,
        [prompt] * 2,
        seeds=[1, 2],
        steps=STEPS,
        guidance=guidance,
        negative=negative,
        height=16,
        width=16,
    )


def _close(first: Tensor, second: Tensor) -> None:
    torch.testing.assert_close(first, second, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_plain_prompt_gives_the_images_of_generate(base: BaseModel, guidance: float) -> None:
    drawn = draw_composed(base, "a red zorb", negative="blue", guidance=guidance)
    # The text is encoded once, not once per image, which rounds differently.
    _close(drawn, _plain(base, "a red zorb", "blue", guidance))


@pytest.mark.parametrize("kinds", [["lora"], ["lora", "loha", "lokr"]])
def test_constant_weights_equal_fused_adapters_and_leave_the_base_as_it_was(base: BaseModel, kinds: list[str]) -> None:
    adapters = [random_adapter(base, kind, seed) for seed, kind in enumerate(kinds)]
    weights = [0.7, -0.4, 1.2][: len(kinds)]
    tags = " ".join(f"<lora:a{index}:{weight}>" for index, weight in enumerate(weights))
    before = _plain(base, "a ring")
    drawn = draw_composed(base, f"a ring {tags}", adapters)
    assert torch.equal(_plain(base, "a ring"), before)
    with fused(base, list(zip(adapters, weights, strict=True))):
        _close(drawn, _plain(base, "a ring"))
    assert (drawn - before).abs().max() > 0.01


@pytest.mark.parametrize("weights", ["0.7", "1@0,0.2@1", "0.8:lbw=ALL"])
def test_merged_and_attached_adapters_draw_the_same(base: BaseModel, weights: str) -> None:
    if "lbw" in weights and base.family != "sd":
        weights = "0.3"
    adapters = [random_adapter(base, kind, seed) for seed, kind in enumerate(["lora", "loha"])]
    prompt = f"a ring <lora:a:{weights}> <lora:b:0.4>"
    merged, attached = (draw_composed(base, prompt, adapters, engine=engine) for engine in ("merged", "attached"))
    _close(merged, attached)
    assert (merged - draw_composed(base, "a ring")).abs().max() > 0.01


def test_adapters_are_merged_into_32_bit_weights_and_attached_to_others(base: BaseModel) -> None:
    read, adapter = parse_prompt("<lora:a:1>"), random_adapter(base, "lora", 1)
    name = next(iter(adapter.modules))
    before = base.get_module(name)
    pairs = [(read.adapters[0], Bundle(adapter, Card()))]
    with compose(base, pairs):
        assert base.get_module(name) is before
    half = {module: base.get_module(module).weight for module in adapter.modules}
    try:
        for module in half:
            base.get_module(module).to(torch.bfloat16)
        with compose(base, pairs):
            assert isinstance(base.get_module(name), AdaptedLayer)
        with compose(base, pairs, engine="merged"):
            assert base.get_module(name) is before
    finally:
        for module, weight in half.items():
            base.get_module(module).float().weight = weight


def test_the_text_encoders_and_the_denoiser_have_their_own_weights(base: BaseModel) -> None:
    adapter = random_adapter(base, "lora", 3)
    parts = {
        texts: Adapter(
            {name: delta for name, delta in adapter.modules.items() if name.startswith("text_encoder") == texts},
            adapter.base,
            adapter.fingerprint,
        )
        for texts in (True, False)
    }
    assert all(part.modules for part in parts.values())
    with fused(base, [(parts[True], 0.3), (parts[False], 0.8)]):
        expected = _plain(base, "a ring")
    _close(draw_composed(base, "a ring <lora:a:0.3:0.8>", [adapter]), expected)
    assert (draw_composed(base, "a ring <lora:a:0.8:0.3>", [adapter]) - expected).abs().max() > 1e-3


def test_a_schedule_equals_fusing_the_weight_of_each_step(base: BaseModel) -> None:
    adapters = [random_adapter(base, kind, seed, ["attention"]) for seed, kind in enumerate(("lora", "loha"))]
    prompt = "a ring <lora:a:0@0,1@1> <lora:b:1:start=2:stop=3>"
    first, second = parse_prompt(prompt).adapters
    states = base.encode_text(["a ring"], (16, 16)).index([0, 0])
    latents = torch.stack([draw_noise(base.latent_shape((16, 16)), seed) for seed in (1, 2)])
    kept = {name: copy.deepcopy(module.state_dict()) for name, module in base.modules.items()}

    def guide(step: int) -> Guidance:
        for name, state in kept.items():
            base.modules[name].load_state_dict(state)
        for tag, adapter in ((first, adapters[0]), (second, adapters[1])):
            collapse(base, adapter, tag.denoiser_weight(step, STEPS))
        return Guidance(states)

    with torch.no_grad():
        denoised = sample(base, latents, guide, seeds=(1, 2), steps=STEPS, scale=1.0, size=(16, 16))
        expected = base.decode_latents(denoised).clamp(-1.0, 1.0)
    for name, state in kept.items():
        base.modules[name].load_state_dict(state)
    drawn = draw_composed(base, prompt, adapters, guidance=1.0)
    _close(drawn, expected)
    assert (drawn - draw_composed(base, "a ring <lora:a:0.5> <lora:b:1>", adapters, guidance=1.0)).abs().max() > 1e-3


def test_weights_by_block_multiply_the_deltas_of_the_block(base: BaseModel) -> None:
    adapter = random_adapter(base, "lora", 5)
    count = 12 if base.family == "sdxl" else 17
    values = [round(0.1 + 0.05 * index, 2) for index in range(count)]
    by_block = dict(zip(block_lists()[count], values, strict=True))
    drawn = draw_composed(base, f"a ring <lora:a:0.9:lbw={','.join(map(str, values))}>", [adapter])
    with fused(
        base,
        [
            (
                Adapter({name: delta}, adapter.base, adapter.fingerprint),
                0.9 * weight_of_module(name, by_block, base.family),
            )
            for name, delta in adapter.modules.items()
        ],
    ):
        _close(drawn, _plain(base, "a ring"))
    with pytest.raises(SettingsError, match=r"block weights of 'a' are not for a base of the family"):
        draw_composed(base, f"a ring <lora:a:1:lbw={','.join(['1'] * 61)}>", [adapter])


def test_an_edited_prompt_has_each_text_in_its_steps(base: BaseModel) -> None:
    conditions = [base.encode_text([text], (16, 16)).index([0, 0]) for text in ("a ring", "a cube")]
    latents = torch.stack([draw_noise(base.latent_shape((16, 16)), seed) for seed in (1, 2)])
    with torch.no_grad():
        for prompt, order in (("a [ring:cube:0.5]", [0, 0, 1, 1]), ("a [ring|cube]", [0, 1, 0, 1])):
            denoised = sample(
                base,
                latents,
                lambda step, order=order: Guidance(conditions[order[step]]),  # type: ignore[misc]
                seeds=(1, 2),
                steps=STEPS,
                scale=1.0,
                size=(16, 16),
            )
            _close(draw_composed(base, prompt, guidance=1.0), base.decode_latents(denoised).clamp(-1.0, 1.0))
            assert not torch.equal(draw_composed(base, prompt, guidance=1.0), _plain(base, "a ring", guidance=1.0))


def test_and_adds_the_guidance_of_the_parts(base: BaseModel) -> None:
    whole = draw_composed(base, "a ring", guidance=2.0)
    _close(draw_composed(base, "a ring :0.5 AND a ring :0.5", guidance=2.0), whole)
    _close(
        draw_composed(base, "a ring :0.5 AND a ring :1.5", guidance=1.0), draw_composed(base, "a ring", guidance=2.0)
    )
    _close(draw_composed(base, "a ring AND a cube :0", guidance=2.0), whole)
    assert (draw_composed(base, "a ring AND a cube", guidance=2.0) - whole).abs().max() > 1e-3


def test_weights_of_words_and_breaks_change_the_image_and_negative_prompts_are_padded(base: BaseModel) -> None:
    plain = draw_composed(base, "a red ring", negative="blue")
    assert (draw_composed(base, "a (red:1.4) ring", negative="blue") - plain).abs().max() > 1e-4
    assert (draw_composed(base, "a red BREAK ring", negative="blue") - plain).abs().max() > 1e-4
    assert (draw_composed(base, "a red ring", negative="(blue:1.5)") - plain).abs().max() > 1e-4
    assert torch.equal(draw_composed(base, "a (red:1.0) ring", negative="blue"), plain)


def test_a_long_prompt_is_read_whole_in_several_chunks(base: BaseModel) -> None:
    words = "a red ring and a blue cube beside a green disk " * 12
    assert count_chunks(base, [[(words, 1.0)]]) > 1
    ends = [draw_composed(base, f"{words} {end}") for end in ("at night", "in snow")]
    assert (ends[0] - ends[1]).abs().max() > 1e-5

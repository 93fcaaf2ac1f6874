"""Adapter guidance, weights by layer and of the pass over enlarged images, and merged weights that are kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lora_engine.adapters import Adapter
from lora_engine.adapters.merged_weights import _MergedLayer
from lora_engine.bases.base import BaseModel, load_base
from lora_engine.bases.conditioning import Conditioning
from lora_engine.errors import SettingsError
from lora_engine.inference import ComposedEngine
from lora_engine.inference.generate import Guidance, draw_noise, sample
from lora_engine.inference.merged_cache import MergedCache
from lora_engine.inference.regions import Regions, parse_region
from lora_engine.inference.source_image import SourceImage
from tests.lora_engine.inference.composed import SIZE, STEPS, draw_composed, fused, random_adapter
from tests.support.untrained import write_untrained_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = tmp_path_factory.mktemp("guided") / "small-sd"
    return load_base(str(write_untrained_base(folder, "small-sd")), device="cpu")


@pytest.fixture(scope="module")
def adapters(base: BaseModel) -> list[Adapter]:
    return [random_adapter(base, kind, seed) for seed, kind in enumerate(("lora", "loha", "lokr"))]


@pytest.fixture
def merges(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, ...]]:
    """Returns the multipliers of each layer that is merged from now on."""
    merge, seen = _MergedLayer._merge, []

    def counted(self: _MergedLayer, multipliers: dict[int, float]) -> torch.nn.Parameter:
        seen.append(tuple(multipliers.values()))
        return merge(self, multipliers)

    monkeypatch.setattr(_MergedLayer, "_merge", counted)
    return seen


@pytest.mark.parametrize("engine", ["merged", "attached"])
def test_scale_1_is_the_plain_image_and_0_the_base(
    base: BaseModel, adapters: list[Adapter], engine: ComposedEngine
) -> None:
    first = adapters[:1]
    plain = draw_composed(base, "a ring <lora:a:0.8>", first, engine=engine)
    assert torch.equal(draw_composed(base, "a ring <lora:a:0.8:ag=1>", first, engine=engine), plain)
    bare = draw_composed(base, "a ring")
    assert torch.equal(draw_composed(base, "a ring <lora:a:0.8:ag=0>", first, engine=engine), bare)
    doubled = draw_composed(base, "a ring <lora:a:0.8:ag=2>", first, engine=engine)
    assert min((doubled - plain).abs().max(), (doubled - bare).abs().max()) > 1e-3


def test_only_other_scales_than_0_and_1_cost_a_prediction(
    base: BaseModel, adapters: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    predict, calls = type(base).predict, []

    def counted(self: BaseModel, *inputs: Tensor) -> Tensor:
        calls.append(len(inputs[0]))
        return predict(self, *inputs)  # type: ignore[arg-type]

    monkeypatch.setattr(type(base), "predict", counted)
    for scales, count in (((0, 1), 1), ((0, 0), 1), ((2, 2), 2), ((2, 3), 3)):
        calls.clear()
        first, second = scales
        draw_composed(base, f"a ring <lora:a:1:ag={first}> <lora:b:1:ag={second}>", adapters[:2])
        assert len(calls) == count * STEPS


@pytest.mark.parametrize("engine", ["merged", "attached"])
def test_the_scale_multiplies_what_the_guided_adapters_change(
    base: BaseModel, adapters: list[Adapter], engine: ComposedEngine
) -> None:
    """Two adapters of scale 2 act together, one of -0.5 alone, beside one without a scale."""
    plain, *guided = (*adapters, random_adapter(base, "lora", 7))
    sets = [([], -0.5), (guided[:2], 2.0), (guided[2:], -0.5)]
    conditions = []
    for own, _ in sets:
        with fused(base, [(plain, 0.4), *((adapter, 0.6) for adapter in own)]):
            rows = [base.encode_negative([""], SIZE).index([0, 0]), base.encode_text(["a ring"], SIZE).index([0, 0])]
            conditions.append(Conditioning.cat(rows))

    class Sum:
        def predict(self, base: BaseModel, latents: Tensor, timestep: Tensor, scale: float) -> Tensor:
            total = torch.zeros_like(latents)
            for condition, (own, factor) in zip(conditions, sets, strict=True):
                with fused(base, [(plain, 0.4), *((adapter, 0.6) for adapter in own)]):
                    total += factor * Guidance(condition).predict(base, latents, timestep, scale)
            return total

    noise = torch.stack([draw_noise(base.latent_shape(SIZE), seed) for seed in (1, 2)])
    with torch.no_grad():
        latents = sample(base, noise, lambda step: Sum(), seeds=(1, 2), steps=STEPS, scale=3.0, size=SIZE)
        expected = base.decode_latents(latents).clamp(-1.0, 1.0)
    prompt = "a ring <lora:p:0.4> <lora:a:0.6:ag=2> <lora:b:0.6:ag=2> <lora:c:0.6:ag=-0.5>"
    before = [parameter.clone() for parameter in base.modules["unet"].parameters()]
    drawn = draw_composed(base, prompt, [plain, *guided], engine=engine)
    torch.testing.assert_close(drawn, expected, rtol=1e-3, atol=1e-4)
    after = base.modules["unet"].parameters()
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_guided_adapters_act_in_their_region(base: BaseModel, adapters: list[Adapter]) -> None:
    whole = Regions((parse_region("0,0,1,1=a ring <lora:a:0.8:ag=2>"),))
    drawn = draw_composed(base, "a cube", adapters[:1], regions=whole)
    assert torch.equal(drawn, draw_composed(base, "a ring <lora:a:0.8:ag=2>", adapters[:1]))


def test_weights_by_layer_multiply_the_deltas_of_these_layers(base: BaseModel, adapters: list[Adapter]) -> None:
    adapter = adapters[0]
    drawn = draw_composed(base, "a ring <lora:a:0.9:layers=unet.up_blocks=0.2,*.attn2.*=-1>", [adapter])
    factors = {
        name: 0.2 if name.startswith("unet.up_blocks.") else -1.0 if ".attn2." in name else 1.0
        for name in adapter.modules
    }
    assert set(factors.values()) == {0.2, -1.0, 1.0}
    parts = [
        (Adapter({name: delta}, adapter.base, adapter.fingerprint), 0.9 * factors[name])
        for name, delta in adapter.modules.items()
    ]
    with fused(base, parts):
        torch.testing.assert_close(drawn, draw_composed(base, "a ring"), rtol=1e-4, atol=2e-5)
    with pytest.raises(SettingsError, match=r"layer weight 'unet\.up_block' fits no layer of 'a'.*unet\.up_blocks"):
        draw_composed(base, "a ring <lora:a:1:layers=unet.up_block=0.2>", [adapter])


def test_each_layer_can_have_a_schedule_of_its_own(base: BaseModel, adapters: list[Adapter]) -> None:
    """One adapter in two tags: its halves rise and fall, which together is the constant weight if they are equal."""
    first = adapters[0]
    halves = "<lora:a:{}:layers=unet.down_blocks=1,*=0> <lora:b:{}:layers=unet.down_blocks=0>"
    constant = draw_composed(base, "a ring <lora:a:0.5>", [first])
    torch.testing.assert_close(
        draw_composed(base, "a ring " + halves.format(0.5, "0.5@0,0.5@2"), [first, first]),
        constant,
        rtol=1e-4,
        atol=2e-5,
    )
    crossed = draw_composed(base, "a ring " + halves.format("0@0,1@1:curve=cosine", "1@0,0@1"), [first, first])
    assert (crossed - constant).abs().max() > 1e-3


def test_enlarged_images_have_the_weights_of_the_second_pass(base: BaseModel, adapters: list[Adapter]) -> None:
    pixels = torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(5)) * 2 - 1
    first, second = SourceImage(pixels, 0.5), SourceImage(pixels, 0.5, is_enlarged=True)
    prompt = "a [ring:cube:0.75] <lora:a:0.8:hr=0.3:hrte=0.1>"
    drawn = draw_composed(base, prompt, adapters[:1], source=second)
    expected = draw_composed(base, "a cube <lora:a:te=0.1:unet=0.3>", adapters[:1], source=first)
    assert torch.equal(drawn, expected)
    assert torch.equal(
        draw_composed(base, prompt, adapters[:1], source=first),
        draw_composed(base, "a [ring:cube:0.75] <lora:a:0.8>", adapters[:1], source=first),
    )
    assert not torch.equal(drawn, draw_composed(base, prompt, adapters[:1], source=first))


def test_each_set_of_constant_weights_is_merged_once(
    base: BaseModel, adapters: list[Adapter], merges: list[tuple[float, ...]]
) -> None:
    regions = Regions((parse_region("0,0,0.5,1=a cube <lora:b:0.6>"),))
    drawn = draw_composed(base, "a ring <lora:a:0.8>", adapters[:2], regions=regions)
    # Both adapters have the same modules: one merge of each for the base prompt, and one for the region.
    assert len(merges) == 2 * len(adapters[0].modules)
    merges.clear()
    without = draw_composed(
        base, "a ring <lora:a:0.8>", adapters[:2], regions=regions, cache=MergedCache(base, max_bytes=0)
    )
    assert len(merges) > 2 * len(adapters[0].modules)
    assert torch.equal(drawn, without)


def test_equal_compositions_are_merged_once_and_others_not_at_all_by_mistake(
    base: BaseModel, adapters: list[Adapter], merges: list[tuple[float, ...]]
) -> None:
    cache = MergedCache(base)
    own = [parameter.clone() for parameter in base.modules["unet"].parameters()]
    prompts = {"a ring <lora:a:0.8>": adapters[:1], "a ring <lora:b:0.8>": adapters[1:2]}
    expected = {prompt: draw_composed(base, prompt, used) for prompt, used in prompts.items()}
    merges.clear()
    for _ in range(3):
        for prompt, used in prompts.items():
            assert torch.equal(draw_composed(base, prompt, used, cache=cache), expected[prompt])
            after = base.modules["unet"].parameters()
            assert all(torch.equal(old, new) for old, new in zip(own, after, strict=True))
    assert len(merges) == 2 * len(adapters[0].modules)
    heavier = draw_composed(base, "a ring <lora:a:0.9>", adapters[:1], cache=cache)
    assert torch.equal(heavier, draw_composed(base, "a ring <lora:a:0.9>", adapters[:1]))
    assert not torch.equal(heavier, expected["a ring <lora:a:0.8>"])


def test_a_cache_holds_no_more_than_its_bytes_and_forgets_an_adapter(
    base: BaseModel, adapters: list[Adapter], merges: list[tuple[float, ...]]
) -> None:
    cache = MergedCache(base)
    draw_composed(base, "a ring <lora:a:0.8>", adapters[:1], cache=cache)
    one = cache.held_bytes
    assert one > 0
    small = MergedCache(base, max_bytes=one)
    for prompt, used in (("<lora:a:0.8>", adapters[:1]), ("<lora:b:0.8>", adapters[2:])):
        draw_composed(base, f"a ring {prompt}", used, cache=small)
        assert small.held_bytes <= one
    cache.forget(adapters[0])
    assert cache.held_bytes == 0
    merges.clear()
    draw_composed(base, "a ring <lora:a:0.8>", adapters[:1], cache=cache)
    assert merges


def test_a_base_whose_weights_changed_is_merged_again(base: BaseModel, adapters: list[Adapter]) -> None:
    cache = MergedCache(base)
    first = draw_composed(base, "a ring <lora:a:0.8>", adapters[:1], cache=cache)
    with fused(base, [(adapters[1], 0.5)]):
        drawn = draw_composed(base, "a ring <lora:a:0.8>", adapters[:1], cache=cache)
        assert torch.equal(drawn, draw_composed(base, "a ring <lora:a:0.8>", adapters[:1]))
        assert not torch.equal(drawn, first)
    assert torch.equal(draw_composed(base, "a ring <lora:a:0.8>", adapters[:1], cache=cache), first)

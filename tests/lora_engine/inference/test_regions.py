"""Regions with prompts and adapters of their own: exactness, no effect elsewhere, masks, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from lora_engine.adapters import Adapter
from lora_engine.bases.base import BaseModel, load_base
from lora_engine.bases.conditioning import Conditioning
from lora_engine.errors import DataError, SettingsError
from lora_engine.inference import ComposedEngine
from lora_engine.inference.generate import Guidance, draw_noise, sample
from lora_engine.inference.regions import NO_REGIONS, Region, Regions, blend_weights, feathered, parse_region
from lora_engine.inference.source_image import SourceImage
from tests.lora_engine.inference.composed import SIZE, STEPS, draw_composed, fused, random_adapter
from tests.support.untrained import write_untrained_base

LEFT, RIGHT, WHOLE = "0,0,0.5,1", "0.5,0,1,1", "0,0,1,1"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = tmp_path_factory.mktemp("regions") / "small-sd"
    return load_base(str(write_untrained_base(folder, "small-sd")), device="cpu")


@pytest.fixture(scope="module")
def adapters(base: BaseModel) -> list[Adapter]:
    return [random_adapter(base, kind, seed) for seed, kind in enumerate(("lora", "loha", "lora"))]


def regions_of(*texts: str, feather: float = 0.0) -> Regions:
    return Regions(tuple(map(parse_region, texts)), feather)


def state_of(base: BaseModel) -> dict[str, Tensor]:
    return {
        f"{part}.{name}": tensor.clone()
        for part, module in base.modules.items()
        for name, tensor in module.state_dict().items()
    }


@pytest.mark.parametrize("engine", ["merged", "attached"])
def test_a_region_of_the_whole_image_is_the_plain_image(
    base: BaseModel, adapters: list[Adapter], engine: ComposedEngine
) -> None:
    plain = draw_composed(base, "a ring <lora:a:0@0,1@1>", adapters[:1], engine=engine)
    drawn = draw_composed(
        base, "a cube", adapters[:1], engine=engine, regions=regions_of(f"{WHOLE}=a ring <lora:a:0@0,1@1>")
    )
    assert torch.equal(drawn, plain)
    assert not torch.equal(drawn, draw_composed(base, "a cube"))


@pytest.mark.parametrize("engine", ["merged", "attached"])
@pytest.mark.parametrize("feather", [0.0, 2.0])
def test_halves_with_one_prompt_are_the_plain_image(
    base: BaseModel, adapters: list[Adapter], engine: ComposedEngine, feather: float
) -> None:
    halves = [f"{half}=a (ring:1.2) AND a cube :0.5 <lora:a:0.7>" for half in (LEFT, RIGHT)]
    plain = draw_composed(base, "a (ring:1.2) AND a cube :0.5 <lora:a:0.7>", adapters[:1], engine=engine)
    drawn = draw_composed(base, "a disk", adapters[:1], engine=engine, regions=regions_of(*halves, feather=feather))
    torch.testing.assert_close(drawn, plain, rtol=1e-4, atol=0 if feather == 0.0 else 2e-5)


@pytest.mark.parametrize("engine", ["merged", "attached"])
def test_each_region_has_the_prediction_of_its_own_prompt_and_adapters(
    base: BaseModel, adapters: list[Adapter], engine: ComposedEngine
) -> None:
    """The reference fuses each region's adapters into a copy of the weights, and blends the predictions itself."""
    everywhere, left, right = adapters
    sets = [[(everywhere, 0.5)], [(everywhere, 0.5), (left, 0.8)], [(everywhere, 0.5), (right, -0.6)]]
    covers = [torch.zeros(1, 1, 8, 8) for _ in sets]
    covers[1][..., :3], covers[2][..., 5:] = 1.0, 1.0
    covers[0][..., 3:5] = 1.0
    conditions = []
    for text, own in zip(("a ring", "a cube", "a disk"), sets, strict=True):
        with fused(base, own):
            rows = [base.encode_negative([""], SIZE).index([0, 0]), base.encode_text([text], SIZE).index([0, 0])]
            conditions.append(Conditioning.cat(rows))

    class Blend:
        def predict(self, base: BaseModel, latents: Tensor, timestep: Tensor, scale: float) -> Tensor:
            total = torch.zeros_like(latents)
            for condition, own, cover in zip(conditions, sets, covers, strict=True):
                with fused(base, own):
                    total += cover * Guidance(condition).predict(base, latents, timestep, scale)
            return total

    noise = torch.stack([draw_noise(base.latent_shape(SIZE), seed) for seed in (1, 2)])
    with torch.no_grad():
        latents = sample(base, noise, lambda step: Blend(), seeds=(1, 2), steps=STEPS, scale=3.0, size=SIZE)
        expected = base.decode_latents(latents).clamp(-1.0, 1.0)
    before = state_of(base)
    drawn = draw_composed(
        base,
        "a ring <lora:all:0.5>",
        adapters,
        engine=engine,
        regions=regions_of("0,0,0.375,1=a cube <lora:left:0.8>", "0.625,0,1,1=a disk <lora:right:-0.6>"),
    )
    torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=2e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(base).items())
    swapped = regions_of("0,0,0.375,1=a cube <lora:right:-0.6>", "0.625,0,1,1=a disk <lora:left:0.8>")
    others = [everywhere, right, left]
    assert (
        draw_composed(base, "a ring <lora:all:0.5>", others, engine=engine, regions=swapped) - expected
    ).abs().max() > 1e-3


def test_the_adapters_of_a_region_change_no_other_prediction(
    base: BaseModel, adapters: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    predict = type(base).predict
    seen: list[Tensor] = []

    def recorded(self: BaseModel, *inputs: Tensor) -> Tensor:
        seen.append(predict(self, *inputs))  # type: ignore[arg-type]
        return seen[-1]

    monkeypatch.setattr(type(base), "predict", recorded)
    draw_composed(base, "a ring")
    plain = seen[0]
    seen.clear()
    draw_composed(base, "a ring", adapters[:1], regions=regions_of(f"{LEFT}=a ring <lora:a:1>"))
    assert torch.equal(seen[0], plain)
    assert not torch.equal(seen[1], plain)
    assert len(seen) == 2 * STEPS


def test_pixels_of_a_region_differ_and_soft_masks_blend(base: BaseModel, adapters: list[Adapter]) -> None:
    text = f"{LEFT}=a ring <lora:a:1>"
    hard = draw_composed(base, "a ring", adapters[:1], regions=regions_of(text))
    soft = draw_composed(base, "a ring", adapters[:1], regions=regions_of(text, feather=3.0))
    plain = draw_composed(base, "a ring")
    assert (hard - plain)[..., :8].abs().mean() > 2 * (hard - plain)[..., 8:].abs().mean()
    assert not torch.equal(hard, soft)


def test_regions_and_the_source_image_go_together(base: BaseModel, adapters: list[Adapter]) -> None:
    pixels = torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(5)) * 2 - 1
    regions = regions_of(f"{LEFT}=a cube", f"{RIGHT}=a ring <lora:a:1>")
    whole = SourceImage(pixels, 0.5)
    drawn = draw_composed(base, "x", adapters[:1], regions=regions, source=whole)
    assert not torch.equal(drawn, draw_composed(base, "x", source=whole))
    masked = SourceImage(pixels, 0.5, Regions(regions.items[1:]).mask(SIZE))
    drawn = draw_composed(base, "x", adapters[:1], regions=regions, source=masked)
    assert torch.equal(drawn[..., :8], pixels[None, ..., :8].expand(2, -1, -1, -1))
    assert (drawn - pixels)[..., 8:].abs().max() > 0.01


def test_weights_at_each_place_sum_to_1_and_overlaps_share_it() -> None:
    left, most = torch.zeros(1, 8, 8), torch.zeros(1, 8, 8)
    left[..., :4], most[..., 2:6] = 1.0, 0.5
    rest, first, second = blend_weights([left, most], (8, 8))
    torch.testing.assert_close(rest + first + second, torch.ones(1, 1, 8, 8))
    row = slice(None), slice(None), 0
    assert first[row][0, 0].tolist() == pytest.approx([1, 1, 2 / 3, 2 / 3, 0, 0, 0, 0])
    assert second[row][0, 0].tolist() == pytest.approx([0, 0, 1 / 3, 1 / 3, 0.5, 0.5, 0, 0])
    assert rest[row][0, 0].tolist() == pytest.approx([0, 0, 0, 0, 0.5, 0.5, 1, 1])


def test_places_of_latents_that_a_region_covers_in_part_have_its_share() -> None:
    cover = torch.zeros(1, 16, 16)
    cover[..., :5] = 1.0
    rest, own = blend_weights([cover], (8, 8))
    assert own[0, 0, 0].tolist() == [1, 1, 0.5, 0, 0, 0, 0, 0]
    assert rest[0, 0, 0].tolist() == [0, 0, 0.5, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("pixels", [0.5, 3.0, 200.0])
def test_feathered_halves_still_cover_all(pixels: float) -> None:
    left = torch.zeros(1, 16, 24)
    left[..., :10] = 1.0
    first, second = feathered(left, pixels), feathered(1 - left, pixels)
    torch.testing.assert_close(first + second, torch.ones_like(left), rtol=0, atol=1e-5)
    assert 0.0 < float(first[0, 0, 11]) < 1.0
    assert not bool(blend_weights([first, second], (8, 12))[0].any())


def test_the_mask_of_a_file_is_light_in_the_region(tmp_path: Path) -> None:
    image = Image.new("L", (32, 32))
    image.paste(255, (16, 0, 32, 32))
    image.save(tmp_path / "right.png")
    region = parse_region(f"{tmp_path / 'right.png'}=a ring")
    assert region.box is None
    assert torch.equal(region.cover(SIZE), parse_region(f"{RIGHT}=a ring").cover(SIZE))
    regions = Regions((region,))
    regions.check_image((32, 32))
    with pytest.raises(SettingsError, match=r"the mask has 32 x 32 pixels, the image 40 x 32"):
        regions.check_image((40, 32))
    assert region.facts()["mask_sha256"] != ""


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a ring", "region 'a ring'"),
        ("=a ring", "region '=a ring'"),
        (f"{LEFT}= ", "WHERE=PROMPT"),
        ("0,0,1=a", "LEFT,TOP,RIGHT,BOTTOM"),
        ("0.5,0,0.5,1=a", "LEFT,TOP,RIGHT,BOTTOM"),
        ("0,0,1.5,1=a", "LEFT,TOP,RIGHT,BOTTOM"),
        (f"{LEFT}=a <lora:z:x>", r"region '0,0,0.5,1', character 3: tag '<lora:z:x>'"),
        (f"{LEFT}=a {{b}}", "NovelAI"),
    ],
)
def test_a_region_that_cannot_be_read_is_refused(text: str, problem: str) -> None:
    with pytest.raises(SettingsError, match=problem):
        parse_region(text)


def test_empty_regions_and_missing_files_are_refused(tmp_path: Path) -> None:
    Image.new("L", (16, 16)).save(tmp_path / "black.png")
    with pytest.raises(SettingsError, match="the region is empty"):
        parse_region(f"{tmp_path / 'black.png'}=a").cover(SIZE)
    with pytest.raises(SettingsError, match="the region is empty"):
        parse_region("0,0,0.01,1=a").cover(SIZE)
    with pytest.raises(DataError, match=r"missing\.png"):
        parse_region(f"{tmp_path / 'missing.png'}=a").cover(SIZE)


def test_settings_of_regions_are_bounded() -> None:
    item = parse_region(f"{LEFT}=a")
    for wrong in ({"items": (item,) * 21}, {"items": (item,), "feather": 300.0}, {"feather": 2.0}, {"is_mask": True}):
        with pytest.raises(SettingsError):
            Regions(**wrong)
    assert Regions() == NO_REGIONS
    assert isinstance(item, Region)

from __future__ import annotations

import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_engine.adapters import adaptable_layers, module_shapes
from lora_engine.bases.base import BaseModel, load_base
from lora_engine.bases.conditioning import Conditioning
from lora_engine.bases.source import resolve_base
from lora_engine.bases.structure import base_module_shapes
from lora_engine.errors import BaseModelError, EngineError, SettingsError
from lora_engine.families.flux.model import pack, unpack
from lora_engine.families.layout import download_patterns, read_layout

SHAPES = ["small-sd", "small-sd-v", "small-sdxl", "small-sd-inpainting", "small-sdxl-inpainting"]
SHAPES += ["small-sd3", "small-sd3-without-t5", "small-flux"]
TEXTS = ["a red star", "", "sks"]


@pytest.fixture(scope="module")
def bases(untrained: dict[str, Path]) -> dict[str, BaseModel]:
    return {shape: load_base(str(folder), device="cpu") for shape, folder in untrained.items()}


def with_full_mask(base: BaseModel, conditioning: Conditioning) -> Conditioning:
    """Adds a mask over the full image for inpainting bases."""
    if not base.inpaints:
        return conditioning
    full = base.encode_mask(torch.ones(1, 1, 16, 16), torch.zeros(1, 3, 16, 16))
    return conditioning.with_tensors(full.index([0] * len(conditioning)))


def pipeline(folder: Path) -> Any:
    from diffusers import DiffusionPipeline

    loaded = DiffusionPipeline.from_pretrained(str(folder), safety_checker=None, requires_safety_checker=False)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_components_equal_those_of_the_pipelines(bases: dict[str, BaseModel]) -> None:
    assert list(bases["small-sd"].modules) == ["unet", "text_encoder"]
    assert list(bases["small-sdxl"].modules) == ["unet", "text_encoder", "text_encoder_2"]
    assert list(bases["small-sd3"].modules) == ["transformer", "text_encoder", "text_encoder_2", "text_encoder_3"]
    assert list(bases["small-sd3-without-t5"].modules) == ["transformer", "text_encoder", "text_encoder_2"]
    assert list(bases["small-flux"].modules) == ["transformer", "text_encoder", "text_encoder_2"]
    parameterizations = [bases[shape].noise.parameterization for shape in SHAPES]
    assert parameterizations == ["eps", "v_prediction", "eps", "eps", "eps", "flow", "flow", "flow"]


def test_adapters_of_inpainting_bases_have_the_family_of_the_original_base(
    bases: dict[str, BaseModel], untrained: dict[str, Path]
) -> None:
    assert [bases[shape].family for shape in SHAPES[3:]] == ["sd", "sdxl", "sd3", "sd3", "flux"]
    source = resolve_base(str(untrained["small-sd-inpainting"]))
    assert (source.family, source.loader.rpartition(":")[2]) == ("sd", "InpaintingBase")
    assert bases["small-sd-inpainting"].module_names() == bases["small-sd"].module_names()
    assert [bases[shape].inpaints for shape in SHAPES[2:5]] == [False, True, True]
    assert [bases[shape].distilled for shape in SHAPES[4:]] == [False, False, False, True]


def test_names_and_shapes_are_the_same_with_and_without_weights(
    bases: dict[str, BaseModel], untrained: dict[str, Path]
) -> None:
    for shape, folder in untrained.items():
        assert base_module_shapes(str(folder)) == module_shapes(bases[shape]), shape


def test_download_patterns_match_every_file_of_every_family(untrained: dict[str, Path]) -> None:
    patterns = download_patterns(None)
    for folder in untrained.values():
        files = read_layout(folder).files
        assert [file for file in files if not any(fnmatch(file, pattern) for pattern in patterns)] == []


def test_a_base_without_mask_input_refuses_a_mask(bases: dict[str, BaseModel]) -> None:
    with pytest.raises(SettingsError, match="inpainting"):
        bases["small-flux"].encode_mask(torch.ones(1, 1, 16, 16), torch.zeros(1, 3, 16, 16))


def test_an_inpainting_base_without_a_mask_is_refused(bases: dict[str, BaseModel]) -> None:
    base = bases["small-sd-inpainting"]
    with pytest.raises(SettingsError, match="encode_mask"):
        base.predict(torch.zeros(1, 4, 8, 8), torch.tensor([5]), base.encode_text(["a"]))
    with pytest.raises(SettingsError, match="shape"):
        base.encode_mask(torch.ones(1, 1, 8, 8), torch.zeros(1, 3, 16, 16))


@torch.no_grad()
def test_pixels_under_the_mask_are_hidden_from_the_base(bases: dict[str, BaseModel]) -> None:
    base = bases["small-sd-inpainting"]
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1.0
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    changed = {side: image.clone() for side in ("under", "beside")}
    changed["under"][..., :8] = -1.0
    changed["beside"][..., 8:] = -1.0
    encoded = base.encode_mask(mask, image)
    assert torch.equal(base.encode_mask(mask, changed["under"])["masked"], encoded["masked"])
    assert not torch.equal(base.encode_mask(mask, changed["beside"])["masked"], encoded["masked"])
    assert encoded["mask"].unique().tolist() == [0.0, 1.0]


@torch.no_grad()
def test_distilled_guidance_changes_the_prediction(bases: dict[str, BaseModel]) -> None:
    base = bases["small-flux"]
    noisy = torch.randn(1, *base.latent_shape((16, 16)), generator=torch.Generator().manual_seed(0))
    text = base.encode_text(["a"])
    guided = [text.with_tensors(Conditioning({"guidance": torch.tensor([scale])})) for scale in (1.0, 4.0)]
    plain, one, four = (base.predict(noisy, torch.tensor([500.0]), conditioning) for conditioning in (text, *guided))
    assert torch.equal(plain, one)
    assert not torch.equal(one, four)


def test_unpack_inverts_pack() -> None:
    latents = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    assert pack(latents).shape == (2, 6, 12)
    assert torch.equal(unpack(pack(latents), 4, 6), latents)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_loaded_base_is_frozen_and_leaves_the_global_generator(untrained: dict[str, Path], shape: str) -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    base = load_base(str(untrained[shape]), device="cpu")
    assert torch.equal(torch.get_rng_state(), state)
    for module in base.modules.values():
        assert not module.training
        assert not any(value.requires_grad for value in module.parameters())


@pytest.mark.parametrize("shape", SHAPES)
def test_every_adaptable_layer_has_a_canonical_name(bases: dict[str, BaseModel], shape: str) -> None:
    base = bases[shape]
    names = base.module_names()
    layers = [layer for module in base.modules.values() for _, layer in adaptable_layers(module)]
    assert [base.get_module(name) for name in names] == layers
    t5 = next((part for part, module in base.modules.items() if type(module).__name__ == "T5EncoderModel"), "none")
    texts = [name for name in names if name.startswith("text_encoder") and not name.startswith(t5)]
    texts = [name for name in texts if not name.endswith("text_projection")]
    assert texts
    assert all(name.split(".")[1] == "text_model" for name in texts)


def test_a_module_can_be_replaced(bases: dict[str, BaseModel]) -> None:
    base = bases["small-sd"]
    name = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    before, other = base.get_module(name), nn.Linear(16, 16)
    base.set_module(name, other)
    assert base.get_module(name) is other
    base.set_module(name, before)
    assert base.get_module(name) is before


def test_the_error_for_an_unknown_module_names_close_matches(bases: dict[str, BaseModel]) -> None:
    with pytest.raises(EngineError, match="to_q"):
        bases["small-sd"].get_module("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_w")


@torch.no_grad()
def test_text_is_encoded_as_in_the_pipeline_of_diffusers(
    bases: dict[str, BaseModel], untrained: dict[str, Path]
) -> None:
    expected, _ = pipeline(untrained["small-sd"]).encode_prompt(TEXTS, "cpu", 1, False)
    assert torch.equal(bases["small-sd"].encode_text(TEXTS)["states"], expected)


@torch.no_grad()
def test_text_and_sizes_of_xl_are_encoded_as_in_the_pipeline_of_diffusers(
    bases: dict[str, BaseModel], untrained: dict[str, Path]
) -> None:
    xl = pipeline(untrained["small-sdxl"])
    states, no_states, pooled, no_pooled = xl.encode_prompt(TEXTS, device="cpu")
    encoded = bases["small-sdxl"].encode_text(TEXTS, (24, 16))
    assert torch.equal(encoded["states"], states)
    assert torch.equal(encoded["pooled"], pooled)
    ids = xl._get_add_time_ids((24, 16), (0, 0), (24, 16), torch.float32, 16)
    assert torch.equal(encoded["time_ids"], ids.repeat(3, 1))
    negative = bases["small-sdxl"].encode_negative([""])
    assert torch.equal(negative["states"], no_states[:1])
    assert torch.equal(negative["pooled"], no_pooled[:1])


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_latents_are_the_scaled_mode_of_the_posterior(bases: dict[str, BaseModel], shape: str) -> None:
    base: Any = bases[shape]
    pixels = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    scale = base.vae.config.scaling_factor
    shift = base.vae.config.shift_factor or 0.0
    expected = (base.vae.encode(pixels).latent_dist.mode() - shift) * scale
    latents = base.encode_images(pixels)
    assert torch.equal(latents, expected)
    assert tuple(latents.shape[1:]) == base.latent_shape((16, 24))
    assert torch.equal(base.decode_latents(latents), base.vae.decode(expected / scale + shift).sample)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_two_loads_compute_the_same_bits(bases: dict[str, BaseModel], untrained: dict[str, Path], shape: str) -> None:
    other = load_base(str(untrained[shape]), device="cpu")
    pixels = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = [base.encode_images(pixels[..., :16]) for base in (bases[shape], other)]
    assert torch.equal(*latents)
    texts = [base.encode_text(["a", "b"]) for base in (bases[shape], other)]
    predictions = [
        base.predict(latents[0], torch.tensor([7, 700]), with_full_mask(base, text))
        for base, text in zip((bases[shape], other), texts, strict=True)
    ]
    assert torch.equal(*predictions)


@torch.no_grad()
def test_a_sample_of_the_posterior_follows_its_generator(bases: dict[str, BaseModel]) -> None:
    pixels = torch.zeros(1, 3, 16, 16)
    first, second, other = (
        bases["small-sd"].encode_images(pixels, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_bfloat16_is_near_float32(bases: dict[str, BaseModel], untrained: dict[str, Path], shape: str) -> None:
    half = load_base(str(untrained[shape]), device="cpu", dtype=torch.bfloat16)
    noisy = torch.randn(2, *half.latent_shape((16, 16)), generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([10, 900])
    results = [
        base.predict(noisy, timesteps, with_full_mask(base, base.encode_text(["a", "b"])))
        for base in (bases[shape], half)
    ]
    assert results[1].dtype == torch.float32
    assert (results[0] - results[1]).norm() < 0.05 * results[0].norm()


def test_a_size_that_the_base_cannot_generate_is_refused(bases: dict[str, BaseModel]) -> None:
    with pytest.raises(SettingsError, match="multiples of 2"):
        bases["small-sd"].latent_shape((15, 16))


def test_a_long_text_is_truncated_with_a_warning(bases: dict[str, BaseModel], caplog: pytest.LogCaptureFixture) -> None:
    bases["small-sd"].encode_text(["a very long text indeed"])
    assert "the base reads the first 16" in caplog.text


def test_damaged_weights_are_an_error_with_the_component(tmp_path: Path, untrained: dict[str, Path]) -> None:
    folder = Path(shutil.copytree(untrained["small-sd"], tmp_path / "base"))
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"\x10" + b"\0" * 100)
    with pytest.raises(BaseModelError, match="unet"):
        load_base(str(folder), device="cpu")


def test_weights_of_another_configuration_are_refused(tmp_path: Path, untrained: dict[str, Path]) -> None:
    folder = Path(shutil.copytree(untrained["small-sd"], tmp_path / "base"))
    other = untrained["small-sdxl"] / "unet" / "diffusion_pytorch_model.safetensors"
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(other.read_bytes())
    with pytest.raises(BaseModelError, match="unet"):
        load_base(str(folder), device="cpu")


def test_conditionings_are_indexed_and_joined_row_by_row() -> None:
    rows = Conditioning({"states": torch.arange(6.0).view(3, 2), "pooled": torch.arange(3.0).view(3, 1)})
    joined = Conditioning.cat([rows.index([2]), rows.index([0, 0])])
    assert len(joined) == 3
    assert joined["states"].tolist() == [[4.0, 5.0], [0.0, 1.0], [0.0, 1.0]]
    assert joined["pooled"].flatten().tolist() == [2.0, 0.0, 0.0]


REAL = {"sd15": 64, "sd2": 64, "sdxl": 280, "sd-inpainting": 64, "sdxl-inpainting": 280}
REAL |= {"sd3": 48, "sd35-medium": 74, "flux": 76, "flux-schnell": 76}


@pytest.mark.parametrize("shape", REAL)
def test_the_published_architectures_load(untrained_base: Callable[[str], Path], shape: str) -> None:
    base = load_base(str(untrained_base(shape)), device="cpu")
    attention = [name for name in base.module_names() if name.endswith((".to_q", ".to_out.0"))]
    assert len(attention) == REAL[shape]
    if "transformer" in base.modules:
        assert set(base.module_names()) == base_module_shapes(shape).keys()

"""Tests every program's names of Stable Diffusion's modules against the published architectures."""

import pytest
import torch
from safetensors.torch import save_file

from lora_engine.adapters import Adapter, LoraDelta
from lora_engine.adapters.published import published_module_shapes
from lora_engine.errors import AdapterError
from lora_engine.formats import codecs, detect_codec, inspect, read_adapter
from lora_engine.formats.ldm_names import LAYOUTS, original_path

SD1, SDXL = published_module_shapes("sd15"), published_module_shapes("sdxl")
BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
LAYER = "text_model.encoder.layers.3"
ONE = {"lora_down.weight": (2, 3), "lora_up.weight": (4, 2)}


def tensors_of(*modules, suffixes=("lora_down.weight", "lora_up.weight")):
    down, up = suffixes
    return {
        f"{name}.{suffix}": torch.ones(2, 3) if suffix == down else torch.ones(4, 2)
        for name in modules
        for suffix in (down, up)
    }


def read(tensors, names=None, metadata=None):
    metadata = metadata or {}
    return detect_codec(tensors, metadata).decode(tensors, metadata, None if names is None else list(names))


SAMPLES = {
    # From the weights of the original repositories (CompVis/stable-diffusion, Stability-AI/generative-models).
    (
        "sd",
        "input_blocks.1.1.transformer_blocks.0.attn1.to_q",
    ): "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    ("sd", "input_blocks.3.0.op"): "down_blocks.0.downsamplers.0.conv",
    ("sd", "input_blocks.8.1.proj_in"): "down_blocks.2.attentions.1.proj_in",
    ("sd", "input_blocks.11.0.in_layers.2"): "down_blocks.3.resnets.1.conv1",
    ("sd", "middle_block.2.emb_layers.1"): "mid_block.resnets.1.time_emb_proj",
    ("sd", "output_blocks.2.1.conv"): "up_blocks.0.upsamplers.0.conv",
    ("sd", "output_blocks.5.2.conv"): "up_blocks.1.upsamplers.0.conv",
    ("sd", "output_blocks.11.1.proj_out"): "up_blocks.3.attentions.2.proj_out",
    ("sd", "output_blocks.3.0.skip_connection"): "up_blocks.1.resnets.0.conv_shortcut",
    ("sdxl", "input_blocks.4.1.proj_in"): "down_blocks.1.attentions.0.proj_in",
    ("sdxl", "output_blocks.2.2.conv"): "up_blocks.0.upsamplers.0.conv",
    ("sdxl", "output_blocks.8.0.out_layers.3"): "up_blocks.2.resnets.2.conv2",
    ("sdxl", "label_emb.0.2"): "add_embedding.linear_2",
    ("sdxl", "middle_block.1.transformer_blocks.9.ff.net.2"): "mid_block.attentions.0.transformer_blocks.9.ff.net.2",
}


@pytest.mark.parametrize(("family", "original"), SAMPLES)
def test_original_names_are_those_of_the_original_weights(family, original):
    path = SAMPLES[family, original]
    assert original_path(path, LAYOUTS[family]) == original
    assert f"unet.{path}" in (SD1 if family == "sd" else SDXL)


@pytest.mark.parametrize(("family", "names", "blocks"), [("sd", SD1, 12), ("sdxl", SDXL, 9)])
def test_every_module_of_the_unet_has_one_original_name(family, names, blocks):
    paths = [name.removeprefix("unet.") for name in names if name.startswith("unet.")]
    originals = {original_path(path, LAYOUTS[family]) for path in paths}
    assert None not in originals
    assert len(originals) == len(paths)
    for side in ("input_blocks", "output_blocks"):
        assert {name.split(".")[1] for name in originals if name.startswith(side)} == set(map(str, range(blocks)))


SPELLINGS = {
    "kohya": (f"lora_unet_{BLOCK.replace('.', '_')}_attn1_to_q", "unet", f"{BLOCK}.attn1.to_q"),
    "kohya, original names": (
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "unet",
        f"{BLOCK}.attn1.to_q",
    ),
    "LyCORIS' wrapper": (f"lycoris_{BLOCK.replace('.', '_')}_attn1_to_q", "unet", f"{BLOCK}.attn1.to_q"),
    "ComfyUI": ("diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q", "unet", f"{BLOCK}.attn1.to_q"),
    "a checkpoint's": ("model.diffusion_model.input_blocks.4.1.proj_in", "unet", "down_blocks.1.attentions.0.proj_in"),
    "ComfyUI, diffusers' names": (f"diffusion_model.{BLOCK}.attn1.to_q", "unet", f"{BLOCK}.attn1.to_q"),
    "Open Model Initiative": ("unet.input_blocks.4.1.proj_in", "unet", "down_blocks.1.attentions.0.proj_in"),
    "OneTrainer, dotted": (f"lora_unet.{BLOCK}.attn1.to_q", "unet", f"{BLOCK}.attn1.to_q"),
    "text, kohya": ("lora_te_text_model_encoder_layers_3_mlp_fc1", "text_encoder", f"{LAYER}.mlp.fc1"),
    "text, one of two": ("lora_te1_text_model_encoder_layers_3_mlp_fc1", "text_encoder", f"{LAYER}.mlp.fc1"),
    "text, transformers 5": ("lora_te_encoder_layers_3_mlp_fc1", "text_encoder", f"{LAYER}.mlp.fc1"),
    "text, ComfyUI": (f"text_encoders.clip_l.transformer.{LAYER}.mlp.fc1", "text_encoder", f"{LAYER}.mlp.fc1"),
    "text, Open Model Initiative": (f"clip_l.{LAYER}.mlp.fc1", "text_encoder", f"{LAYER}.mlp.fc1"),
}


@pytest.mark.parametrize("case", SPELLINGS)
@pytest.mark.parametrize(
    "suffixes", [tuple(ONE), ("lora_A.weight", "lora_B.weight"), ("lora.down.weight", "lora.up.weight")]
)
def test_a_module_is_found_under_every_name_and_suffix(case, suffixes):
    raw, component, path = SPELLINGS[case]
    adapter = read(tensors_of(raw, suffixes=suffixes), SD1)
    assert list(adapter.modules) == [f"{component}.{path}"]


def test_second_text_encoders_projection_is_read():
    adapter = read(tensors_of("lora_te2_text_projection", "lora_te2_text_model_encoder_layers_31_mlp_fc2"), SDXL)
    assert list(adapter.modules) == [
        "text_encoder_2.text_model.encoder.layers.31.mlp.fc2",
        "text_encoder_2.text_projection",
    ]
    assert adapter.base == "sdxl"


def test_both_namings_in_one_file_of_sdxl_are_read():
    mixed = tensors_of("lora_unet_input_blocks_4_1_proj_in", "lora_unet_down_blocks_1_attentions_1_proj_in")
    assert list(read(mixed, SDXL).modules) == [f"unet.down_blocks.1.attentions.{number}.proj_in" for number in (0, 1)]


def test_original_numbers_depend_on_the_family():
    raw = "lora_unet_input_blocks_3_0_op"
    assert list(read(tensors_of(raw), SD1).modules) == ["unet.down_blocks.0.downsamplers.0.conv"]
    six = tensors_of("lora_unet_output_blocks_6_1_proj_in")
    assert list(read(six, SD1).modules) == ["unet.up_blocks.2.attentions.0.proj_in"]
    with pytest.raises(AdapterError, match="1 of 1 modules are not in the base"):
        read(six, SDXL)


def test_without_a_base_only_unambiguous_names_are_read():
    assert list(read(tensors_of("lora_unet_mid_block_attentions_0_proj_in")).modules) == [
        "unet.mid_block.attentions.0.proj_in"
    ]
    assert list(read(tensors_of("lora_unet_input_blocks_11_0_in_layers_2")).modules) == [
        "unet.down_blocks.3.resnets.1.conv1"
    ]
    doubtful = tensors_of("lora_unet_output_blocks_3_0_in_layers_2", "lora_unet_output_blocks_5_2_conv")
    assert len(read(doubtful).modules) == 2, "both families number these alike"
    adapter = read(
        tensors_of("lora_unet_input_blocks_4_1_proj_in"), metadata={"ss_base_model_version": "sdxl_base_v1-0"}
    )
    assert list(adapter.modules) == ["unet.down_blocks.1.attentions.0.proj_in"]
    with pytest.raises(AdapterError, match="a base is needed"):
        read(tensors_of("lora_unet_nowhere"))


OLD = {
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora": ("to_q", "unet"),
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora": ("to_out.0", "unet"),
    "mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_k_lora": ("to_k", "unet"),
    "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora": ("q_proj", "text_encoder"),
    "text_encoder.text_model.encoder.layers.0.self_attn.k_proj.lora_linear_layer": ("k_proj", "text_encoder"),
    "unet.base_model.model.mid_block.attentions.0.transformer_blocks.0.attn1.to_v.lora": ("to_v", "unet"),
}


@pytest.mark.parametrize("raw", OLD)
def test_names_of_old_diffusers_are_read(raw):
    adapter = read(tensors_of(raw, suffixes=("down.weight", "up.weight")), SD1)
    name, component = next(iter(adapter.modules)), OLD[raw][1]
    assert name.startswith(f"{component}.")
    assert name.endswith(f".{OLD[raw][0]}")
    assert name in SD1


@pytest.mark.parametrize("live", ["default", "zorb_1"])
def test_the_name_of_pefts_adapter_is_ignored(live):
    suffixes = (f"lora_A.{live}.weight", f"lora_B.{live}.weight")
    assert list(read(tensors_of("unet.conv_in", suffixes=suffixes)).modules) == ["unet.conv_in"]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_read_as_the_same_values_in_float16(dtype, tmp_path):
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    finite = every[every.float().isfinite()]
    down = finite[: len(finite) // 2 * 2].reshape(2, -1)
    save_file(
        {"unet.a.lora_down.weight": down, "unet.a.lora_up.weight": torch.ones(4, 2).to(dtype)},
        tmp_path / "a.safetensors",
    )
    delta = read_adapter(tmp_path / "a.safetensors")[0].modules["unet.a"]
    assert delta.down.dtype == torch.float16
    assert torch.equal(delta.down.float(), down.float())
    assert inspect(tmp_path / "a.safetensors")["dtypes"] == {"float16": 2}
    save_file(
        {
            "unet.a.lora_down.weight": torch.full((2, 4), float("nan")).to(dtype),
            "unet.a.lora_up.weight": torch.ones(4, 2),
        },
        tmp_path / "b.safetensors",
    )
    with pytest.raises(AdapterError, match="NaN"):
        read_adapter(tmp_path / "b.safetensors")


def test_programs_write_the_names_that_they_read():
    names = ["unet.down_blocks.1.attentions.0.proj_in", "text_encoder.text_model.encoder.layers.0.mlp.fc1"]
    adapter = Adapter({name: LoraDelta(torch.ones(1, 1), torch.ones(1, 1), 1.0) for name in names}, "sdxl")
    flat = {
        form: {key.split(".")[0] for key in codecs[form].encode(adapter)[0]}
        for form in ("kohya", "comfyui", "aitoolkit", "lycoris", "onetrainer")
    }
    text = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    for form in ("kohya", "comfyui", "aitoolkit"):
        assert flat[form] == {text, "lora_unet_input_blocks_4_1_proj_in"}
    for form in ("lycoris", "onetrainer"):
        assert flat[form] == {text, "lora_unet_down_blocks_1_attentions_0_proj_in"}

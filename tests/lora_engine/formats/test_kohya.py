"""Tests kohya's names: flattened, resolved through the base; SDXL with the original names."""

import json
import re

import pytest
import torch
from diffusers import UNet2DConditionModel
from law_adapters import NAMES, SDXL_NAMES, random_delta

from lora_engine.adapters import Adapter, LoraDelta, module_shapes
from lora_engine.errors import AdapterError
from lora_engine.formats import Card, codecs, read_adapter, write_adapter
from lora_engine.formats.safetensors_io import read_header

KOHYA = codecs["kohya"]


def small(names, base):
    return Adapter({name: random_delta("lora", names[name]) for name in names}, base)


def modules_in(tensors):
    return {key.split(".")[0] for key in tensors}


def test_names_of_stable_diffusion_are_diffusers_names_flattened():
    tensors, _ = KOHYA.encode(small(NAMES, "sd"))
    assert modules_in(tensors) == {
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0",
        "lora_unet_down_blocks_0_attentions_0_proj_in",
        "lora_unet_down_blocks_0_resnets_0_conv1",
        "lora_unet_time_embedding_linear_1",
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te_text_model_encoder_layers_1_mlp_fc1",
    }


def test_names_of_sdxl_are_the_original_ones():
    tensors, _ = KOHYA.encode(small(SDXL_NAMES, "sdxl"))
    assert modules_in(tensors) == {
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q",
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_out_0",
        "lora_unet_input_blocks_1_1_proj_in",
        "lora_unet_input_blocks_1_0_in_layers_2",
        "lora_unet_time_embed_0",
        "lora_unet_label_emb_0_0",
        "lora_unet_output_blocks_5_1_transformer_blocks_0_ff_net_0_proj",
        "lora_unet_output_blocks_5_2_conv",
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te1_text_model_encoder_layers_1_mlp_fc1",
        "lora_te2_text_model_encoder_layers_0_mlp_fc2",
    }


@pytest.fixture(scope="module")
def sdxl_shapes():
    """Returns every adaptable module of SDXL's U-Net, at its real depth and a tiny width."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(32, 64, 128),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(1, 2, 4),
            cross_attention_dim=64,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=80,
            use_linear_projection=True,
        )
    return module_shapes({"unet": unet})


def test_every_module_of_sdxl_goes_to_the_original_names_and_back(sdxl_shapes):
    modules = {name: LoraDelta(torch.ones(1, 1), torch.ones(1, 1), 1.0) for name in sdxl_shapes}
    tensors, _ = KOHYA.encode(Adapter(modules, "sdxl"))
    names = modules_in(tensors)
    assert len(names) == len(sdxl_shapes) > 700
    starts = ("input_blocks_", "middle_block_", "output_blocks_", "time_embed_", "label_emb_0_", "out_")
    assert all(name.removeprefix("lora_unet_").startswith(starts) for name in names)
    assert set(KOHYA.decode(tensors, {}, list(sdxl_shapes)).modules) == set(sdxl_shapes)


def test_diffusers_agrees_with_our_original_names(sdxl_shapes):
    from diffusers.loaders.lora_conversion_utils import (
        _convert_non_diffusers_lora_to_diffusers,
        _maybe_map_sgm_blocks_to_diffusers,
    )

    attention = [name for name in sdxl_shapes if ".attentions." in name]
    modules = {name: LoraDelta(torch.ones(1, 1), torch.ones(1, 1), 1.0) for name in attention}
    tensors, _ = KOHYA.encode(Adapter(modules, "sdxl"))

    class Config:
        layers_per_block = 2

    mapped = _maybe_map_sgm_blocks_to_diffusers(dict(tensors), Config())
    theirs, _ = _convert_non_diffusers_lora_to_diffusers(mapped)
    converted = {re.sub(r"\.processor\.(to_\w+?)_lora", r".\1", key.split(".lora.")[0]) for key in theirs}
    converted = {re.sub(r"\.(down|up)\.weight$", "", name) for name in converted}
    assert converted == {name.removesuffix(".0") if name.endswith("to_out.0") else name for name in attention}


@pytest.mark.parametrize("prefix", ["lora_te_", "lora_te1_"])
def test_both_prefixes_of_a_text_encoder_are_read(prefix):
    tensors, metadata = KOHYA.encode(small(NAMES, "sd"))
    renamed = {key.replace("lora_te_", prefix): tensor for key, tensor in tensors.items()}
    assert KOHYA.decode(renamed, metadata, NAMES) == small(NAMES, "sd")


def test_sdxl_in_diffusers_names_is_read_too():
    """diffusers writes such files."""
    adapter = small(SDXL_NAMES, "sdxl")
    tensors, _ = KOHYA.encode(Adapter(adapter.modules, "sd"))
    assert KOHYA.decode(tensors, {}, SDXL_NAMES) == adapter


@pytest.mark.parametrize(("names", "family"), [(NAMES, "sd"), (SDXL_NAMES, "sdxl")])
def test_kohyas_own_oft_has_its_own_prefix(names, family):
    inside = {name: (8, 8) for name in names if name.startswith("unet.") and len(names[name]) == 2}
    adapter = Adapter({name: random_delta("oft", shape) for name, shape in inside.items()}, family)
    tensors, _ = KOHYA.encode(adapter)
    renamed = {key.replace("lora_unet_", "oft_unet_"): tensor for key, tensor in tensors.items()}
    assert KOHYA.detect(renamed, {})
    adapter = KOHYA.decode(renamed, {}, inside)
    assert adapter.modules.keys() == inside.keys()
    assert adapter == KOHYA.decode(tensors, {}, inside)


def test_a_module_under_two_names_is_refused():
    both = KOHYA.encode(small(SDXL_NAMES, "sdxl"))[0] | KOHYA.encode(small(SDXL_NAMES, "sd"))[0]
    with pytest.raises(AdapterError, match="in the file twice"):
        KOHYA.decode(both, {}, SDXL_NAMES)


def test_without_a_base_only_our_own_file_is_read(tmp_path):
    adapter = Adapter({f"unet.odd.{name}": random_delta("lora", NAMES[name]) for name in NAMES}, "sd")
    tensors, metadata = KOHYA.encode(adapter)
    with pytest.raises(AdapterError, match="a base is needed"):
        KOHYA.decode(tensors, {})
    with pytest.raises(AdapterError, match="not a list of module names"):
        KOHYA.decode(tensors, {"loraline.modules": "[1]"})
    assert KOHYA.decode(tensors, metadata) == adapter


def test_a_flattened_name_of_two_modules_is_never_guessed():
    names = ["unet.a_b.c", "unet.a.b_c"]
    tensors, _ = KOHYA.encode(Adapter({names[0]: random_delta("lora", (4, 4))}, "sd"))
    with pytest.raises(AdapterError, match="several modules"):
        KOHYA.decode(tensors, {}, names)
    with pytest.raises(AdapterError, match="same name in this format"):
        KOHYA.encode(Adapter({name: random_delta("lora", (4, 4)) for name in names}, "sd"))


def test_a_component_without_kohya_name_is_refused():
    with pytest.raises(AdapterError, match="'text_encoder_4'"):
        KOHYA.encode(Adapter({"text_encoder_4.a": random_delta("lora", (4, 4))}))


@pytest.mark.parametrize(
    ("dtype", "alpha", "stored"),
    [
        (torch.float16, 8.0, torch.float16),
        (torch.bfloat16, 256.0, torch.bfloat16),
        (torch.bfloat16, 257.0, torch.float32),
        (torch.float32, 0.1, torch.float64),
    ],
)
def test_alpha_is_always_written_and_never_rounded(dtype, alpha, stored):
    adapter = Adapter({"unet.a": random_delta("lora", (4, 4), 2, alpha, dtype=dtype)}, "sd")
    tensors, metadata = KOHYA.encode(adapter)
    assert tensors["lora_unet_a.alpha"].dtype == stored
    assert tensors["lora_unet_a.lora_down.weight"].dtype == dtype
    assert KOHYA.decode(tensors, metadata) == adapter


@pytest.mark.parametrize(
    ("base", "width", "version", "architecture"),
    [
        ("sd", 768, "sd_v1", "stable-diffusion-v1/lora"),
        ("sd", 1024, "sd_v2", "stable-diffusion-v2-512/lora"),
        ("sdxl", 2048, "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
    ],
)
def test_the_header_has_the_entries_that_a1111_reads(base, width, version, architecture, tmp_path):
    name = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    adapter = Adapter({name: random_delta("lora", (8, width), 4, 2.0)}, base)
    path = write_adapter(tmp_path, adapter, format="kohya", card=Card(title="Zorb", base="tiny", trigger="sks"))[0]
    header = read_header(path)[1]
    assert header["ss_base_model_version"] == version
    assert header["modelspec.architecture"] == architecture
    assert header["ss_v2"] == str(version == "sd_v2")
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("4", "2.0")
    assert header["ss_network_module"] == "networks.lora"
    assert header["modelspec.title"] == header["ss_output_name"] == "Zorb"
    assert header["modelspec.trigger_phrase"] == "sks"
    assert len(header["sshs_model_hash"]) == 64
    back = read_adapter(path)
    assert back[0] == adapter
    assert json.loads(header["loraline.modules"]) == [name]


def test_another_programs_header_is_carried_over(tmp_path):
    strange = {
        "ss_learning_rate": "0.0001",
        "ss_tag_frequency": '{"a": 1}',
        "ss_base_model_version": "sd_v2_v",
        "ss_network_dim": "999",
        "modelspec.author": "Ada",
        "modelspec.architecture": "stable-diffusion-v2-768-v/lora",
        "modelspec.title": "Zorb",
    }
    tensors, _ = KOHYA.encode(small(NAMES, "sd"))
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "external.safetensors", metadata=strange)
    adapter, card = read_adapter(tmp_path / "external.safetensors", NAMES)
    assert (adapter.base, card.title) == ("sd", "Zorb")
    for form in ("loraline", "kohya"):
        path = write_adapter(tmp_path / form, adapter, format=form, card=card)[0]
        header = read_header(path)[1]
        assert {key: header.get(key) for key in strange if key != "ss_network_dim"} == {
            key: text for key, text in strange.items() if key != "ss_network_dim"
        }
        assert header.get("ss_network_dim") != "999", "ranks are recomputed for the written file"
        assert read_adapter(path, NAMES) == (adapter, card)

"""diffusers' FLUX and SD3 transformers load our exports and compute what they compute under our own `attach`."""

import json
from functools import cache

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, SD3Transformer2DModel, StableDiffusion3Pipeline
from law_adapters import random_delta

from lora_engine.adapters import Adapter, DictTree, attach, module_shapes, select_modules
from lora_engine.formats import codecs, read_adapter, write_adapter
from lora_engine.formats.safetensors_io import read_safetensors


def make_flux():
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    ).eval()


def make_sd3():
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,  # the last layer has no text output
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        out_channels=4,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    ).eval()


@torch.no_grad()
def run_flux(model):
    generator = torch.Generator().manual_seed(3)
    noisy, text = torch.randn(1, 4, 8, generator=generator), torch.randn(1, 3, 12, generator=generator)
    return model(
        hidden_states=noisy,
        encoder_hidden_states=text,
        pooled_projections=torch.randn(1, 10, generator=generator),
        timestep=torch.tensor([0.5]),
        img_ids=torch.zeros(4, 3),
        txt_ids=torch.zeros(3, 3),
        guidance=torch.tensor([3.5]),
    ).sample


@torch.no_grad()
def run_sd3(model):
    generator = torch.Generator().manual_seed(3)
    return model(
        hidden_states=torch.randn(1, 4, 8, 8, generator=generator),
        encoder_hidden_states=torch.randn(1, 3, 12, generator=generator),
        pooled_projections=torch.randn(1, 10, generator=generator),
        timestep=torch.tensor([500]),
    ).sample


FAMILIES = {
    "flux": (make_flux, run_flux, FluxPipeline),
    "sd3": (make_sd3, run_sd3, StableDiffusion3Pipeline),
}
families = pytest.mark.parametrize("family", FAMILIES)


def tree_of(model, family):
    return DictTree({"transformer": model}, family)


def adapter_for(model, family, ranks=(2,), alphas=(1.0,)):
    modules = {}
    for place, (name, shape) in enumerate(module_shapes(tree_of(model, family)).items()):
        if len(shape) == 2:
            delta = random_delta("lora", shape, ranks[place % len(ranks)], alphas[place % len(alphas)], place)
            modules[name] = delta.with_factors({key: factor * 0.5 for key, factor in delta.factors().items()})
    return Adapter(modules, family)


@cache
def plain(family):
    """Returns a shared model for attaching only; no test loads a file into it."""
    return FAMILIES[family][0]()


def ours(adapter, family):
    model = plain(family)
    with attach(tree_of(model, family), adapter):
        return FAMILIES[family][1](model)


def pipeline_with(model, family):
    """Returns a pipeline with only the transformer."""
    names = ["scheduler", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"]
    names += ["text_encoder_3", "tokenizer_3"] if family == "sd3" else []
    return FAMILIES[family][2](transformer=model, **dict.fromkeys(names))


@families
@pytest.mark.parametrize("form", ["diffusers", "aitoolkit"])
@pytest.mark.parametrize(("ranks", "alphas"), [((2,), (2.0,)), ((2,), (1.0,)), ((1, 2), (1.0, 2.0, 3.3))], ids=str)
def test_diffusers_computes_what_we_do_from_our_file(family, form, ranks, alphas, tmp_path):
    make, run, _ = FAMILIES[family]
    model = make()
    adapter = adapter_for(model, family, ranks, alphas)
    path = write_adapter(tmp_path / "a.safetensors", adapter, format=form)[0]
    pipeline_with(model, family).load_lora_weights(str(path))
    expected = ours(adapter, family)
    assert (expected - run(plain(family))).abs().max() > 0.05
    torch.testing.assert_close(run(model), expected, rtol=0, atol=1e-5)


@families
def test_the_model_itself_loads_our_file_without_a_pipeline(family, tmp_path):
    make, run, _ = FAMILIES[family]
    model = make()
    adapter = adapter_for(model, family)
    path = write_adapter(tmp_path, adapter, format="diffusers")[0]
    tensors, _ = read_safetensors(path)
    model.load_lora_adapter(dict(tensors), prefix="transformer")
    torch.testing.assert_close(run(model), ours(adapter, family), rtol=0, atol=1e-5)


@families
@pytest.mark.parametrize("form", ["kohya", "comfyui", "onetrainer", "lycoris", "loraline", "peft"])
def test_a_round_trip_through_any_format_computes_the_same(family, form, tmp_path):
    adapter = adapter_for(plain(family), family, (1, 2), (1.0, 3.0))
    write_adapter(tmp_path / form, adapter, format=form)
    back, _ = read_adapter(tmp_path / form, module_shapes(tree_of(plain(family), family)))
    torch.testing.assert_close(ours(back, family), ours(adapter, family), rtol=0, atol=1e-5)


@families
def test_original_names_match_the_computation_of_the_original_layers(family):
    """Fuses weights as diffusers' conversion scripts do, with the halves of the last norm exchanged."""
    adapter = adapter_for(plain(family), family)
    tensors, _ = codecs["comfyui"].encode(adapter)
    block = {
        "flux": ("diffusion_model.double_blocks.0.img_attn.qkv", "transformer.transformer_blocks.0.attn.to_{}"),
        "sd3": ("diffusion_model.joint_blocks.0.x_block.attn.qkv", "transformer.transformer_blocks.0.attn.to_{}"),
    }[family]
    up, down = (tensors[f"{block[0]}.lora_{side}.weight"] for side in ("up", "down"))
    scale = tensors[f"{block[0]}.alpha"].item() / down.shape[0]
    parts = [adapter.modules[block[1].format(letter)].delta_weight(torch.zeros(16, 16)) for letter in "qkv"]
    torch.testing.assert_close(scale * up @ down, torch.cat(parts))
    last = "diffusion_model.final_layer.adaLN_modulation.1"
    change = tensors[f"{last}.lora_up.weight"] @ tensors[f"{last}.lora_down.weight"]
    expected = adapter.modules["transformer.norm_out.linear"]
    torch.testing.assert_close(change, (expected.up @ expected.down).roll(16, 0))


def test_diffusers_reads_no_kohya_file_of_another_width_and_our_export_of_it_is_right(tmp_path):
    """Its converter hardcodes the widths of the published model."""
    model = make_flux()
    adapter = adapter_for(model, "flux")
    path = write_adapter(tmp_path / "kohya.safetensors", adapter, format="kohya")[0]
    with pytest.raises(AssertionError):
        pipeline_with(make_flux(), "flux").load_lora_weights(str(path))
    back, _ = read_adapter(path)
    assert back == adapter
    write_adapter(tmp_path / "right.safetensors", back, format="diffusers")
    pipeline_with(model, "flux").load_lora_weights(str(tmp_path / "right.safetensors"))
    torch.testing.assert_close(run_flux(model), ours(adapter, "flux"), rtol=0, atol=1e-5)


def test_we_read_what_diffusers_writes(tmp_path):
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    model = make_flux()
    model.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "add_k_proj", "proj_mlp", "linear_1"]))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    metadata = json.loads(json.dumps(model.peft_config["default"].to_dict(), default=sorted))
    FluxPipeline.save_lora_weights(
        tmp_path, transformer_lora_layers=get_peft_model_state_dict(model), transformer_lora_adapter_metadata=metadata
    )
    adapter, _ = read_adapter(tmp_path, module_shapes(tree_of(plain("flux"), "flux")))
    assert adapter.base == "flux"
    assert {delta.alpha for delta in adapter.modules.values()} == {6.0}
    torch.testing.assert_close(ours(adapter, "flux"), run_flux(model), rtol=0, atol=1e-5)


def test_the_targets_of_a_base_are_the_layers_of_its_transformer():
    names = select_modules(module_shapes(tree_of(plain("flux"), "flux")), ["all"])
    assert "transformer.transformer_blocks.0.attn.to_q" in names

"""`import lora_engine as le`, as the module's docstring shows it: on a pipeline of diffusers, a module, and files."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

import lora_engine as le
from lora_engine.adapters import DictTree


class Pipeline:
    """What a pipeline of diffusers offers: its parts by name, not all of them torch modules."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.unet = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.text_encoder = nn.Sequential(nn.Linear(8, 8))
        for parameter in (*self.unet.parameters(), *self.text_encoder.parameters()):
            parameter.data = torch.randn(parameter.shape, generator=generator)
        self.components: dict[str, Any] = {"unet": self.unet, "text_encoder": self.text_encoder, "tokenizer": object()}


def adapter_for(pipeline: Pipeline, *components: str, seed: int = 1) -> le.Adapter:
    parts = {name: pipeline.components[name] for name in components}
    generator = torch.Generator().manual_seed(seed)
    adapter = le.create_adapter(DictTree(parts, "sd"), "*", rank=2, generator=generator)
    modules = {
        name: delta.with_factors({k: torch.randn(f.shape, generator=generator) for k, f in delta.factors().items()})
        for name, delta in adapter.modules.items()
    }
    return le.Adapter(modules, adapter.base, adapter.fingerprint)


@pytest.fixture
def pipeline() -> Pipeline:
    return Pipeline()


@pytest.fixture
def loaded(pipeline: Pipeline, tmp_path: Path) -> le.LoadedAdapter:
    saved = le.LoadedAdapter(adapter_for(pipeline, "unet"), le.Card(title="zorb", license="MIT"))
    (file,) = saved.save(str(tmp_path / "zorb.safetensors"))
    return le.load(str(file))


def test_a_saved_adapter_is_loaded_with_its_card_and_has_a_short_repr(loaded, pipeline):
    assert loaded.adapter == adapter_for(pipeline, "unet")
    assert (loaded.card.title, loaded.card.license) == ("zorb", "MIT")
    assert repr(loaded) == "<Adapter sd lora r=2, 2 modules>"
    assert loaded.components == ("unet",)


def test_another_format_is_written_and_read_back(loaded, pipeline, tmp_path):
    names = le.module_shapes({"unet": pipeline.unet})
    (file,) = loaded.save(tmp_path / "kohya.safetensors", format="kohya")
    again = le.load(file, base=pipeline)
    assert again.adapter.modules.keys() == names.keys()
    for name, delta in loaded.adapter.modules.items():
        weight = torch.zeros(names[name])
        torch.testing.assert_close(again.adapter.modules[name].delta_weight(weight), delta.delta_weight(weight))


def test_an_attached_adapter_changes_the_output_by_its_scale_until_the_block_ends(loaded, pipeline):
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    changed = copy.deepcopy(pipeline.unet)
    le.collapse({"unet": changed}, loaded.adapter, 0.8)
    plain = pipeline.unet(x)
    with loaded.attached(pipeline.unet, scale=0.8):
        inside = pipeline.unet(x)
    assert torch.equal(pipeline.unet(x), plain)
    torch.testing.assert_close(inside, changed(x), rtol=1e-4, atol=1e-4)
    assert (inside - plain).abs().max() > 1e-2
    with le.attach(pipeline, loaded, 0.8):
        assert torch.equal(pipeline.unet(x), inside)


def test_an_adapter_of_two_components_needs_the_pipeline_or_one_part_of_itself(pipeline):
    both = le.LoadedAdapter(adapter_for(pipeline, "unet", "text_encoder"), le.Card())
    with pytest.raises(le.AdapterError, match="text_encoder, unet") as refused:
        both.attached(pipeline.unet)
    assert "only('unet')" in str(refused.value)
    with both.attached(pipeline):
        assert type(pipeline.text_encoder[0]).__name__ == "AdaptedLayer"
    with both.only("unet").attached(pipeline.unet):
        assert type(pipeline.unet[0]).__name__ == "AdaptedLayer"
    with pytest.raises(le.AdapterError, match="vae"):
        both.only("vae")


def unet() -> nn.Module:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def transformer() -> nn.Module:
    return FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    )


QUERIES = r"re:.*\.(to_q|q_proj|q)"
SMALL = {"vocab_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}


def text_encoder() -> nn.Module:
    return CLIPTextModel(CLIPTextConfig(**SMALL, hidden_size=8, intermediate_size=8))


def t5() -> nn.Module:
    return T5EncoderModel(T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))


@pytest.mark.parametrize("build", [unet, transformer, text_encoder])
def test_a_single_module_is_the_component_that_its_class_says(build, tmp_path):
    module = build()
    adapter = le.create_adapter(module, QUERIES, rank=2)
    assert adapter.components == (build.__name__,)
    (file,) = le.LoadedAdapter(adapter, le.Card()).save(tmp_path / "a.safetensors")
    loaded = le.load(file, base=module)
    assert loaded.adapter.modules.keys() == adapter.modules.keys()
    classes = {name: type(layer) for name, layer in module.named_modules()}
    with loaded.attached(module):
        assert {name: type(layer) for name, layer in module.named_modules()} != classes
    assert {name: type(layer) for name, layer in module.named_modules()} == classes


def test_a_module_of_another_component_is_refused(tmp_path):
    adapter = le.create_adapter(unet(), QUERIES, rank=2)
    with pytest.raises(le.AdapterError, match="'unet', and a 'CLIPTextModel' is 'text_encoder'"):
        le.attach(text_encoder(), adapter)
    with pytest.raises(le.AdapterError, match="'unet', and a 'FluxTransformer2DModel' is 'transformer'"):
        le.collapse(transformer(), adapter)
    (file,) = le.LoadedAdapter(adapter, le.Card()).save(tmp_path / "a.safetensors")
    with pytest.raises(le.AdapterError, match="no module"):
        le.load(file, base=transformer())


def test_a_class_that_several_components_have_is_named_by_the_caller_or_the_adapter():
    module = t5()
    with pytest.raises(le.AdapterError, match=r"'T5EncoderModel'.*Fix: .*\{'text_encoder': module\}"):
        le.module_shapes(module)
    with pytest.raises(le.AdapterError, match=r"'Sequential'.*Fix: .*\{'unet': module\}"):
        le.create_adapter(nn.Sequential(nn.Linear(8, 8)), "*")
    adapter = le.create_adapter({"text_encoder_2": module}, QUERIES, rank=2)
    with le.attach(module, adapter) as attachment:
        assert len(attachment.parameters()) == 2


def test_what_holds_no_modules_is_refused(loaded):
    with pytest.raises(le.AdapterError, match="'int'"):
        loaded.attached(3)


def test_learned_tokens_that_are_not_attached_are_named(loaded, pipeline):
    with_token = le.LoadedAdapter(
        loaded.adapter, loaded.card, (le.Embedding("<zorb>", {"text_encoder": torch.zeros(1, 8)}),)
    )
    with pytest.warns(UserWarning, match="<zorb>"), with_token.attached(pipeline.unet):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded.attached(pipeline.unet).detach()


@pytest.mark.parametrize(("method", "options"), [("concatenate", {}), ("ties", {"density": 0.5}), ("linear", {})])
def test_merged_adapters_are_one_with_the_weighted_sum_or_what_the_method_keeps(pipeline, method, options):
    one, other = (
        le.LoadedAdapter(adapter_for(pipeline, "unet", seed=seed), le.Card(title=f"a{seed}", license="MIT"))
        for seed in (1, 2)
    )
    merged = le.merge([one, other], weights=[0.7, 0.3], method=method, **options)
    assert (merged.card.license, merged.card.recipe["method"]) == ("MIT", method)
    assert merged.report is not None
    assert merged.adapter == le.merge([other, one], weights=[0.3, 0.7], method=method, **options).adapter
    if method != "ties":
        weight = torch.zeros(8, 8)
        for name, delta in merged.adapter.modules.items():
            expected = 0.7 * one.adapter.modules[name].delta_weight(weight) + 0.3 * other.adapter.modules[
                name
            ].delta_weight(weight)
            torch.testing.assert_close(delta.delta_weight(weight), expected, rtol=1e-4, atol=1e-4)


def test_a_merge_that_cannot_be_made_names_the_setting(loaded):
    with pytest.raises(le.SettingsError, match="dataset"):
        le.merge([loaded, loaded], method="learned")
    with pytest.raises(le.SettingsError, match="densty"):
        le.merge([loaded, loaded], method="ties", densty=0.5)


def test_a_resized_adapter_has_the_rank_and_says_what_it_keeps(loaded):
    smaller = le.resize(loaded, rank=1)
    assert {delta.rank for delta in smaller.adapter.modules.values()} == {1}
    assert smaller.report is not None
    assert 0 < smaller.report.retained < 1
    assert smaller.card == loaded.card

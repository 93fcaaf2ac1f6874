"""Tests what PEFT's configuration and the shapes of its tensors state: gains, series, patterns of alphas."""

import json
from dataclasses import replace

import pytest
import torch
from law_adapters import NAMES, random_delta

from lora_engine.adapters import Adapter, kinds
from lora_engine.adapters.published import empty_module
from lora_engine.errors import AdapterError, BaseModelError
from lora_engine.families import ComponentConfig
from lora_engine.formats import codecs, read_adapter, write_adapter
from lora_engine.formats.lora_config import PatternTable, parse_config

MODULE = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(("axis", "shape", "written"), [("input", (5, 1), (1, 5)), ("output", (1, 5), (5, 1))])
def test_gains_that_lie_across_are_written_as_peft_reads_them(axis, shape, written, tmp_path):
    gains = torch.arange(5.0).reshape(shape)
    adapter = Adapter({MODULE: kinds["peft-ia3"](gains, axis)}, "sd")
    write_adapter(tmp_path / "a", adapter, format="peft")
    read = read_adapter(tmp_path / "a")[0].modules[MODULE]
    assert (read.axis, tuple(read.scale.shape)) == (axis, written)
    weight = torch.ones(5, 5)
    assert torch.equal(read.delta_weight(weight), adapter.modules[MODULE].delta_weight(weight))
    assert not codecs["peft"].is_lossless(adapter)


@pytest.mark.parametrize("terms", [-1, 101, 10**9])
def test_the_terms_of_a_series_are_bounded_in_every_format(terms, tmp_path):
    delta = random_delta("peft-oft", NAMES[MODULE], 5)
    write_adapter(tmp_path / "peft", Adapter({MODULE: delta}, "sd"), format="peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_bytes())
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config | {"num_cayley_neumann_terms": terms}))
    with pytest.raises(AdapterError, match=rf"the series has {terms} terms.*0 \(exact\) to 100"):
        read_adapter(tmp_path / "peft")
    assert [issue.factor for issue in replace(delta, terms=terms).issues()] == ["terms"]
    assert list(replace(delta, terms=100).issues()) == []


PATTERNS = {"^a.to_q": 1, "to_q": 2, "b.to_q": 3, "a.to_k$": 4, r"c\.to_k": 5, "(x+)+": 6, "late": 7}


@pytest.mark.parametrize(
    ("path", "number"), [("a.to_q", 1), ("x.a.to_q", 2), ("b.to_q", 2), ("xto_q", 9), ("z.a.to_k", 4), ("c.to_k", 5)]
)
def test_the_first_pattern_that_matches_the_end_of_a_path_counts(path, number):
    table = parse_config(json.dumps({"alpha_pattern": dict(list(PATTERNS.items())[:5])}), "x")["alpha_pattern"]
    assert table.find(path, 9, "x") == number


def test_an_expression_is_refused_only_where_no_pattern_before_it_matches():
    table = PatternTable(PATTERNS)
    assert table.find("a.to_q", 9, "x") == 1
    for path in ("late", "other"):
        with pytest.raises(AdapterError, match="is no plain module name"):
            table.find(path, 9, "x")


def component(name="AutoencoderKL", library="diffusers", **settings):
    return ComponentConfig(library, name, {"block_out_channels": [32, 64], **settings})


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (component(layers_per_block=10**9), r"AutoencoderKL, layers_per_block: 1000000000 is too large.*at most 1000"),
        (component(latent_channels=10**9), "latent_channels: 1000000000 is too large"),
        (component(down_block_types=["DownEncoderBlock2D"] * 5000), "a list of 5000 values"),
        (component(nested={"num_layers": [1, 2, 3000]}), "nested, num_layers: 3000 is too large"),
        (component("DiffusionPipeline"), "diffusers has no network 'DiffusionPipeline'"),
        (component("nothing"), "diffusers has no network 'nothing'"),
        (component(block_out_channels="x"), "AutoencoderKL does not accept its settings"),
    ],
)
def test_a_strangers_settings_of_a_network_are_bounded(config, words):
    with pytest.raises(BaseModelError, match=words):
        empty_module(config)

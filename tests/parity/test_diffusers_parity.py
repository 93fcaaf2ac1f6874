"""diffusers loads our exports and draws the very pictures that we draw; where it is wrong, the test says so."""

import json

import pytest
import torch
from law_adapters import random_delta
from parity_models import make_pipeline

from lora_engine.adapters import Adapter, DictTree, attach, module_shapes, select_modules
from lora_engine.formats import read_adapter, write_adapter
from lora_engine.formats.safetensors_io import read_header

pytestmark = pytest.mark.slow


def tree_of(pipeline):
    return DictTree({"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}, "sd")


def adapter_for(pipeline, ranks, alphas, targets=("all", "text")):
    shapes = module_shapes(tree_of(pipeline))
    names = select_modules(shapes, list(targets))
    modules = {
        name: random_delta("lora", shapes[name], ranks[place % len(ranks)], alphas[place % len(alphas)], place)
        for place, name in enumerate(names)
    }
    return Adapter(modules, "sd")


def draw(pipeline):
    """A picture."""
    generator = torch.Generator().manual_seed(1)
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 16, "width": 16, "output_type": "pt"}
    return pipeline("zorb ab", generator=generator, **settings).images


def predict(pipeline):
    """What the two adapted networks compute together."""
    noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        states = pipeline.text_encoder(torch.tensor([[52, 3, 1, 53]])).last_hidden_state
        return pipeline.unet(noisy, torch.tensor([500]), states).sample


def ours(adapter, compute=predict):
    pipeline = make_pipeline()
    with attach(tree_of(pipeline), adapter):
        return compute(pipeline)


CASES = {
    "scale 1": ([2], [2.0]),
    "one alpha": ([2], [1.0]),
    "mixed ranks": ([1, 2], [2.0]),
    "mixed alphas": ([2], [1.0, 2.0, 4.0]),
    "all mixed": ([1, 2], [1.0, 2.0, 3.3]),
}


def test_a_whole_picture_is_the_same_in_diffusers(tmp_path):
    adapter = adapter_for(make_pipeline(), *CASES["all mixed"])
    write_adapter(tmp_path, adapter, format="diffusers")
    pipeline = make_pipeline()
    plain = draw(pipeline)
    pipeline.load_lora_weights(tmp_path)
    expected = ours(adapter, draw)
    assert (expected - plain).abs().max() > 0.05
    torch.testing.assert_close(draw(pipeline), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_diffusers_computes_what_we_do_from_our_diffusers_file(case, tmp_path):
    adapter = adapter_for(make_pipeline(), *CASES[case])
    write_adapter(tmp_path, adapter, format="diffusers")
    pipeline = make_pipeline()
    plain = predict(pipeline)
    pipeline.load_lora_weights(tmp_path)
    theirs, expected = predict(pipeline), ours(adapter)
    assert (expected - plain).abs().max() > 0.05
    torch.testing.assert_close(theirs, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["scale 1", "one alpha", "mixed ranks"])
def test_diffusers_computes_what_we_do_from_our_kohya_file(case, tmp_path):
    adapter = adapter_for(make_pipeline(), *CASES[case])
    write_adapter(tmp_path / "kohya.safetensors", adapter, format="kohya")
    pipeline = make_pipeline()
    pipeline.load_lora_weights(tmp_path / "kohya.safetensors")
    torch.testing.assert_close(predict(pipeline), ours(adapter), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match:RuntimeWarning")
def test_diffusers_misreads_mixed_alphas_in_kohya_files_and_our_export_of_the_same_file_is_right(tmp_path):
    adapter = adapter_for(make_pipeline(), *CASES["mixed alphas"])
    write_adapter(tmp_path / "kohya.safetensors", adapter, format="kohya")
    expected = ours(adapter)
    astray = make_pipeline()
    astray.load_lora_weights(tmp_path / "kohya.safetensors")
    scales = {n: d.scale for n, d in adapter.modules.items() if n.endswith(("attn1.to_q", "attn1.to_k"))}
    read = {n: next(iter(astray.unet.get_submodule(n.removeprefix("unet.")).scaling.values())) for n in scales}
    assert len(set(scales.values())) == 3
    assert len(set(read.values())) == 1, "diffusers reads mixed alphas now: say so in the codec"
    assert not torch.allclose(predict(astray), expected, atol=1e-3)
    back, card = read_adapter(tmp_path / "kohya.safetensors", module_shapes(tree_of(make_pipeline())))
    assert back == adapter
    write_adapter(tmp_path / "export", back, format="diffusers", card=card)
    right = make_pipeline()
    right.load_lora_weights(tmp_path / "export")
    torch.testing.assert_close(predict(right), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("with_metadata", [True, False])
def test_we_read_what_diffusers_writes(with_metadata, tmp_path):
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline = make_pipeline()
    config = LoraConfig(r=2, lora_alpha=2 if not with_metadata else 6, target_modules=["to_q", "proj_in", "conv1"])
    pipeline.unet.add_adapter(config)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in pipeline.unet.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    from diffusers.utils import convert_state_dict_to_diffusers

    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet))
    extra = {"unet_lora_adapter_metadata": config.to_dict()} if with_metadata else {}
    if with_metadata:
        extra["unet_lora_adapter_metadata"] = json.loads(json.dumps(config.to_dict(), default=sorted))
    type(pipeline).save_lora_weights(tmp_path, unet_lora_layers=layers, **extra)
    keys = list(read_header(tmp_path / "pytorch_lora_weights.safetensors")[0])
    assert any(".lora.down." in key for key in keys), "diffusers used to mix two spellings in one file"
    assert any(".lora_A." in key for key in keys)
    theirs = predict(pipeline)
    adapter, _ = read_adapter(tmp_path)
    assert {delta.alpha for delta in adapter.modules.values()} == {6.0 if with_metadata else 2.0}
    torch.testing.assert_close(ours(adapter), theirs, rtol=0, atol=1e-5)

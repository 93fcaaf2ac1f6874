"""diffusers loads our exports and generates the same images as we do; its errors are pinned."""

import json

import pytest
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from law_adapters import moved_delta
from parity_models import adapter_for, make_pipeline, ours, pipeline_shapes, plain_pipeline, predict
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from lora_engine.adapters import Adapter, select_modules
from lora_engine.formats import read_adapter, write_adapter
from lora_engine.formats.safetensors_io import read_header


def draw(pipeline):
    """Returns an image."""
    generator = torch.Generator().manual_seed(1)
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 16, "width": 16, "output_type": "pt"}
    return pipeline("zorb ab", generator=generator, **settings).images


def loaded(path):
    """Returns a pipeline with a file loaded by diffusers."""
    pipeline = make_pipeline()
    pipeline.load_lora_weights(path)
    return pipeline


CASES = {
    "scale 1": ([2], [2.0]),
    "one alpha": ([2], [1.0]),
    "mixed ranks": ([1, 2], [2.0]),
    "mixed alphas": ([2], [1.0, 2.0, 4.0]),
    "all mixed": ([1, 2], [1.0, 2.0, 3.3]),
}


def test_a_generated_image_is_the_same_in_diffusers(tmp_path):
    adapter = adapter_for("lora", *CASES["all mixed"])
    write_adapter(tmp_path, adapter, format="diffusers")
    expected = ours(adapter, draw)
    assert (expected - draw(plain_pipeline())).abs().max() > 0.05
    torch.testing.assert_close(draw(loaded(tmp_path)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("form", "case"),
    [
        ("diffusers", "scale 1"),
        ("diffusers", "one alpha"),
        ("diffusers", "all mixed"),
        ("kohya", "one alpha"),
        ("kohya", "mixed ranks"),
    ],
)
def test_diffusers_computes_what_we_do_from_our_file(form, case, tmp_path):
    adapter = adapter_for("lora", *CASES[case])
    path = write_adapter(tmp_path / "a.safetensors", adapter, format=form)[0]
    expected = ours(adapter)
    assert (expected - predict(plain_pipeline())).abs().max() > 0.05
    torch.testing.assert_close(predict(loaded(path)), expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match:RuntimeWarning")
def test_diffusers_misreads_mixed_alphas_in_kohya_files_and_our_export_of_the_same_file_is_right(tmp_path):
    adapter = adapter_for("lora", *CASES["mixed alphas"])
    write_adapter(tmp_path / "kohya.safetensors", adapter, format="kohya")
    expected = ours(adapter)
    astray = loaded(tmp_path / "kohya.safetensors")
    scales = {n: d.scale for n, d in adapter.modules.items() if n.endswith(("attn1.to_q", "attn1.to_k"))}
    read = {n: next(iter(astray.unet.get_submodule(n.removeprefix("unet.")).scaling.values())) for n in scales}
    assert len(set(scales.values())) == 3
    assert len(set(read.values())) == 1, "diffusers reads mixed alphas now: say so in the codec"
    assert not torch.allclose(predict(astray), expected, atol=1e-3)
    back, card = read_adapter(tmp_path / "kohya.safetensors", pipeline_shapes())
    assert back == adapter
    write_adapter(tmp_path / "export", back, format="diffusers", card=card)
    torch.testing.assert_close(predict(loaded(tmp_path / "export")), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("with_metadata", [True, False])
def test_we_read_what_diffusers_writes(with_metadata, tmp_path):
    pipeline = make_pipeline()
    config = LoraConfig(r=2, lora_alpha=2 if not with_metadata else 6, target_modules=["to_q", "proj_in", "conv1"])
    pipeline.unet.add_adapter(config)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in pipeline.unet.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet))
    extra = {"unet_lora_adapter_metadata": config.to_dict()} if with_metadata else {}
    if with_metadata:
        extra["unet_lora_adapter_metadata"] = json.loads(json.dumps(config.to_dict(), default=sorted))
    type(pipeline).save_lora_weights(tmp_path, unet_lora_layers=layers, **extra)
    keys = list(read_header(tmp_path / "pytorch_lora_weights.safetensors")[0])
    assert any(".lora.down." in key for key in keys), "diffusers used to mix two spellings in one file"
    assert any(".lora_A." in key for key in keys)
    reference = predict(pipeline)
    adapter, _ = read_adapter(tmp_path)
    assert {delta.alpha for delta in adapter.modules.values()} == {6.0 if with_metadata else 2.0}
    torch.testing.assert_close(ours(adapter), reference, rtol=0, atol=1e-5)


def dora_for(alpha):
    """Returns a DoRA of attentions and of convolutions, of one alpha or of several."""
    targets = ["attention", "unet.down_blocks.*.resnets.*.conv1", "unet.*.proj_in"]
    modules = {
        name: moved_delta(
            plain_pipeline().unet.get_submodule(name.removeprefix("unet.")), "dora", 2, alpha or 1.0 + place
        )
        for place, name in enumerate(select_modules(pipeline_shapes(), targets))
    }
    return Adapter(modules, "sd")


def test_diffusers_computes_what_we_do_from_our_diffusers_file_of_dora(tmp_path):
    adapter = dora_for(None)
    write_adapter(tmp_path, adapter, format="diffusers")
    expected = ours(adapter)
    assert (expected - predict(plain_pipeline())).abs().max() > 0.05
    torch.testing.assert_close(predict(loaded(tmp_path)), expected, rtol=1e-4, atol=1e-4)


def test_diffusers_drops_the_magnitude_of_kohyas_dora(tmp_path):
    adapter = dora_for(2.0)  # one alpha, because diffusers misreads several
    write_adapter(tmp_path / "a.safetensors", adapter, format="kohya")
    pipeline = loaded(tmp_path / "a.safetensors")
    assert not any("magnitude" in name for name, _ in pipeline.unet.named_parameters()), "diffusers reads it now"
    assert not torch.allclose(predict(pipeline), ours(adapter), atol=1e-2)
    assert read_adapter(tmp_path / "a.safetensors")[0] == adapter

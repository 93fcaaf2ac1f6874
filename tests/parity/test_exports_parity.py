"""LyCORIS and diffusers load our exports for them and compute the same; their errors are pinned."""

import pytest
import torch
from diffusers.utils.state_dict_utils import StateDictType, convert_state_dict_to_kohya
from lycoris import kohya as lycoris
from parity_models import adapter_for, make_pipeline, ours, pipeline_shapes, plain_pipeline, predict
from safetensors.torch import save_file
from torch import nn

from lora_engine.errors import AdapterError
from lora_engine.formats import codecs, read_adapter, write_adapter


class OldTextEncoder(nn.Module):
    """Wraps a text encoder of transformers 5 in the level `text_model` of transformers 4."""

    def __init__(self, encoder):
        super().__init__()
        self.text_model = encoder


def load_in_lycoris(file, pipeline, text_encoder):
    # Without this, its U-Net preset selects some modules twice and fails with "duplicated lora name".
    lycoris.LycorisNetworkKohya.apply_preset({"unet_target_name": [], "unet_target_module": []})
    network, _ = lycoris.create_network_from_weights(1.0, str(file), None, text_encoder, pipeline.unet)
    network.apply_to(text_encoder, pipeline.unet, True, True)
    return network


@pytest.mark.parametrize("form", ["lycoris", "kohya"])
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_lycoris_computes_what_we_do_from_our_files(form, kind, tmp_path):
    adapter = adapter_for(kind)
    file = write_adapter(tmp_path, adapter, format=form)[0]
    pipeline = make_pipeline()
    network = load_in_lycoris(file, pipeline, OldTextEncoder(pipeline.text_encoder))
    assert len(network.unet_loras) + len(network.text_encoder_loras) == len(adapter.modules)
    expected = ours(adapter)
    assert (expected - predict(plain_pipeline())).abs().max() > 1e-3
    torch.testing.assert_close(predict(pipeline), expected, rtol=0, atol=2e-5)


def test_lycoris_silently_loses_text_encoders_of_transformers_5(tmp_path):
    adapter = adapter_for()
    file = write_adapter(tmp_path, adapter, format="lycoris")[0]
    pipeline = make_pipeline()
    if hasattr(pipeline.text_encoder, "text_model"):
        pytest.skip("transformers 4 has the level")
    network = load_in_lycoris(file, pipeline, pipeline.text_encoder)
    count = sum(name.startswith("unet.") for name in adapter.modules)
    assert (len(network.unet_loras), len(network.text_encoder_loras)) == (count, 0)
    back = read_adapter(file, pipeline_shapes())[0]
    assert back == adapter, "we find them under every version"


def test_lycoris_needs_every_alpha_and_we_write_every_alpha(tmp_path):
    tensors, _ = codecs["lycoris"].encode(adapter_for(targets=("attention",)))
    modules = {key.split(".", maxsplit=1)[0] for key in tensors}
    assert len(modules) > 1
    assert all(f"{module}.alpha" in tensors for module in modules)
    save_file({k: v for k, v in tensors.items() if not k.endswith(".alpha")}, tmp_path / "a.safetensors")
    pipeline = make_pipeline()
    with pytest.raises(TypeError, match="NoneType"):
        load_in_lycoris(tmp_path / "a.safetensors", pipeline, OldTextEncoder(pipeline.text_encoder))
    back = read_adapter(tmp_path / "a.safetensors", pipeline_shapes())[0]
    assert {delta.scale for delta in back.modules.values()} == {1.0}


@pytest.mark.parametrize("kind", ["loha", "lokr", "full"])
def test_diffusers_refuses_what_our_diffusers_format_refuses(kind, tmp_path):
    adapter = adapter_for(kind, targets=("attention",))
    file = write_adapter(tmp_path / "a.safetensors", adapter, format="kohya")[0]
    with pytest.raises(ValueError, match="renamed"):
        make_pipeline().load_lora_weights(file)
    with pytest.raises(AdapterError, match="diffusers does not load it"):
        write_adapter(tmp_path / "b", adapter, format="diffusers")


def test_kohya_names_written_by_diffusers_lose_alpha_and_are_still_found():
    adapter = adapter_for(ranks=(4,), targets=("attention",))
    tensors = {k: v for k, v in codecs["diffusers"].encode(adapter)[0].items() if k.startswith("unet.")}
    reference = convert_state_dict_to_kohya(tensors, original_type=StateDictType.PEFT)
    assert {float(value) for key, value in reference.items() if key.endswith(".alpha")} == {4.0}
    names = pipeline_shapes()
    back = codecs["kohya"].decode({key: value.float() for key, value in reference.items()}, {}, names)
    assert back.modules.keys() == {name for name in adapter.modules if name.startswith("unet.")}
    assert {delta.scale for delta in back.modules.values()} == {1.0}
    assert {delta.scale for delta in adapter.modules.values()} == {0.25}, "the strength that diffusers' converter loses"

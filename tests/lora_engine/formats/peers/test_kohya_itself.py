"""kohya's own code (sd-scripts) applies and merges our files, and saves files that we read, in every family.

Its networks run on small models of its own classes, and names come from its own tables, where it has them: an error of
ours in a name cannot be on both sides of a comparison. SD_SCRIPTS names a checkout.
"""

import importlib
import os
import sys
from unittest.mock import MagicMock

import pytest
import torch
import transformers
from law_adapters import random_delta

from lora_engine.adapters import Adapter
from lora_engine.formats import read_adapter, write_adapter

ROOT = os.environ.get("SD_SCRIPTS", "")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not ROOT, reason="SD_SCRIPTS names no checkout of kohya's sd-scripts"),
]
# Modules that no network uses: image libraries, and two modules of kohya that need an older transformers.
UNUSED = ("cv2", "imagesize", "torchvision", "torchvision.transforms")
OLD = ("library.lpw_stable_diffusion", "library.sdxl_lpw_stable_diffusion")
NARROW = {
    ("original_unet", "BLOCK_OUT_CHANNELS"): (32, 64, 128, 128),
    ("original_unet", "TIMESTEP_INPUT_DIM"): 32,
    ("original_unet", "TIME_EMBED_DIM"): 128,
    ("sdxl_original_unet", "MODEL_CHANNELS"): 32,
    ("sdxl_original_unet", "TIME_EMBED_DIM"): 128,
}
NETWORKS = {"sd": "lora", "sdxl": "lora", "flux": "lora_flux", "sd3": "lora_sd3"}
SD3_SIDES = {
    "x_block": ("norm1", "ff", "to_q to_k to_v", "to_out.0"),
    "context_block": ("norm1_context", "ff_context", "add_q_proj add_k_proj add_v_proj", "to_add_out"),
}
TURNED = "joint_blocks_1_context_block_adaLN_modulation_1"  # diffusers swaps the halves of its rows


@pytest.fixture(scope="module")
def kohya():
    """Makes kohya's modules importable during the tests, with narrow models."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        for name in (*OLD, *(name for name in UNUSED if not importlib.util.find_spec(name.partition(".")[0]))):
            patch.setitem(sys.modules, name, MagicMock())
        for (module, name), size in NARROW.items():
            patch.setattr(importlib.import_module(f"library.{module}"), name, size)
        yield


def clip(width, layers, projected=False):
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "projection_dim": width, "num_hidden_layers": layers}
    ids = {"vocab_size": 60, "bos_token_id": 57, "eos_token_id": 58, "pad_token_id": 58}
    config = transformers.CLIPTextConfig(**sizes, **ids, num_attention_heads=2, max_position_embeddings=16)
    encoder = (transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(config)
    # transformers 5 has no level `text_model`
    return encoder if hasattr(encoder, "text_model") else torch.nn.ModuleDict({"text_model": encoder})


def t5():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    return transformers.T5EncoderModel(transformers.T5Config(**sizes, feed_forward_proj="gated-gelu"))


def sd3_names(path):
    _, block, side, part, *rest = path.split(".")
    norm, forward, inputs, output = SD3_SIDES[side]
    inside = {"adaLN_modulation": [f"{norm}.linear"], "mlp": [f"{forward}.net.{'2' if rest == ['fc2'] else '0.proj'}"]}
    names = inside.get(part) or [f"{part}.{name}" for name in (inputs.split() if rest == ["qkv"] else [output])]
    return [f"transformer_blocks.{block}.{name}" for name in names]


def model_of(family):
    """Returns the large model, the text encoders, and a function from a path to our names of the layer's parts."""
    torch.manual_seed(0)
    if family == "sd":
        from library.original_unet import UNet2DConditionModel

        return UNet2DConditionModel(64, 8, cross_attention_dim=32), [clip(32, 12)], lambda path: [path]
    if family == "sdxl":
        from library import sdxl_model_util, sdxl_original_unet

        table = sdxl_model_util.make_unet_conversion_map()
        change = lambda path: next(new + path[len(old) :] for old, new in table if path.startswith(old))  # noqa: E731
        unet, texts = sdxl_original_unet.SdxlUNet2DConditionModel(), [clip(32, 3), clip(48, 3, True)]
        return unet, texts, lambda path: [change(f"{path}.")[:-1]]
    if family == "flux":
        from library import flux_models, flux_utils

        sizes = (16, 16, 32, 32, 4.0, 2, 2, 2, [4, 6, 6], 10000, True, True)
        table = sorted(flux_utils.make_diffusers_to_bfl_map(2, 2).items(), key=lambda entry: entry[1])
        names = lambda path: [new[:-7] for new, (_, old) in table if old == f"{path}.weight"]  # noqa: E731
        return flux_models.Flux(flux_models.FluxParams(*sizes)), [clip(16, 2), t5()], names
    from library.sd3_models import MMDiT

    sizes = {"pos_embed_max_size": 8, "num_patches": 64, "context_embedder_in_features": 32}
    mmdit = MMDiT(None, **sizes, context_embedder_out_features=128, depth=2, x_block_self_attn_layers=[0])
    return mmdit, [clip(16, 2, True), clip(24, 3, True), t5()], sd3_names


class Peer:
    """A family: kohya's network and models, and by the network's names the layers and our names of their parts."""

    def __init__(self, family):
        self.family, self.layers, self.parts = family, {}, {}
        self.network = importlib.import_module(f"networks.{NETWORKS[family]}")
        self.model, texts, names = model_of(family)
        self.text = texts[0] if family == "sd" else texts
        expected = {lora.lora_name for lora in loras_of(self.make())}
        components = [("lora_unet", "unet" if NETWORKS[family] == "lora" else "transformer", self.model, names)]
        for i, text in enumerate(texts, 1):
            number = "" if family == "sd" else 3 if isinstance(text, transformers.T5EncoderModel) else i
            components.append((f"lora_te{number}", f"text_encoder_{i}".removesuffix("_1"), text, lambda path: [path]))
        for prefix, component, model, names in components:
            for path, layer in model.named_modules():
                name = f"{prefix}_{path.replace('.', '_')}"
                if name in expected:
                    self.layers[name], self.parts[name] = layer, [f"{component}.{part}" for part in names(path)]
        assert self.layers.keys() == expected

    def make(self):
        more = {"conv_dim": 2, "train_t5xxl": "True", "in_dims": "[2,2,2,2,2]"}
        return self.network.create_network(1.0, 2, 1.0, None, self.text, self.model, **more)

    def load(self, folder, adapter):
        arguments = (1.0, str(write_adapter(folder, adapter, format="kohya")[0]), None, self.text, self.model)
        return self.network.create_network_from_weights(*arguments, for_inference=True)

    def parts_of(self, name):
        """Returns our names of a layer's parts with their shapes: q, k and v have one size, the rest follows."""
        layer, count = self.layers[name], len(self.parts[name])
        out, *rest = layer.weight.shape
        rows = [out] if count == 1 else [layer.in_features] * 3 + [out - 3 * layer.in_features] * (count - 3)
        return {part: (number, *rest) for part, number in zip(self.parts[name], rows, strict=True)}

    def shapes(self):
        return {part: shape for name in self.layers for part, shape in self.parts_of(name).items()}

    def adapter(self):
        """Returns ranks and alphas that differ between modules."""
        modules = {}
        for i, (name, shape) in enumerate(self.shapes().items()):
            modules[name] = random_delta("lora", shape, 1 + i % 4, (0.5, 3.0, 7.25, 1.0, 16.0)[i % 5], i)
        return Adapter(modules, self.family)

    def change(self, adapter, name):
        parts = self.parts_of(name).items()
        change = torch.cat([adapter.modules[part].delta_weight(torch.zeros(shape)) for part, shape in parts])
        return torch.cat(change.chunk(2)[::-1]) if name.endswith(TURNED) else change


def assert_close(actual, expected):
    assert float((actual - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def loras_of(network):
    return network.text_encoder_loras + network.unet_loras


def change_of(lora):
    return lora.scale * (lora.lora_up.weight.flatten(1) @ lora.lora_down.weight.flatten(1))


@pytest.fixture(params=NETWORKS)
def peer(kohya, request):
    return Peer(request.param)


@torch.no_grad()
def test_kohya_merges_and_applies_every_module_of_our_file(peer, tmp_path):
    adapter = peer.adapter()
    network, tensors = peer.load(tmp_path, adapter)
    assert {lora.lora_name for lora in loras_of(network)} == peer.layers.keys()
    before = {name: layer.weight.clone() for name, layer in peer.layers.items()}
    network.merge_to(peer.text, peer.model, tensors, torch.float32, "cpu")
    network.apply_to(peer.text, peer.model)
    network.load_state_dict(tensors)
    for lora in loras_of(network):
        expected = peer.change(adapter, lora.lora_name)
        assert_close(peer.layers[lora.lora_name].weight - before[lora.lora_name], expected)
        assert_close(change_of(lora), expected.flatten(1))


@torch.no_grad()
@pytest.mark.parametrize("with_base", [True, False])
def test_we_read_files_saved_by_kohya(peer, with_base, tmp_path):
    network, file = peer.make(), tmp_path / "a.safetensors"
    network.apply_to(peer.text, peer.model)
    for factor in network.parameters():
        factor.copy_(torch.randn(factor.shape).bfloat16())
    network.save_weights(str(file), torch.bfloat16, {})
    adapter = read_adapter(file, peer.shapes() if with_base or NETWORKS[peer.family] != "lora" else None)[0]
    for lora in loras_of(network):
        assert_close(peer.change(adapter, lora.lora_name).flatten(1), change_of(lora))

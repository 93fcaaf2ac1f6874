"""ComfyUI's own loader takes every tensor of our files and makes of its weights what we would; its error is pinned.

It runs on small models of its own classes and has its own tables of names, so that an error in ours would show. COMFYUI
names a checkout.
"""

import importlib
import os
import re
import sys
from operator import attrgetter
from unittest.mock import MagicMock

import pytest
import torch
import transformers  # noqa: F401  (before the stand-ins below, whose versions it would ask for)
from law_adapters import random_delta, suits_shape, tucker_delta
from safetensors.torch import load_file, save_file

from lora_engine.adapters import Adapter, DoraDelta, FullDelta
from lora_engine.formats import read_adapter, write_adapter

ROOT, CPU = os.environ.get("COMFYUI", ""), torch.device("cpu")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not ROOT, reason="COMFYUI names no checkout of ComfyUI"),
]
CLIP = {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
CLIP |= {"vocab_size": 60, "hidden_act": "quick_gelu", "max_position_embeddings": 16, "eos_token_id": 58}
T5 = {"num_layers": 2, "d_model": 32, "d_kv": 8, "num_heads": 2, "d_ff": 64, "vocab_size": 60}
TEXT = {"clip_l_model_config": CLIP, "clip_g_model_config": CLIP | {"hidden_size": 48}, "t5xxl_model_config": T5}
UNET = (
    {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "dtype": torch.float32}
    | {"num_res_blocks": [2] * 4, "channel_mult": [1, 2, 4, 4], "context_dim": 32, "adm_in_channels": None}
    | {"transformer_depth": [1] * 6 + [0] * 2, "transformer_depth_middle": 1, "use_linear_in_transformer": False}
    | {"transformer_depth_output": [1] * 9 + [0] * 3, "use_spatial_transformer": True, "legacy": False}
)
LARGE = (
    {"num_res_blocks": [2] * 3, "channel_mult": [1, 2, 4], "context_dim": 80, "adm_in_channels": 96}
    | {"transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_middle": 10, "use_linear_in_transformer": True}
    | {"transformer_depth_output": [0] * 3 + [2] * 3 + [10] * 3, "num_classes": "sequential"}
)
FLUX = (
    {"image_model": "flux", "in_channels": 4, "out_channels": 4, "vec_in_dim": 16, "context_in_dim": 32}
    | {"hidden_size": 32, "mlp_ratio": 4.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "theta": 10000}
    | {"axes_dim": [4, 6, 6], "patch_size": 2, "qkv_bias": True, "guidance_embed": True, "dtype": torch.float32}
)
SD3 = (
    {"in_channels": 16, "patch_size": 2, "depth": 2, "num_patches": 64, "pos_embed_max_size": 8, "qk_norm": "rms"}
    | {"adm_in_channels": 64, "x_block_self_attn_layers": [0], "input_size": None, "dtype": torch.float32}
    | {"context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 32, "out_features": 128}}}
)
FAMILIES = {
    "sd": ("SD15", "sd1_clip.SD1ClipModel", UNET),
    "sdxl": ("SDXL", "sdxl_clip.SDXLClipModel", UNET | LARGE),
    "flux": ("Flux", "text_encoders.flux.FluxClipModel", FLUX),
    "sd3": ("SD3", "text_encoders.sd3_clip.SD3ClipModel", SD3),
}
# The last four are for U-Nets only: elsewhere q, k and v are one layer, which cannot always be fused exactly.
KINDS = ("lora", "loha", "full", "tucker", "lokr", "dora", "norm")
CASES = [(family, kind) for family in FAMILIES for kind in KINDS[: 7 if family in ("sd", "sdxl") else 3]]
FLUX2 = r"\.linear_(in|out)\.|to_qkv_mlp_proj|single_.*\.to_out\."  # newer tables have these in addition to FLUX.1's
OTHER = ("token_embedding", "position_embedding", "shared", "relative_attention_bias", "text_projection")


@pytest.fixture(scope="module")
def comfy():
    """Yields ComfyUI's modules; stubs replace missing imports for images, sound, video and other devices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        patch.setattr(importlib.import_module("comfy.cli_args").args, "cpu", True)
        while "comfy.sd" not in sys.modules:
            try:
                importlib.import_module("comfy.sd")
            except ModuleNotFoundError as error:
                patch.setitem(sys.modules, error.name, MagicMock())
        yield sys.modules["comfy"]


class Peer:
    """ComfyUI's models of a family, and for each of our tensors its key there, its rows and its transposition."""

    def __init__(self, comfy, family):
        self.comfy, self.family, self.locations = comfy, family, {}
        model_class, text_class, sizes = FAMILIES[family]
        newer = {"txt_ids_dims"} & comfy.ldm.flux.model.FluxParams.__dataclass_fields__.keys()
        sizes = sizes | ({key: [] for key in newer} if family == "flux" else {})
        settings = getattr(comfy.supported_models, model_class)(sizes)
        models = settings.get_model({}, "", device=CPU), attrgetter(text_class)(comfy)(model_options=TEXT)
        for value in (value for model in models for value in model.parameters()):
            value.requires_grad_(False).copy_(0.2 * torch.randn(value.shape))
        self.model, text = (comfy.model_patcher.ModelPatcher(model, CPU, CPU) for model in models)
        self.clip = MagicMock(cond_stage_model=models[1], clone=text.clone)
        self.base = {**models[0].state_dict(), **models[1].state_dict()}
        for name, location in self.table(settings.unet_config):
            key, rows, turn = (location, None, None) if isinstance(location, str) else (*location, None)[:3]
            if key in self.base and not re.search(FLUX2, name):
                self.locations[name] = key, rows, turn or (lambda tensor: tensor)

    def table(self, sizes):
        utils = self.comfy.utils
        tables = {"flux": utils.flux_to_diffusers, "sd3": utils.mmdit_to_diffusers}
        for ours, key in utils.unet_to_diffusers(sizes).items():  # none without a U-Net
            yield f"unet.{ours}", f"diffusion_model.{key}"
        for ours, location in tables.get(self.family, lambda *_: {})(sizes, "diffusion_model.").items():
            yield f"transformer.{ours}", location
        texts = ["clip_l", "t5xxl"] if self.family == "flux" else ["clip_l", "clip_g", "t5xxl"]
        for key in self.base:
            text, _, path = key.partition(".transformer.")
            if text in texts:
                yield f"text_encoder_{texts.index(text) + 1}".removesuffix("_1") + f".{path}", key

    def part(self, name, tensors):
        key, rows, _ = self.locations[name]
        return tensors[key] if rows is None else tensors[key].narrow(*rows)

    def weights(self):
        names = [name for name in self.locations if name.endswith(".weight")]
        weights = {name.removesuffix(".weight"): self.locations[name][2](self.part(name, self.base)) for name in names}
        return {name: weight for name, weight in weights.items() if not name.endswith(OTHER)}

    def adapter(self, kind):
        modules = {}
        for i, (name, weight) in enumerate(self.weights().items()):
            has_bias, is_norm = f"{name}.bias" in self.locations, weight.dim() == 1
            # It reads no norms of text encoders under kohya's names.
            if is_norm == (kind == "norm") and not (is_norm and name.startswith("text")):
                modules[name] = delta_of(kind, tuple(weight.shape), has_bias, 1 + i % 4, 0.5 + i % 7)
        return Adapter({name: delta for name, delta in modules.items() if delta is not None}, self.family)

    def ours(self, adapter):
        changes, weights = {}, self.weights()
        for name, delta in adapter.modules.items():
            for tensor, change in (("weight", delta.delta_weight(weights[name])), ("bias", delta.delta_bias(None))):
                if change is not None:
                    key, _, turn = self.locations[f"{name}.{tensor}"]
                    changes.setdefault(key, torch.zeros_like(self.base[key]))
                    self.part(f"{name}.{tensor}", changes).copy_(turn(change))
        return changes

    def theirs(self, tensors):
        patched = self.comfy.sd.load_lora_for_models(self.model, self.clip, tensors, 1.0, 1.0)
        patches = {key: patch for patcher in patched for key, patch in patcher.patches.items()}
        weight = self.comfy.lora.calculate_weight
        return {key: weight(patch, self.base[key].clone(), key) - self.base[key] for key, patch in patches.items()}


def delta_of(kind, shape, has_bias, rank, alpha):
    if kind == "tucker":
        return tucker_delta(shape, rank, alpha) if shape[2:] not in ((), (1, 1)) else None
    if kind == "dora":
        magnitude = 0.5 + torch.rand(1, shape[1], *(1 for _ in shape[2:]))
        return DoraDelta(random_delta("lora", shape, rank, alpha), magnitude)
    if kind in ("full", "norm"):
        return FullDelta(torch.randn(shape), torch.randn(shape[0]) if has_bias else None)
    return random_delta(kind, shape, rank, alpha) if suits_shape(kind, shape) else None


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for key, change in expected.items():
        assert float((actual[key] - change).abs().max()) <= 1e-5 * float(change.abs().max()), key


@torch.no_grad()
@pytest.mark.parametrize("form", ["comfyui", "kohya"])
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_comfyui_computes_the_same_weights_from_our_file(comfy, family, kind, form, tmp_path, caplog):
    peer = Peer(comfy, family)
    adapter = peer.adapter(kind)
    file = write_adapter(tmp_path, adapter, format=form)[0]
    caplog.clear()
    assert_same(peer.theirs(load_file(file)), peer.ours(adapter))
    assert not caplog.messages, "it skipped a key, or failed to apply a change"


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_we_read_adapters_trained_by_comfyui(comfy, family, tmp_path):
    peer, tensors = Peer(comfy, family), {}
    for name, layer in peer.model.model.named_modules():
        if hasattr(layer, "weight_function") and layer.weight is not None and layer.weight.dim() > 1:
            trained = comfy.weight_adapter.LoRAAdapter.create_train(layer.weight, rank=2, alpha=1.0)
            for factor, value in trained.named_parameters():
                tensors[f"{name}.{factor}"] = value.detach().clone() if factor == "alpha" else torch.randn(value.shape)
    # No published transformer is so narrow: the header states the family.
    header = None if family in ("sd", "sdxl") else {"loraline.base": family}
    save_file(tensors, tmp_path / "a.safetensors", header)
    assert_same(peer.theirs(tensors), peer.ours(read_adapter(tmp_path / "a.safetensors")[0]))


def test_comfyui_divides_a_dora_of_the_outputs_by_the_norm_of_the_unchanged_weight(comfy):
    weight, change, magnitude = torch.randn(6, 5), torch.randn(6, 5), torch.rand(6, 1)
    settings = (1.0, 1.0, torch.float32, lambda tensor: tensor)
    decomposed = comfy.weight_adapter.base.weight_decompose(magnitude, weight.clone(), change.clone(), *settings)
    torch.testing.assert_close(decomposed, magnitude * (weight + change) / weight.norm(dim=1, keepdim=True))

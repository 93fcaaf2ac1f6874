"""Recognition against every transformer of the installed diffusers that loads LoRA, known or not."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from lora_engine.adapters import LoraDelta
from lora_engine.adapters.published import empty_module
from lora_engine.families import ComponentConfig
from lora_engine.formats.family import family_of

FAMILIES = {
    **dict.fromkeys(
        ("AnyFlowFARTransformer3DModel", "AnyFlowTransformer3DModel", "ChronoEditTransformer3DModel"), "wan"
    ),
    **dict.fromkeys(("HeliosTransformer3DModel", "SkyReelsV2Transformer3DModel"), "wan"),
    **dict.fromkeys(("WanAnimate2Transformer3DModel", "WanAnimateTransformer3DModel"), "wan"),
    **dict.fromkeys(("WanTransformer3DModel", "WanVACETransformer3DModel"), "wan"),
    **dict.fromkeys(("BriaFiboTransformer2DModel", "BriaTransformer2DModel"), "bria"),
    **dict.fromkeys(("HunyuanVideoFramepackTransformer3DModel", "HunyuanVideoTransformer3DModel"), "hunyuan_video"),
    **dict.fromkeys(("LTX2VideoTransformer3DModel", "SanaWMLTX2RefinerTransformer3DModel"), "ltx2"),
    "AuraFlowTransformer2DModel": "aura_flow",
    "ChromaTransformer2DModel": "chroma",
    "CosmosTransformer3DModel": "anima",
    "Flux2Transformer2DModel": "flux2",
    "Flux3Transformer2DModel": "flux3",
    "FluxTransformer2DModel": "flux",
    "HiDreamImageTransformer2DModel": "hidream",
    "HunyuanImageTransformer2DModel": "hunyuan_image",
    "HunyuanVideo15Transformer3DModel": "hunyuan_video_15",
    "Krea2Transformer2DModel": "krea2",
    "LTXVideoTransformer3DModel": "ltx_video",
    "LongCatImageTransformer2DModel": "longcat_image",
    "Lumina2Transformer2DModel": "lumina2",
    "MotifVideoTransformer3DModel": "motif_video",
    "OvisImageTransformer2DModel": "ovis_image",
    "PriorTransformer": "kandinsky2_prior",
    "QwenImage21Transformer2DModel": "qwen_image_21",
    "QwenImageTransformer2DModel": "qwen_image",
    "SD3Transformer2DModel": "sd3",
    "SanaTransformer2DModel": "sana",
    "SanaVideoTransformer3DModel": "sana_video",
    "ZImageTransformer2DModel": "z_image",
}
"""The family of each class; the classes that are not listed have none. Networks that were tuned from Wan, HunyuanVideo
or LTX-2 have their modules, and count as these."""
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "BriaFiboTransformer2DModel": {"num_layers": 8, "num_single_layers": 38},
    "BriaTransformer2DModel": {"num_layers": 8, "num_single_layers": 28},
    "ChromaTransformer2DModel": {"num_layers": 19, "num_single_layers": 38},
    "CosmosTransformer3DModel": {"num_attention_heads": 16},
    "FluxTransformer2DModel": {"num_layers": 19, "num_single_layers": 38},
    "HiDreamImageTransformer2DModel": {"patch_size": 2, "caption_channels": [4096, 4096], "llama_layers": [0, 1]},
    "HunyuanVideoFramepackTransformer3DModel": {"num_layers": 20, "num_single_layers": 40},
    "HunyuanVideoTransformer3DModel": {"num_layers": 20, "num_single_layers": 40},
    "LongCatImageTransformer2DModel": {"num_layers": 10, "num_single_layers": 20},
    "MotifVideoTransformer3DModel": {"num_layers": 12, "num_single_layers": 24, "num_attention_heads": 12},
    "PriorTransformer": {"num_layers": 20},
    "SD3Transformer2DModel": {"num_layers": 24, "num_attention_heads": 24},
    "SkyReelsV2Transformer3DModel": {"num_attention_heads": 12, "ffn_dim": 8960},
    "WanVACETransformer3DModel": {"vace_layers": [0]},
}
"""Settings of published models where the defaults of the class differ, or where the number of blocks is the proof."""
SAME = {
    "chroma": {"flux"},
    "flux": {"chroma"},
    "ltx_video": {"ltx2"},
    "ltx2": {"ltx_video"},
    "sana": {"sana_video"},
    "sana_video": {"sana"},
}
"""Families that have equal attention and feed-forward networks, which a whole file does not tell apart."""
LAYERS = re.compile(r"(^|_)(n?layers|blocks)$")
LEFT_OUT = re.compile(r"norm|mod(ulation)?\.|adaln|embed|refiner|time", re.IGNORECASE)


def _classes() -> list[type]:
    from diffusers.loaders import PeftAdapterMixin
    from diffusers.models import transformers

    return [cls for cls in vars(transformers).values() if isinstance(cls, type) and issubclass(cls, PeftAdapterMixin)]


def _adapted(cls: type) -> dict[str, LoraDelta]:
    """Returns LoRA of attention and feed-forward in every block of a class, without memory; by default of two blocks.

    A part of a file never proves more than the whole, so two blocks suffice if they already prove the family.
    """
    arguments = inspect.signature(cls.__init__).parameters.items()
    two_blocks = {name: 2 for name, argument in arguments if LAYERS.search(name) and isinstance(argument.default, int)}
    module = empty_module(ComponentConfig("diffusers", cls.__name__, two_blocks | SETTINGS.get(cls.__name__, {})))
    return {
        f"transformer.{path}": LoraDelta(
            torch.empty(1, layer.in_features, device="meta"), torch.empty(layer.out_features, 1, device="meta"), 1.0
        )
        for path, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and re.search(r"\.\d+\.", path) and not LEFT_OUT.search(path)
    }


def _wrong(cls: type) -> dict[str, tuple[str, ...]]:
    """Returns the families that a file of a class, whole or of its first two blocks, is called wrongly."""
    own, modules = FAMILIES.get(cls.__name__), _adapted(cls)
    assert len(modules) >= 10, cls
    first = {path: delta for path, delta in modules.items() if re.search(r"^[^\d]+\.[01]\.", path)}
    found = {"whole": family_of({}, modules).possible, "part": family_of({}, first).possible}
    allowed = {own, *SAME.get(own or "", ())}
    return {
        name: possible
        for name, possible in found.items()
        if (own in possible) != (own is not None) or (name == "whole" and not allowed.issuperset(possible))
    }


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # diffusers' own use of it
def test_an_adapter_of_a_transformer_is_never_called_something_else() -> None:
    classes = {cls.__name__: cls for cls in _classes()}
    assert set(FAMILIES) | set(SETTINGS) <= set(classes)
    wrong = {name: families for name, cls in classes.items() if (families := _wrong(cls))}
    assert not wrong

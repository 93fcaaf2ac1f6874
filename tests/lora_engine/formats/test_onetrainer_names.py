"""Tests reading of every layout in which OneTrainer saves LoRA (August 2026, and the earlier initiative's)."""

import pytest
import torch
from safetensors.torch import save_file

from lora_engine.errors import AdapterError
from lora_engine.formats import inspect, read_adapter

F, S = 3072, 1536
"""Widths of FLUX.1 and Stable Diffusion 3, which prove the family."""
NATIVE, PEFT = ("lora_down.weight", "lora_up.weight"), ("lora_A.weight", "lora_B.weight")
# By family: original path of a module, rows and columns, and its canonical modules.
MODULES = {
    "flux": {
        "double_blocks.0.img_attn.qkv": (3 * F, F, [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"]),
        "double_blocks.3.txt_mlp.2": (F, 4 * F, ["transformer_blocks.3.ff_context.net.2"]),
        "single_blocks.1.linear2": (F, 5 * F, ["single_transformer_blocks.1.proj_out"]),
    },
    "sd3": {
        "joint_blocks.0.x_block.attn.qkv": (3 * S, S, [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"]),
        "joint_blocks.2.context_block.mlp.fc1": (4 * S, S, ["transformer_blocks.2.ff_context.net.0.proj"]),
    },
    "sdxl": {
        "input_blocks.4.1.transformer_blocks.0.attn2.to_k": (
            *(640, 2048),
            ["down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"],
        ),
        "middle_block.1.proj_in": (1280, 1280, ["mid_block.attentions.0.proj_in"]),
        "output_blocks.3.0.in_layers.2": (640, 1920, ["up_blocks.1.resnets.0.conv1"]),
    },
}
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"
T5 = "encoder.block.0.layer.0.SelfAttention.q"
T5_COMPONENT = {"flux": "text_encoder_2", "sd3": "text_encoder_3"}


def component(family):
    return "unet" if family == "sdxl" else "transformer"


def lora(name, rows, columns, suffixes, generator):
    down, up = suffixes
    return {
        f"{name}.{down}": torch.randn(4, columns, generator=generator),
        f"{name}.{up}": torch.randn(rows, 4, generator=generator),
        f"{name}.alpha": torch.tensor(2.0),
    }


def saved(tensors, folder):
    save_file(tensors, folder / "saved.safetensors")
    return folder / "saved.safetensors"


def flat(name):
    return name.replace(".", "_")


# Prefixes of the network (None: its canonical name), of CLIP-L and of T5; flattened or not; factors.
COMFYUI = ("diffusion_model.", "text_encoders.clip_l.transformer.", "text_encoders.t5xxl.transformer.")
LAYOUTS = {
    "original": ("", None, None, False, PEFT),
    "comfyui": (*COMFYUI, False, PEFT),
    "kohya": ("lora_unet_", "lora_te1_", "lora_te3_", True, NATIVE),
    "initiative": (None, "clip_l.", "t5.", False, NATIVE),
}


@pytest.mark.parametrize("family", MODULES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_with_original_names_are_read(layout, family, tmp_path):
    prefix, clip, t5, is_flat, suffixes = LAYOUTS[layout]
    prefix = f"{component(family)}." if prefix is None else prefix
    named = {f"{prefix}{flat(path) if is_flat else path}": shape for path, (*shape, _) in MODULES[family].items()}
    expected = {f"{component(family)}.{path}" for *_, paths in MODULES[family].values() for path in paths}
    if clip is not None:
        named[f"{clip}{flat(TEXT) if is_flat else TEXT}"] = (768, 768)
        expected.add(f"text_encoder.{TEXT}")
        if family in T5_COMPONENT:
            named[f"{t5}{flat(T5) if is_flat else T5}"] = (64, 64)
            expected.add(f"{T5_COMPONENT[family]}.{T5}")
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (rows, columns) in named.items():
        tensors |= lora(name, rows, columns, suffixes, draw)
    adapter, _ = read_adapter(saved(tensors, tmp_path))
    assert set(adapter.modules) == expected
    assert {delta.alpha for delta in adapter.modules.values()} == {2.0}


@pytest.mark.parametrize("family", ["flux", "sd3", "sdxl"])
@pytest.mark.parametrize("is_flat", [False, True], ids=["inside", "legacy"])
def test_layouts_with_diffusers_names_are_read(is_flat, family, tmp_path):
    own = component(family)
    shapes = {
        f"{own}.{path}": (rows // len(paths), columns)
        for rows, columns, paths in MODULES[family].values()
        for path in paths
    }
    shapes |= {f"text_encoder.{TEXT}": (8, 8)} | ({f"{T5_COMPONENT[family]}.{T5}": (8, 8)} if family != "sdxl" else {})
    draw, tensors = torch.Generator().manual_seed(0), {}
    for name, (rows, columns) in shapes.items():
        first, _, path = name.partition(".")
        te = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_", "text_encoder_3": "lora_te3_"}
        written = te.get(first, f"lora_{own}_") + flat(path) if is_flat else name
        tensors |= lora(written, rows, columns, NATIVE, draw)
    vectors = {"clip_l": 768, **({"t5": 64} if family in T5_COMPONENT else {"clip_g": 1280})}
    tokens = {f"bundle_emb.zorb.{part}": torch.randn(2, width, generator=draw) for part, width in vectors.items()}
    path = saved(tensors | tokens, tmp_path)
    assert set(read_adapter(path)[0].modules) == set(shapes)
    assert [embedding["token"] for embedding in inspect(path)["embeddings"]] == ["zorb"]


@pytest.mark.parametrize(
    ("prefix", "fused", "width", "names"),
    [
        ("double_blocks.0", "txt_attn.qkv", F, [f"transformer_blocks.0.attn.add_{part}_proj" for part in "qkv"]),
        (
            *("single_blocks.5", "linear1", F),
            [f"single_transformer_blocks.5.{part}" for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")],
        ),
        ("joint_blocks.1", "x_block.attn2.qkv", S, [f"transformer_blocks.1.attn2.to_{part}" for part in "qkv"]),
    ],
)
def test_the_parts_of_a_fused_layer_are_numbered(prefix, fused, width, names, tmp_path):
    draw, tensors = torch.Generator().manual_seed(0), {}
    rows = [4 * width if name.endswith("proj_mlp") else width for name in names]
    for number, count in enumerate(rows):
        tensors |= lora(f"transformer.{prefix}.{fused}.{number}", count, width, NATIVE, draw)
    adapter, _ = read_adapter(saved(tensors, tmp_path))
    assert set(adapter.modules) == {f"transformer.{name}" for name in names}
    for number, (name, count) in enumerate(zip(names, rows, strict=True)):
        raw = f"transformer.{prefix}.{fused}.{number}"
        change = tensors[f"{raw}.lora_up.weight"] @ tensors[f"{raw}.lora_down.weight"] / 2
        delta = adapter.modules[f"transformer.{name}"].delta_weight(torch.zeros(count, width))
        torch.testing.assert_close(delta, change)


def test_an_unknown_part_of_a_layer_is_refused(tmp_path):
    draw = torch.Generator().manual_seed(0)
    known = lora("transformer.double_blocks.0.img_attn.qkv.0", F, F, NATIVE, draw)
    stray = lora("transformer.double_blocks.0.img_attn.qkv.3", F, F, NATIVE, draw)
    with pytest.raises(AdapterError, match=r"qkv\.3"):
        read_adapter(saved(known | stray, tmp_path))


@pytest.mark.parametrize(
    ("name", "rows", "columns"),
    [
        ("double_blocks.0.img_attn.proj", F, F),
        ("diffusion_model.single_blocks.0.linear2", F, 5 * F),
        ("transformer.proj_out", 64, F),
    ],
)
@pytest.mark.parametrize("axis", [1, 0])
def test_magnitudes_with_pefts_factors_have_the_axis_of_their_shape(name, rows, columns, axis, tmp_path):
    shape = (1, columns) if axis else (rows, 1)
    tensors = lora(name, rows, columns, PEFT, torch.Generator().manual_seed(0))
    tensors[f"{name}.dora_scale"] = torch.ones(shape)
    (delta,) = read_adapter(saved(tensors, tmp_path))[0].modules.values()
    assert (delta.kind, delta.axis, delta.inner.alpha) == ("dora", axis, 2.0)

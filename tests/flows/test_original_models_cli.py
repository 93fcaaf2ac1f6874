"""Transformers in their original names: every verb on models does to them what it does to diffusers' names.

The models are tiny and random, one for each supported family with a table of original names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, ZImageTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_engine.adapters import Adapter, Delta, FullDelta, LoraDelta
from lora_engine.families import families
from lora_engine.formats import read_adapter, write_adapter
from lora_engine.streaming import open_model
from tests.flows.commands import loraline_here, say

FAMILIES = [name for name, family in families.items() if family.is_supported and family.names is not None]
PREFIX = "model.diffusion_model."
_HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8}
_JOINT: dict[str, Any] = {"joint_attention_dim": 32, "pooled_projection_dim": 16}
# Two double blocks: the last of an SD3 has fewer tensors.
CLASSES: dict[str, tuple[Any, dict[str, Any]]] = {
    "flux": (
        FluxTransformer2DModel,
        {
            **_HEADS,
            **_JOINT,
            "in_channels": 16,
            "num_layers": 2,
            "num_single_layers": 2,
            "guidance_embeds": True,
            "axes_dims_rope": (2, 2, 4),
        },
    ),
    "sd3": (
        SD3Transformer2DModel,
        {
            **_HEADS,
            **_JOINT,
            "sample_size": 8,
            "num_layers": 2,
            "caption_projection_dim": 16,
            "pos_embed_max_size": 16,
            "qk_norm": "rms_norm",
            "dual_attention_layers": (0,),
        },
    ),
    "z_image": (
        ZImageTransformer2DModel,
        {
            "dim": 24,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 16,
            "axes_dims": (4, 4, 4),
            "axes_lens": (16, 16, 16),
        },
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A transformer of each family with diffusers' names, in float32, and the original names of its weights."""
    made = {}
    for name, (cls, settings) in CLASSES.items():
        folder = tmp_path_factory.mktemp(name) / "transformer"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = cls(**settings)
            for parameter in network.parameters():
                torch.nn.init.normal_(parameter, std=0.05)
        network.save_pretrained(folder)
        say("convert", folder, "--to", "original", "-o", folder.parent / "original.safetensors", home=folder.parent)
        made[name] = folder
    return made


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def write_change(folder: Path, path: Path, *, size: float = 0.1) -> Path:
    """Writes an adapter that changes every linear layer, some of them also in the bias."""
    draw = torch.Generator().manual_seed(1)
    modules: dict[str, Any] = {}
    for key, weight in weights(folder).items():
        module, _, leaf = key.rpartition(".")
        if leaf == "weight" and weight.dim() == 2:
            up, down = (size * torch.randn(n, 2, generator=draw) for n in weight.shape)
            modules[f"transformer.{module}"] = LoraDelta(down.T.contiguous(), up, 2.0)
    for name in [name for name in modules if name.endswith(("norm_out.linear", "to_q"))]:
        shape = weights(folder)[f"{name.removeprefix('transformer.')}.weight"].shape
        bias = torch.ones(shape[0]) if f"{name.removeprefix('transformer.')}.bias" in weights(folder) else None
        modules[name] = FullDelta(size * torch.randn(shape, generator=draw), bias)
    write_adapter(path, Adapter(modules))
    return path


def changes_of(adapter: Path, folder: Path) -> Mapping[str, Delta]:
    return read_adapter(adapter, open_model(folder).module_shapes)[0].modules


def prefixed(source: Path, path: Path) -> Path:
    save_file({PREFIX + name: tensor for name, tensor in load_file(source).items()}, path)
    return path


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor], **tolerance: float) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], **tolerance, msg=name)


def test_every_family_with_original_names_has_a_model() -> None:
    assert set(FAMILIES) == set(CLASSES)


@pytest.mark.parametrize("name", CLASSES)
def test_a_model_is_converted_to_diffusers_and_back(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    original = folders[name].parent / "original.safetensors"
    for source in [original, prefixed(original, tmp_path / "prefixed.safetensors")][: 2 if name == "flux" else 1]:
        out = tmp_path / source.stem
        say("convert", source, "--to", "diffusers", "-o", out, "--config", folders[name], home=tmp_path)
        assert_equal(weights(out), weights(folders[name]), rtol=0, atol=0)
        CLASSES[name][0].from_pretrained(out)
    refused = loraline_here("convert", original, "--to", "diffusers", "-o", tmp_path / "no", home=tmp_path)
    assert "--config" in refused.stderr or "as config" in refused.stderr
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(("name", "prefix"), [*((name, "") for name in CLASSES), ("flux", PREFIX)])
def test_fusing_commutes_with_converting(name: str, prefix: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder, original = folders[name], folders[name].parent / "original.safetensors"
    source = prefixed(original, tmp_path / "model.safetensors") if prefix else original
    adapter = write_change(folder, tmp_path / "adapter.safetensors")
    out, back = tmp_path / "out.safetensors", tmp_path / "back.safetensors"
    report = json.loads(say("fuse", source, adapter, "-o", out, "--json", home=tmp_path))
    assert report["modules"] == len(changes_of(adapter, folder))
    say("fuse", folder, adapter, "-o", tmp_path / "folder", home=tmp_path)
    say("convert", tmp_path / "folder", "--to", "original", "-o", tmp_path / "expected.safetensors", home=tmp_path)
    expected = {prefix + key: value for key, value in load_file(tmp_path / "expected.safetensors").items()}
    assert_equal(load_file(out), expected, rtol=1e-6, atol=1e-7)
    assert any(not torch.equal(value, load_file(out)[key]) for key, value in load_file(source).items())

    say("fuse", out, adapter, "--take-out", "--original", source, "-o", back, home=tmp_path)
    assert_equal(load_file(back), load_file(source), rtol=1e-5, atol=1e-6)


def test_scaled_weights_in_original_names_are_fused_by_their_values(folders: dict[str, Path], tmp_path: Path) -> None:
    original = load_file(folders["flux"].parent / "original.safetensors")
    stored, plain = {}, {}
    for name, weight in original.items():
        factor = weight.abs().max() / 448.0
        is_linear = weight.dim() == 2 and "blocks" in name
        stored[PREFIX + name] = (weight / factor).to(torch.float8_e4m3fn) if is_linear else weight
        plain[PREFIX + name] = stored[PREFIX + name].float() * factor if is_linear else weight
        if is_linear:
            stored[PREFIX + name.removesuffix("weight") + "scale_weight"] = factor
    save_file(stored, tmp_path / "scaled.safetensors")
    save_file(plain, tmp_path / "plain.safetensors")
    adapter = write_change(folders["flux"], tmp_path / "adapter.safetensors")
    for name in ("scaled", "plain"):
        say(
            "fuse", tmp_path / f"{name}.safetensors", adapter, "-o", tmp_path / f"{name}-out.safetensors", home=tmp_path
        )
        source, out = tmp_path / f"{name}-out.safetensors", tmp_path / f"{name}-diffusers.safetensors"
        say("convert", source, "--to", "diffusers", "-o", out, home=tmp_path)
    fused, expected = (load_file(tmp_path / f"{name}-diffusers.safetensors") for name in ("scaled", "plain"))
    assert fused.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(fused[name].float(), value, rtol=2**-3, atol=2e-3 * float(value.abs().max()))
    merged = tmp_path / "merged.safetensors"
    say("merge", tmp_path / "plain.safetensors", tmp_path / "scaled.safetensors", "-o", merged, home=tmp_path)
    assert_equal(load_file(merged), plain, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", CLASSES)
def test_an_adapter_is_extracted_from_original_names(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder, original = folders[name], folders[name].parent / "original.safetensors"
    adapter = write_change(folder, tmp_path / "adapter.safetensors")
    tuned, out = tmp_path / "tuned.safetensors", tmp_path / "out.safetensors"
    say("fuse", original, adapter, "-o", tuned, home=tmp_path)
    for base in (original, folder) if name == "flux" else (folder,):
        say("extract", tuned, "--base", base, "--energy", 1.0, "-o", out, home=tmp_path)
        changes, extracted = (changes_of(path, folder) for path in (adapter, out))
        assert changes.keys() == extracted.keys()
        for module, delta in changes.items():
            weight = weights(folder)[f"{module.removeprefix('transformer.')}.weight"]
            torch.testing.assert_close(
                extracted[module].delta_weight(weight), delta.delta_weight(weight), rtol=1e-3, atol=1e-5
            )


@pytest.mark.parametrize("name", CLASSES)
def test_inspect_names_the_family_of_original_names(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    original = folders[name].parent / "original.safetensors"
    for source in (original, prefixed(original, tmp_path / "model.safetensors")):
        facts = json.loads(say("inspect", source, "--json", home=tmp_path))
        assert (facts["layout"], facts["architecture"], facts["unknown"]) == ("original", name, [])
        assert facts["components"]["transformer"]["tensors"] == len(load_file(original))
        say("validate", source, home=tmp_path)
    facts = json.loads(say("inspect", folders[name], "--json", home=tmp_path))
    assert (facts["layout"], facts["architecture"]) == ("diffusers", name)


def test_the_text_encoders_of_a_file_with_all_components_are_fused(folders: dict[str, Path], tmp_path: Path) -> None:
    layers = {
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj": (
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
        ),
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q": (
            "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q"
        ),
    }
    model = prefixed(folders["flux"].parent / "original.safetensors", tmp_path / "model.safetensors")
    others = {f"{name}.weight": torch.zeros(8, 8) for name in layers} | {"vae.decoder.conv_in.weight": torch.ones(4, 4)}
    save_file(load_file(model) | others, model)
    deltas = {name: LoraDelta(torch.ones(1, 8), torch.ones(8, 1), 1.0) for name in layers.values()}
    write_adapter(tmp_path / "adapter.safetensors", Adapter(deltas, "flux"))
    out = tmp_path / "out.safetensors"
    say("fuse", model, tmp_path / "adapter.safetensors", "-o", out, home=tmp_path)
    fused = load_file(out)
    assert all(torch.equal(fused[f"{name}.weight"], torch.ones(8, 8)) for name in layers)
    facts = json.loads(say("inspect", model, "--json", home=tmp_path))
    assert facts["components"].keys() == {"transformer", "text_encoder", "text_encoder_2", "vae"}
    refused = loraline_here("convert", model, "--to", "diffusers", "-o", tmp_path / "no", home=tmp_path)
    assert "the tensors do not fit the settings" in refused.stderr  # its sizes are those of no published model
    refused = loraline_here(
        "convert",
        model,
        "--to",
        "diffusers",
        "-o",
        tmp_path / "no.safetensors",
        "--config",
        folders["flux"],
        home=tmp_path,
    )
    assert "3 tensors do not belong to the transformer of FLUX.1" in refused.stderr


def test_a_transformer_alone_is_no_base(folders: dict[str, Path], tmp_path: Path) -> None:
    original = folders["flux"].parent / "original.safetensors"
    completed = loraline_here("generate", "a ring", "-o", tmp_path / "out", "--base", original, home=tmp_path)
    assert completed.returncode == 1
    assert "without text encoders and autoencoder" in completed.stderr + completed.stdout


def test_models_with_original_names_are_merged(folders: dict[str, Path], tmp_path: Path) -> None:
    original, out = folders["flux"].parent / "original.safetensors", tmp_path / "out.safetensors"
    say("merge", original, prefixed_free_copy(original, tmp_path / "twice.safetensors"), "-o", out, home=tmp_path)
    assert_equal(load_file(out), {name: 1.5 * tensor for name, tensor in load_file(original).items()})


def prefixed_free_copy(source: Path, path: Path) -> Path:
    save_file({name: 2 * tensor for name, tensor in load_file(source).items()}, path)
    return path

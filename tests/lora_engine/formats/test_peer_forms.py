"""Forms of adapters that ComfyUI, A1111 and sd-scripts read: each makes the same change as there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from law_adapters import random_delta
from lycoris.utils import extract_diff
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_engine.adapters import Adapter, Delta, LoraDelta, OftDelta, kinds
from lora_engine.adapters.rotation import cayley
from lora_engine.errors import AdapterError
from lora_engine.formats import codecs, inspect, read_bundle, write_adapter

Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
IMG_IN = "diffusion_model.img_in"


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _read(tensors: Mapping[str, Tensor], folder: Path, metadata: Mapping[str, str] | None = None) -> Delta:
    save_file(dict(tensors), folder / "a.safetensors", metadata and dict(metadata))
    (delta,) = read_bundle(folder / "a.safetensors").adapter.modules.values()
    return delta


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "glora"])
@pytest.mark.parametrize("alpha", [0.0, -1.5])
def test_an_alpha_of_0_switches_a_module_off_and_a_negative_one_inverts_it(
    kind: str, alpha: float, tmp_path: Path
) -> None:
    delta = random_delta(kind, (6, 8), 1)
    adapter = Adapter({Q: type(delta).from_factors(delta.factors(), alpha)}, "sd")
    for form in (name for name, codec in codecs.items() if kind in codec.key_layout.factor_keys):
        write_adapter(tmp_path / form, adapter, format=form, module_names={Q: (6, 8)})
        bundle = read_bundle(tmp_path / form, {Q: (6, 8)})
        weight, opposite = _random(6, 8), type(delta).from_factors(delta.factors(), -alpha)
        change = bundle.adapter.modules[Q].delta_weight(weight)
        torch.testing.assert_close(change, -opposite.delta_weight(weight), rtol=1e-4, atol=1e-5)
        is_said = "alpha is 0 in 1 of 1 modules" in bundle.assumptions
        assert is_said == (alpha == 0 and bundle.adapter.modules[Q].alpha == 0)
        if form == "loraline":
            assert is_said == (alpha == 0)


def test_a_bias_survives_a_scale_of_0_in_pefts_folders(tmp_path: Path) -> None:
    delta = LoraDelta(torch.ones(2, 8), torch.ones(6, 2), 0.0, bias=torch.arange(6.0))
    write_adapter(tmp_path, Adapter({Q: delta}, "sd"), format="peft")
    back = read_bundle(tmp_path).adapter.modules[Q]
    assert not back.delta_weight(torch.zeros(6, 8)).any()
    assert torch.equal(back.delta_bias(None), torch.arange(6.0))


@pytest.mark.parametrize("key", ["lora_alpha", "network_alpha", "alpha"])
@pytest.mark.parametrize("prefix", [Q, "lora_unet_" + Q.removeprefix("unet.").replace(".", "_")])
def test_an_alpha_in_the_header_scales_the_modules_and_is_said(key: str, prefix: str, tmp_path: Path) -> None:
    tensors = {f"{prefix}.lora_A.weight": torch.ones(2, 8), f"{prefix}.lora_B.weight": torch.ones(6, 2)}
    save_file(tensors, tmp_path / "a.safetensors", {key: "8", "rank": "2"})
    bundle = read_bundle(tmp_path / "a.safetensors", [Q])
    assert [delta.scale for delta in bundle.adapter.modules.values()] == [4.0]
    assert f"alpha 8, from the header ({key!r})" in bundle.assumptions
    assert bundle.assumptions == inspect(tmp_path / "a.safetensors")["assumed"]
    for form in ("diffusers", "kohya", "loraline"):
        write_adapter(tmp_path / form, bundle.adapter, format=form, card=bundle.card)
        back = read_bundle(tmp_path / form)
        assert torch.equal(back.adapter.modules[Q].delta_weight(torch.zeros(6, 8)), torch.full((6, 8), 8.0)), form
        assert not back.assumptions


@pytest.mark.parametrize("header", [{"lora_alpha": "x"}, {"alpha": "inf"}, {"alpha": "1", "network_alpha": "2"}])
def test_an_alpha_in_the_header_that_is_no_single_number_is_refused(header: dict[str, str], tmp_path: Path) -> None:
    tensors = {f"{Q}.lora_A.weight": torch.ones(2, 8), f"{Q}.lora_B.weight": torch.ones(6, 2)}
    with pytest.raises(AdapterError, match=r"metadata '(lora_)?alpha'|metadata 'network_alpha'"):
        _read(tensors, tmp_path, header)


def test_tensors_of_alpha_win_over_the_header(tmp_path: Path) -> None:
    tensors = {f"{Q}.lora_A.weight": torch.ones(2, 8), f"{Q}.lora_B.weight": torch.ones(6, 2)}
    assert _read({**tensors, f"{Q}.alpha": torch.tensor(1.0)}, tmp_path, {"alpha": "8"}).alpha == 1.0
    other = Q.replace("to_q", "to_k")
    mixed = {key.replace(Q, other): tensor.clone() for key, tensor in tensors.items()} | {
        f"{other}.alpha": torch.tensor(1.0)
    }
    save_file(tensors | mixed, tmp_path / "mixed.safetensors", {"alpha": "8"})
    bundle = read_bundle(tmp_path / "mixed.safetensors")
    assert {name: delta.alpha for name, delta in bundle.adapter.modules.items()} == {Q: 2.0, other: 1.0}
    assert not bundle.assumptions


def _widened(columns: int, stated: list[int]) -> dict[str, Tensor]:
    lora = {f"{IMG_IN}.lora_down.weight": torch.ones(2, columns), f"{IMG_IN}.lora_up.weight": torch.ones(3072, 2)}
    return {**lora, f"{IMG_IN}.reshape_weight": torch.tensor(stated)}


@pytest.mark.parametrize(("columns", "is_written"), [(64, False), (128, True)])
def test_the_width_that_comfyui_pads_to_is_read_and_written_for_control_adapters(
    columns: int, is_written: bool, tmp_path: Path
) -> None:
    save_file(_widened(columns, [3072, columns]), tmp_path / "a.safetensors", {"modelspec.architecture": "flux-1-dev"})
    bundle = read_bundle(tmp_path / "a.safetensors")
    assert list(bundle.adapter.modules) == ["transformer.x_embedder"]
    tensors, _ = codecs["comfyui"].encode(bundle.adapter)
    stated = tensors.get(f"{IMG_IN}.reshape_weight")
    assert (stated is not None) == is_written
    assert stated is None or stated.tolist() == [3072, columns]
    write_adapter(tmp_path / "b.safetensors", bundle.adapter, format="comfyui")
    assert read_bundle(tmp_path / "b.safetensors").adapter == bundle.adapter
    with pytest.raises(AdapterError, match="for the base's weight"):
        read_bundle(tmp_path / "a.safetensors", {"transformer.x_embedder": (3072, 32)})


@pytest.mark.parametrize("stated", [[3072, 64], [1536, 256], [3072, 128, 2]])
def test_a_width_that_is_not_that_of_the_difference_is_refused(stated: list[int], tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="'reshape_weight' is"):
        _read(_widened(128, stated), tmp_path)


@pytest.mark.parametrize("suffixes", [("lora_A", "lora_B"), ("lora_A.weight", "lora_B.weight")])
def test_factors_without_the_word_weight_are_read(suffixes: tuple[str, str], tmp_path: Path) -> None:
    down, up = (f"{Q}.{suffix}" for suffix in suffixes)
    assert _read({down: torch.ones(2, 8), up: torch.ones(6, 2)}, tmp_path).rank == 2


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
@pytest.mark.parametrize("has_alpha", [False, True])
def test_a_scale_replaces_alpha_as_in_a1111_and_is_said(kind: str, has_alpha: bool, tmp_path: Path) -> None:
    delta = random_delta(kind, (6, 8), 1)
    tensors, _ = codecs["kohya"].encode(Adapter({Q: delta}, "sd"))
    module = next(iter(tensors)).partition(".")[0]
    stored = {name: tensor for name, tensor in tensors.items() if has_alpha or not name.endswith(".alpha")}
    save_file(stored | {f"{module}.scale": torch.tensor(0.25)}, tmp_path / "a.safetensors")
    bundle = read_bundle(tmp_path / "a.safetensors", {Q: (6, 8)})
    assert delta.rank is not None
    expected = type(delta).from_factors(delta.factors(), 0.25 * delta.rank)
    weight = _random(6, 8)
    torch.testing.assert_close(bundle.adapter.modules[Q].delta_weight(weight), expected.delta_weight(weight))
    assert "'scale' of 1 modules" in bundle.assumptions
    assert "'scale' of 1 modules" in inspect(tmp_path / "a.safetensors")["assumed"]


def test_a_scale_of_a_kind_without_rank_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no factor of a kind"):
        _read({"lora_unet_a.diff": _random(6, 8), "lora_unet_a.scale": torch.tensor(0.5)}, tmp_path)


@pytest.mark.parametrize("inputs", [5, 6])
def test_both_orders_of_glora_are_read(inputs: int, tmp_path: Path) -> None:
    """The newer is `W a1 a2 + b1 b2` (LyCORIS 2, ComfyUI), the older `W a2 a1 + b2 b1` (A1111, ComfyUI)."""
    delta, weight = random_delta("glora", (6, inputs), 2, 3.0), _random(6, inputs, seed=1)
    new = codecs["kohya"].encode(Adapter({Q: delta}, "sd"))[0]
    swap = {"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1"}
    old = {}
    for key, tensor in new.items():
        module, _, suffix = key.partition(".")
        name = suffix.partition(".")[0]
        old[f"{module}.{swap[name]}.weight" if name in swap else key] = tensor
    a1, a2, b1, b2 = (next(t for key, t in new.items() if f".{name}." in key) for name in swap)
    expected = (weight @ a1 @ a2 + b1 @ b2) * 1.5
    for tensors in (new, old):
        torch.testing.assert_close(_read(tensors, tmp_path).delta_weight(weight), expected, rtol=1e-5, atol=1e-5)


def test_rotations_of_the_first_oft_of_lycoris_are_read(tmp_path: Path) -> None:
    delta = OftDelta(0.2 * _random(3, 2, 2))
    skew = delta.blocks - delta.blocks.mT
    rotations = {f"{Q}.oft_diag": (cayley(skew) + torch.eye(2)).contiguous(), f"{Q}.alpha": torch.tensor(1e-4)}
    weight = _random(6, 8, seed=1)
    torch.testing.assert_close(_read(rotations, tmp_path).delta_weight(weight), delta.delta_weight(weight))
    with pytest.raises(AdapterError, match=r"'oft_diag' of shape \[3, 2, 2\] holds no rotations"):
        _read({f"{Q}.oft_diag": torch.ones(3, 2, 2)}, tmp_path)


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        (Q, Q),
        ("text_encoder.encoder.layers.0.mlp.fc1", "text_encoder.text_model.encoder.layers.0.mlp.fc1"),
        ("transformer.single_transformer_blocks.0.attn.to_q", "transformer.single_transformer_blocks.0.attn.to_q"),
    ],
)
@pytest.mark.parametrize("has_config", [False, True])
def test_a_peft_file_may_have_the_component_in_its_names(
    name: str, canonical: str, has_config: bool, tmp_path: Path
) -> None:
    module = f"base_model.model.{name}"
    tensors = {f"{module}.lora_A.weight": torch.ones(2, 8), f"{module}.lora_B.weight": torch.ones(6, 2)}
    save_file(tensors, tmp_path / "adapter_model.safetensors" if has_config else tmp_path / "a.safetensors")
    if has_config:
        config = {"peft_type": "LORA", "lora_alpha": 1, "r": 2, "alpha_pattern": {name.rpartition(".")[2]: 4}}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    bundle = read_bundle(tmp_path, [canonical])
    (delta,) = bundle.adapter.modules.values()
    assert list(bundle.adapter.modules) == [canonical]
    assert delta.scale == (2.0 if has_config else 1.0)


MOTION = "unet.down_blocks.0.motion_modules.0.transformer_blocks.0"


@pytest.mark.parametrize(
    ("raw", "canonical"),
    [
        (f"{MOTION}.attn1.to_q.lora_A.weight", f"{MOTION}.attn1.to_q"),
        (f"{MOTION}.attn2.processor.to_v_lora.down.weight", f"{MOTION}.attn2.to_v"),
        (
            "down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.1.processor"
            ".to_out_lora.down.weight",
            f"{MOTION}.attn2.to_out.0",
        ),
    ],
)
def test_motion_modules_of_animatediff_are_named_and_written_only_for_programs_that_load_them(
    raw: str, canonical: str, tmp_path: Path
) -> None:
    up = raw.replace("lora_A", "lora_B").replace("down.weight", "up.weight")
    save_file({raw: torch.ones(2, 8), up: torch.ones(8, 2)}, tmp_path / "a.safetensors")
    bundle = read_bundle(tmp_path / "a.safetensors")
    assert list(bundle.adapter.modules) == [canonical]
    assert "AnimateDiff" in bundle.assumptions
    assert "AnimateDiff" in inspect(tmp_path / "a.safetensors")["note"]
    for form in ("diffusers", "peft", "loraline"):
        write_adapter(tmp_path / form, bundle.adapter, format=form)
        assert read_bundle(tmp_path / form).adapter.modules.keys() == {canonical}
    for form in ("kohya", "comfyui", "lycoris", "onetrainer", "aitoolkit"):
        with pytest.raises(AdapterError, match=rf"programs of the format '{form}' do not load AnimateDiff"):
            write_adapter(tmp_path / form, bundle.adapter, format=form)


@pytest.mark.parametrize(
    ("suffixes", "kind"),
    [
        (("q_layer.weight", "p_layer.weight", "lambda_layer"), "of LyCORIS' T-LoRA"),
        (("lora_A", "lora_B", "lora_E"), "of PEFT's AdaLoRA"),
        (("vera_lambda_b", "vera_lambda_d"), "of PEFT's VeRA"),
        (("lora_down.weight", "lora_up.weight", "weight_scale"), "of a quantized model"),
    ],
)
@pytest.mark.parametrize("prefix", ["lora_unet_down_blocks_0_attentions_0_proj_in", "base_model.model.mid_block.x"])
def test_a_tensor_of_an_unsupported_kind_is_refused_by_the_name_of_the_kind_first(
    suffixes: tuple[str, ...], kind: str, prefix: str, tmp_path: Path
) -> None:
    save_file({f"{prefix}.{suffix}": torch.ones(2, 2) for suffix in suffixes}, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match=kind) as caught:
        read_bundle(tmp_path / "a.safetensors")
    assert len(str(caught.value)) < 500


class _Blocks(nn.Module):
    """Two layers with the names of a U-Net's."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        block = nn.ModuleDict(
            {"conv1": nn.Conv2d(6, 12, 3), "conv2": nn.Conv2d(12, 6, 1), "time_emb_proj": nn.Linear(10, 8)}
        )
        self.down_blocks = nn.ModuleList([nn.ModuleDict({"resnets": nn.ModuleList([block])})])


@pytest.mark.parametrize("tucker", [False, True])
def test_an_extraction_of_lycoris_with_a_sparse_remainder_is_read_as_the_whole_difference(
    tucker: bool, tmp_path: Path
) -> None:
    base, tuned = _Blocks(0), _Blocks(1)
    tensors = extract_diff([], [], base, tuned, "fixed", 2, 2, use_bias=True, sparsity=0.9, small_conv=tucker)
    assert sum(key.endswith(".bias_indices") for key in tensors) == 3
    # The remainder is scaled by alpha / rank, too.
    tensors = {key: tensor / 2 if key.endswith("alpha") else tensor for key, tensor in tensors.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = read_bundle(tmp_path / "a.safetensors").adapter
    for name, delta in adapter.modules.items():
        assert delta.kind == "full"
        start = f"lora_unet_{name.removeprefix('unet.').replace('.', '_')}"
        weight = base.get_submodule(name.removeprefix("unet.")).weight
        stored = {key.removeprefix(f"{start}."): tensor for key, tensor in tensors.items() if key.startswith(start)}
        lora = LoraDelta(
            *(stored[f"lora_{part}.weight"] for part in ("down", "up")),
            float(stored["alpha"]),
            mid=stored.get("lora_mid.weight"),
        )
        sparse = torch.sparse_coo_tensor(
            stored["bias_indices"].long(),
            stored["bias_values"].float(),
            stored["bias_size"].tolist(),
            check_invariants=True,
        )
        expected = lora.delta_weight(weight) + 0.5 * sparse.to_dense().reshape(weight.shape)
        torch.testing.assert_close(delta.delta_weight(weight), expected, rtol=1e-6, atol=1e-7)
        assert (delta.delta_weight(weight) - lora.delta_weight(weight)).abs().max() > 0.01
    assert len(inspect(tmp_path / "a.safetensors")["modules"]) == 3


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"bias_indices": torch.tensor([[0, 6], [0, 1]], dtype=torch.int16)},
            "an index of 'bias_indices' is outside",
        ),
        (
            {"bias_indices": torch.tensor([[0, -1], [0, 1]], dtype=torch.int16)},
            "an index of 'bias_indices' is outside",
        ),
        ({"bias_indices": torch.zeros(2, 3, dtype=torch.int16)}, r"'bias_indices' \[2, 3\] and 'bias_values' \[2\]"),
        ({"bias_size": torch.tensor([8, 6], dtype=torch.int16)}, r"of a matrix \[8, 6\]"),
        ({"bias_values": torch.tensor([1.0, torch.nan])}, "1 of 2 values are NaN"),
        ({"lora_up.weight": torch.ones(6, 3)}, "lora_"),
        (
            {"lora_down.weight": torch.ones(1, 30_000), "lora_up.weight": torch.ones(30_000, 1)},
            "more than 1000 times the values",
        ),
    ],
)
def test_a_damaged_sparse_remainder_is_refused(changes: Mapping[str, Tensor], reason: str, tmp_path: Path) -> None:
    tensors = {
        "lora_down.weight": torch.ones(2, 8),
        "lora_up.weight": torch.ones(6, 2),
        "bias_indices": torch.tensor([[0, 5], [0, 7]], dtype=torch.int16),
        "bias_values": torch.ones(2),
        "bias_size": torch.tensor([6, 8], dtype=torch.int16),
    }
    name = "lora_unet_down_blocks_0_attentions_0_proj_in"
    expected = torch.full((6, 8), 2.0)
    expected[0, 0] = expected[5, 7] = 3.0
    whole = _read({f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}, tmp_path)
    assert torch.equal(whole.delta_weight(torch.zeros(6, 8)), expected)
    with pytest.raises(AdapterError, match=reason):
        _read({f"{name}.{suffix}": tensor for suffix, tensor in {**tensors, **changes}.items()}, tmp_path)


def test_a_misspelled_factor_is_refused_with_the_nearest_ones(tmp_path: Path) -> None:
    tensors = {f"lora_unet_x.{suffix}": torch.ones(2, 2) for suffix in ("lora_down.weight", "lora_upp.weight")}
    with pytest.raises(AdapterError, match=r"no factor of a kind .* end in lora_up\.weight or"):
        _read(tensors, tmp_path)


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("lllite_unet_input_blocks_1_1.down.0.weight", "a ControlNet-LLLite"),
        ("control_model.input_blocks.0.0.weight", "a ControlNet,"),
        ("image_proj.norm.weight", "an IP-Adapter"),
    ],
)
def test_files_of_other_networks_are_refused_by_what_they_are(key: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=f"the file is {reason}"):
        _read({key: torch.ones(2, 2)}, tmp_path)


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "glora", "full", "replacement"])
def test_comfyuis_format_holds_every_kind_that_it_applies_as_we_do(kind: str) -> None:
    assert kind in codecs["comfyui"].key_layout.factor_keys
    assert kind in kinds

"""Tests fused layers: split inverts fuse for every kind with an exact rule; inexact cases are refused."""

from dataclasses import replace

import pytest
import torch
from law_adapters import random_delta
from safetensors.torch import load_file, save_file

from lora_engine.adapters import (
    Adapter,
    DoraDelta,
    FullDelta,
    Ia3Delta,
    LokrDelta,
    LoraDelta,
    PeftIa3Delta,
    same_delta,
)
from lora_engine.errors import AdapterError, SettingsError
from lora_engine.formats import codecs, read_bundle, write_adapter
from lora_engine.formats.transformers.fused import fuse_layers, row_rules, split, swap_halves
from lora_engine.formats.transformers.fused_lokr import with_exact_rows
from lora_engine.merging.approximate import approximate

PARTS = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
ROWS, COLUMNS = [8, 8, 8, 32], 8
KINDS = [kind for kind in row_rules if kind not in ("lokr-rows", "oft-parts")]  # these are parts or a fused layer alone


def weight_of(rows=None, seed=5):
    return torch.randn(rows or sum(ROWS), COLUMNS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(parts, weight):
    """Returns the change of the whole weight from the deltas of its parts."""
    bases = weight.split(ROWS)
    return torch.cat(
        [torch.zeros_like(b) if p is None else p.delta_weight(b) for p, b in zip(parts, bases, strict=True)]
    )


def part_of(kind, rows, seed):
    return random_delta(kind, (rows, COLUMNS), 2, 0.0 if kind == "oft" else 3.0, seed)


def parts_of(kind):
    parts = [part_of(kind, rows, seed) for seed, rows in enumerate(ROWS)]
    if kind == "peft-oft":  # the parts of a fused layer share the rotation of the inputs
        return [parts[0]] * len(ROWS)
    if kind == "lokr":
        return lokr_parts()
    if kind == "glora":  # as do those of GLoRA
        return [replace(parts[0], up=part.up) for part in parts]
    return parts


def lokr_parts():
    right = torch.randn(4, 2, generator=torch.Generator().manual_seed(1))
    lefts = [torch.randn(rows // 4, 4, generator=torch.Generator().manual_seed(rows)) for rows in ROWS]
    return [LokrDelta(1.0, left=left, right=right) for left in lefts]


@pytest.mark.parametrize("kind", KINDS)
def test_a_fused_delta_stacks_the_parts_by_rows(kind):
    parts = parts_of(kind)
    fused = fuse_layers(parts, ROWS, "layer")
    weight = weight_of()
    assert fused.kind == kind
    torch.testing.assert_close(fused.delta_weight(weight), dense(parts, weight), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_splitting_a_fused_delta_gives_the_parts_back_bit_for_bit(kind):
    parts = parts_of(kind)
    back = split(fuse_layers(parts, ROWS, "layer"), ROWS, "layer")
    assert all(same_delta(one, other) for one, other in zip(back, parts, strict=True))


@pytest.mark.parametrize("kind", ["lora", "loha", "dora", "full", "ia3", "peft-ia3", "oft", "peft-oft", "replacement"])
def test_the_parts_of_any_delta_of_the_fused_layer_make_the_same_change(kind):
    delta = random_delta(kind, (sum(ROWS), COLUMNS), 4 if kind == "oft" else 3, 0.0 if kind == "oft" else 1.5)
    weight = weight_of()
    torch.testing.assert_close(
        dense(split(delta, ROWS, "layer"), weight), delta.delta_weight(weight), rtol=1e-9, atol=1e-9
    )


def test_parts_share_their_down_and_are_fused_without_more_rank():
    delta = random_delta("lora", (sum(ROWS), COLUMNS), 5, 2.0)
    parts = split(delta, ROWS, "layer")
    assert all(torch.equal(part.down, delta.down) for part in parts)
    assert same_delta(fuse_layers(parts, ROWS, "layer"), delta)


def test_other_factors_are_fused_as_blocks_and_several_scales_are_folded():
    parts = [
        random_delta("lora", (rows, COLUMNS), rank, alpha, rank)
        for rows, rank, alpha in zip(ROWS, (1, 2, 3, 4), (1.0, 4.0, 0.3, 4.0), strict=True)
    ]
    fused = fuse_layers(parts, ROWS, "layer")
    assert (fused.rank, fused.scale) == (10, 1.0)
    assert int(fused.up.ne(0).sum()) == sum(part.up.numel() for part in parts)
    back = split(fused, ROWS, "layer")
    assert [part.rank for part in back] == [1, 2, 3, 4]
    torch.testing.assert_close(dense(back, weight_of()), dense(parts, weight_of()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["lora", "full", "loha", "ia3", "peft-ia3", "lokr"])
@pytest.mark.parametrize("missing", [(0,), (1, 2), (0, 1, 2)])
def test_a_part_without_an_adapter_gets_zeros_and_stays_without(kind, missing):
    parts = [None if number in missing else part for number, part in enumerate(parts_of(kind))]
    fused = fuse_layers(parts, ROWS, "layer")
    weight = weight_of()
    torch.testing.assert_close(fused.delta_weight(weight), dense(parts, weight), rtol=1e-9, atol=1e-9)
    back = split(fused, ROWS, "layer")
    torch.testing.assert_close(dense(back, weight), dense(parts, weight), rtol=1e-9, atol=1e-9)
    if kind in ("lora", "full", "loha"):
        assert [part is None for part in back] == [part is None for part in parts]


def test_a_fresh_adapter_keeps_all_parts():
    delta = LoraDelta(torch.ones(3, COLUMNS), torch.zeros(sum(ROWS), 3), 3.0)
    assert [part.rank for part in split(delta, ROWS, "layer")] == [3, 3, 3, 3]


@pytest.mark.parametrize("kind", ["dora", "oft", "replacement", "peft-oft"])
def test_a_part_without_an_adapter_is_refused_if_zeros_would_change_it(kind):
    with pytest.raises(AdapterError, match="a part without an adapter"):
        fuse_layers([None, *parts_of(kind)[1:]], ROWS, "layer")


def test_magnitudes_of_inputs_are_refused_both_ways_with_the_reason():
    whole = random_delta("dora", (sum(ROWS), COLUMNS))
    across = DoraDelta(whole.inner, torch.ones(1, COLUMNS))
    with pytest.raises(AdapterError, match=r"layer: .*magnitudes are per input"):
        split(across, ROWS, "layer")
    parts = [DoraDelta(part_of("dora", rows, 1).inner, torch.ones(1, COLUMNS)) for rows in ROWS]
    with pytest.raises(AdapterError, match="magnitudes are per input"):
        fuse_layers(parts, ROWS, "layer")


def test_parts_of_several_kinds_are_refused():
    with pytest.raises(AdapterError, match=r"several kinds \(full, lora\)"):
        fuse_layers([part_of("lora", 8, 1), part_of("full", 8, 1), None, None], ROWS, "layer")


def test_a_kind_without_a_rule_is_refused():
    with pytest.raises(AdapterError, match="kind 'boft' have no exact rule"):
        split(random_delta("boft", (16, COLUMNS)), [8, 8], "layer")


def unaligned_lokr(low, cuts_left=False):
    """Returns a product whose blocks of 14 rows cross the borders of the parts."""
    generator = torch.Generator().manual_seed(2)
    sizes = {"right": (14, 2)} if not low else {"right_up": (14, 1), "right_down": (1, 2)}
    sizes |= {"left_up": (4, 1), "left_down": (1, 4)} if cuts_left else {"left": (4, 4)}
    factors = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    return LokrDelta.from_factors(factors, 3.0 if low or cuts_left else 1.0)


@pytest.mark.parametrize("cuts_left", [False, True])
@pytest.mark.parametrize("low", [False, True])
def test_parts_of_a_lokr_that_end_inside_its_blocks_share_its_factors_and_fuse_again(low, cuts_left):
    delta, weight = unaligned_lokr(low, cuts_left), weight_of()
    parts = split(delta, ROWS, "layer")
    assert {part.kind for part in parts} == {"lokr-rows"}
    assert all(part.factors()[name] is factor for part in parts for name, factor in delta.factors().items())
    torch.testing.assert_close(dense(parts, weight), delta.delta_weight(weight), rtol=1e-9, atol=0)
    assert fuse_layers(parts, ROWS, "layer") is delta


@pytest.mark.parametrize("allowed", [["lokr"], []])
@pytest.mark.parametrize("low", [False, True])
def test_rows_of_a_lokr_have_other_exact_forms(low, allowed):
    delta, weight = unaligned_lokr(low), weight_of()
    modules = {f"part {number}": part for number, part in enumerate(split(delta, ROWS, "layer"))}
    exact = list(with_exact_rows(Adapter(modules), allowed).modules.values())
    torch.testing.assert_close(dense(exact, weight), delta.delta_weight(weight), rtol=1e-9, atol=1e-6 if low else 0)
    assert {part.kind for part in exact} <= {"full", "lora", *allowed}
    assert {part.kind for part in exact} >= {"lora", *allowed}


def test_rows_of_a_lokr_that_would_be_huge_when_written_out_are_refused():
    delta = LokrDelta(1.0, left=torch.ones(4, 1000), right=torch.ones(30001, 1000))
    modules = {str(number): part for number, part in enumerate(split(delta, [40001, 40001, 40002], "layer"))}
    with pytest.raises(AdapterError, match="too large"):
        with_exact_rows(Adapter(modules), [])


def test_parts_that_are_not_the_rows_of_one_lokr_are_not_fused():
    parts = split(unaligned_lokr(low=False), ROWS, "layer")
    others = split(
        unaligned_lokr(low=False).with_factors({"left": torch.ones(4, 4), "right": torch.ones(14, 2)}), ROWS, "x"
    )
    with pytest.raises(AdapterError, match="rows of several products"):
        fuse_layers([*parts[:3], others[3]], ROWS, "layer")
    for wrong in ([*parts[:3], None], [parts[1], parts[0], *parts[2:]]):
        with pytest.raises(AdapterError, match="not consecutive rows"):
            fuse_layers(wrong, ROWS, "layer")
    with pytest.raises(AdapterError, match="not all rows"):
        fuse_layers(parts[:3], ROWS[:3], "layer")


def kohya_oft(weight, blocks, alpha):
    """Returns the weight that sd-scripts computes for a fused layer: `networks/oft_flux.py`, in its own words."""
    changed = []
    for rows, part in zip(weight.split([b.shape[0] * b.shape[1] for b in blocks]), blocks, strict=True):
        skew = part - part.transpose(1, 2)
        norm = skew.flatten().norm()
        skew = skew * ((norm.clamp(max=alpha * len(rows)) + 1e-8) / (norm + 1e-8))
        identity = torch.eye(part.shape[1], dtype=part.dtype)
        rotation = (identity + skew) @ (identity - skew).inverse()
        grouped = rows.reshape(*part.shape[:2], -1)
        changed.append(torch.einsum("knm,knp->kmp", rotation, grouped).flatten(0, 1))
    return torch.cat(changed)


@pytest.mark.parametrize("alpha", [1e-3, 10.0])
def test_kohyas_oft_of_parts_changes_the_weight_as_sd_scripts_does_and_is_written_as_it_was_read(alpha):
    generator, name = torch.Generator().manual_seed(3), "oft_unet_single_blocks_0_linear1"
    blocks = [torch.randn(2, rows // 2, rows // 2, generator=generator, dtype=torch.float64) for rows in ROWS]
    tensors = {f"{name}.oft_blocks.{number}": part for number, part in enumerate(blocks)}
    single = {"oft_unet_single_blocks_0_linear2.oft_blocks.0": blocks[0]}
    alphas = {f"{key.partition('.')[0]}.alpha": torch.tensor(alpha, dtype=torch.float64) for key in (*tensors, *single)}
    tensors |= single | alphas
    adapter = codecs["kohya"].decode(tensors, {"loraline.base": "flux"})
    parts = [adapter.modules[f"transformer.single_transformer_blocks.0.{part}"] for part in PARTS]
    weight = weight_of()
    expected = kohya_oft(weight, blocks, alpha) - weight
    assert float(expected.abs().max()) > 1e-3
    torch.testing.assert_close(dense(parts, weight), expected, rtol=1e-6, atol=1e-6)
    written = codecs["kohya"].encode(adapter)[0]
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[key], tensor) for key, tensor in tensors.items())
    assert codecs["kohya"].is_lossless(adapter)
    with pytest.raises(AdapterError, match="cannot hold an adapter of kind 'oft-parts'"):
        codecs["comfyui"].encode(adapter)


def test_a_constraint_of_0_allows_no_rotation_in_kohyas_oft():
    tensors = {"oft_unet_single_blocks_0_linear2.oft_blocks.0": torch.ones(2, 4, 4)}
    tensors |= {"oft_unet_single_blocks_0_linear2.alpha": torch.tensor(0.0)}
    (delta,) = codecs["kohya"].decode(tensors, {"loraline.base": "flux"}).modules.values()
    assert not delta.delta_weight(weight_of(8)).any()


def test_lokr_parts_of_other_right_factors_are_refused():
    parts = lokr_parts()
    with pytest.raises(AdapterError, match="do not share their right factor"):
        fuse_layers([*parts[:3], LokrDelta(1.0, left=parts[3].left, right=parts[3].right + 1)], ROWS, "layer")


@pytest.mark.parametrize("kind", KINDS)
def test_swapping_halves_twice_is_nothing_and_once_moves_the_rows(kind):
    try:
        delta = random_delta(kind, (8, COLUMNS), 2, 0.0 if kind == "oft" else 3.0)
    except SettingsError:
        pytest.skip("no such layer")
    swapped = swap_halves(delta, "layer")
    weight = weight_of(8)
    expected = delta.delta_weight(weight.roll(4, 0)).roll(4, 0)
    torch.testing.assert_close(swapped.delta_weight(weight), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(swap_halves(swapped, "layer").delta_weight(weight), delta.delta_weight(weight))


def test_a_bias_goes_with_its_rows():
    delta = LoraDelta(torch.ones(2, COLUMNS), torch.ones(sum(ROWS), 2), 2.0, None, torch.arange(float(sum(ROWS))))
    parts = split(delta, ROWS, "layer")
    assert torch.equal(torch.cat([part.bias for part in parts]), delta.bias)
    assert same_delta(fuse_layers(parts, ROWS, "layer"), delta)
    whole = FullDelta(None, torch.arange(float(sum(ROWS))))
    assert [len(part.bias) for part in split(whole, ROWS, "layer")] == ROWS


def test_gains_of_inputs_belong_to_every_part():
    for kind in (Ia3Delta, PeftIa3Delta):
        delta = kind(torch.rand(COLUMNS), "input")
        parts = split(delta, ROWS, "layer")
        assert all(same_delta(part, delta) for part in parts)
        assert same_delta(fuse_layers(parts, ROWS, "layer"), delta)
        with pytest.raises(AdapterError, match="differently"):
            fuse_layers([*parts[:3], kind(torch.rand(COLUMNS), "input")], ROWS, "layer")


def fused_lokr_file(path, width=64):
    """Writes ComfyUI's file of a LoKr of FLUX.1's fused layers, whose blocks cross the borders of the parts."""
    tensors = {}
    for name, rows in (("double_blocks.0.img_attn.qkv", 3 * width), ("single_blocks.0.linear1", 7 * width)):
        left, right = (
            torch.randn(4, 4, generator=torch.Generator().manual_seed(rows)),
            torch.randn(rows // 4, width // 4),
        )
        module = f"diffusion_model.{name}"
        tensors |= {f"{module}.lokr_w1": left, f"{module}.lokr_w2": right, f"{module}.alpha": torch.tensor(1.0)}
    save_file(tensors, path, {"loraline.base": "flux"})
    return tensors


def size_of(path):
    return sum(file.stat().st_size for file in path.rglob("*.safetensors"))


@pytest.mark.parametrize("form", ["comfyui", "kohya", "loraline"])
def test_a_fused_lokr_stays_fused_where_the_format_has_the_layer_or_shares_its_factors(form, tmp_path, caplog):
    tensors = fused_lokr_file(tmp_path / "a.safetensors")
    adapter = read_bundle(tmp_path / "a.safetensors").adapter
    write_adapter(tmp_path / form, adapter, format=form)
    written = load_file(tmp_path / form / "adapter.safetensors")
    factors = {name: tensor for name, tensor in written.items() if not name.endswith("lokr_rows")}
    assert (
        sum(factor.numel() for factor in factors.values() if factor.dim())
        == sum(t.numel() for t in tensors.values()) - 2
    )
    assert read_bundle(tmp_path / form).adapter == adapter
    if form == "comfyui":
        assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
    assert not caplog.records


@pytest.mark.parametrize("form", ["diffusers", "lycoris", "aitoolkit", "onetrainer", "peft"])
def test_elsewhere_its_parts_are_written_exactly_with_a_warning_of_their_sizes_or_approximated(form, tmp_path, caplog):
    fused_lokr_file(tmp_path / "a.safetensors")
    adapter = read_bundle(tmp_path / "a.safetensors").adapter
    write_adapter(tmp_path / "exact", adapter, format=form)
    assert "become" in caplog.text
    assert "--approximate" in caplog.text
    back = read_bundle(tmp_path / "exact").adapter
    for name, delta in adapter.modules.items():
        weight = torch.zeros(delta.weight_shape)
        torch.testing.assert_close(
            back.modules[name].delta_weight(weight), delta.delta_weight(weight), rtol=1e-4, atol=1e-5
        )
    near = approximate(adapter, form, rank=2)
    write_adapter(tmp_path / "near", near.adapter, format=form)
    assert near.retained.keys() == adapter.modules.keys()
    assert size_of(tmp_path / "near") < size_of(tmp_path / "exact") / 2


def test_shared_factors_that_the_header_does_not_name_are_missing(tmp_path):
    fused_lokr_file(tmp_path / "a.safetensors")
    tensors, metadata = codecs["loraline"].encode(read_bundle(tmp_path / "a.safetensors").adapter)
    for entry, problem in (("[]", "no mapping"), ("{", "not JSON"), ('{"transformer.x": "y"}', "lokr_w1")):
        with pytest.raises(AdapterError, match=problem):
            codecs["loraline"].decode(tensors, {**metadata, "loraline.shared": entry})


def test_a_dora_of_a_fused_lokr_stays_fused_too(tmp_path, caplog):
    """Its parts have magnitudes of their own, and rows of one product as their directions."""
    tensors = fused_lokr_file(tmp_path / "a.safetensors")
    for module in {name.rpartition(".")[0] for name in tensors}:
        rows = 4 * tensors[f"{module}.lokr_w2"].shape[0]
        tensors[f"{module}.dora_scale"] = 1 + torch.rand(rows, 1, generator=torch.Generator().manual_seed(rows))
    save_file(tensors, tmp_path / "a.safetensors", {"loraline.base": "flux"})
    adapter = read_bundle(tmp_path / "a.safetensors").adapter
    assert {(delta.kind, delta.inner.kind) for delta in adapter.modules.values()} == {("dora", "lokr-rows")}
    written = codecs["kohya"].encode(adapter)[0]
    flat = {name.removeprefix("lora_unet_").replace("_", ""): tensor for name, tensor in written.items()}
    for name, tensor in tensors.items():
        module, _, suffix = name.removeprefix("diffusion_model.").rpartition(".")
        assert torch.equal(flat[f"{module.replace('.', '').replace('_', '')}.{suffix.replace('_', '')}"], tensor)
    write_adapter(tmp_path / "stored", adapter)
    assert read_bundle(tmp_path / "stored").adapter == adapter
    stored = load_file(tmp_path / "stored" / "adapter.safetensors")
    assert sum(name.endswith("lokr_w2") for name in stored) == 2
    assert not caplog.records
    # A part within one block keeps a Kronecker product as its direction in formats with a layer for each part.
    name = "transformer.single_transformer_blocks.0.attn.to_q"
    part = Adapter({name: adapter.modules[name]}, "flux")
    write_adapter(tmp_path / "part", part, format="lycoris")
    back, weight = read_bundle(tmp_path / "part").adapter.modules[name], torch.randn(64, 64)
    assert back.inner.kind == "lokr"
    torch.testing.assert_close(back.delta_weight(weight), part.modules[name].delta_weight(weight), rtol=1e-4, atol=1e-5)

"""Tests fused layers: split inverts fuse for every kind with an exact rule; inexact cases are refused."""

from dataclasses import replace

import pytest
import torch
from law_adapters import random_delta

from lora_engine.adapters import DoraDelta, FullDelta, Ia3Delta, LokrDelta, LoraDelta, PeftIa3Delta, same_delta
from lora_engine.errors import AdapterError, SettingsError
from lora_engine.formats.transformers.fused import fuse_layers, row_rules, split, swap_halves

ROWS, COLUMNS = [8, 8, 8, 32], 8


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


@pytest.mark.parametrize("kind", row_rules)
def test_a_fused_delta_stacks_the_parts_by_rows(kind):
    parts = parts_of(kind)
    fused = fuse_layers(parts, ROWS, "layer")
    weight = weight_of()
    assert fused.kind == kind
    torch.testing.assert_close(fused.delta_weight(weight), dense(parts, weight), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", row_rules)
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


@pytest.mark.parametrize("low", [False, True])
def test_rows_of_a_lokr_that_end_inside_its_blocks_become_a_lora_of_the_same_change(low):
    generator = torch.Generator().manual_seed(2)
    if low:
        right = {
            "right_up": torch.randn(14, 1, generator=generator),
            "right_down": torch.randn(1, 2, generator=generator),
        }
    else:
        right = {"right": torch.randn(14, 2, generator=generator)}
    delta = LokrDelta(3.0 if low else 1.0, left=torch.randn(4, 4, generator=generator), **right)
    parts = split(delta, ROWS, "layer")
    weight = weight_of()
    expected = delta.delta_weight(weight)
    torch.testing.assert_close(dense(parts, weight), expected, rtol=1e-9, atol=1e-6 if low else 0)
    assert {part.kind for part in parts} <= {"lora", "full"}
    assert any(part.kind == "lora" for part in parts)


def test_a_lokr_that_would_be_huge_when_written_out_is_refused():
    delta = LokrDelta(1.0, left=torch.ones(4, 1000), right=torch.ones(30001, 1000))
    with pytest.raises(AdapterError, match="too large"):
        split(delta, [40001, 40001, 40002], "layer")


def test_lokr_parts_of_other_right_factors_are_refused():
    parts = lokr_parts()
    with pytest.raises(AdapterError, match="do not share their right factor"):
        fuse_layers([*parts[:3], LokrDelta(1.0, left=parts[3].left, right=parts[3].right + 1)], ROWS, "layer")


@pytest.mark.parametrize("kind", row_rules)
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

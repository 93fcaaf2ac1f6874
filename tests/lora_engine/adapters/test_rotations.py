"""OFT and BOFT of LyCORIS and PEFT: orthogonality, constraints, blocks, issues, and files."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lora_engine.adapters import (
    Adapter,
    BoftDelta,
    LayerOp,
    OftDelta,
    PeftBoftDelta,
    PeftOftDelta,
    attach,
    create_adapter,
    dense_forward,
    kinds,
)
from lora_engine.adapters.rotation import cayley, limit_norm, nearest_block, neumann, rotate_blocks
from lora_engine.errors import AdapterError, SettingsError
from lora_engine.formats import read_adapter, write_adapter

KOHYA = "lora_unet_layer"
ROTATIONS = ["oft", "boft", "peft-oft", "peft-boft"]


def skew(*shape, seed=0):
    raw = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return raw - raw.transpose(-1, -2)


def random_rotation(kind, weight, **options):
    """Returns a delta of the kind that rotates without a gain."""
    generator = torch.Generator().manual_seed(0)
    fresh = kinds[kind].create(weight, None, 4, None, generator, **options)
    factors = {key: torch.randn(value.shape, generator=generator) for key, value in fresh.factors().items()}
    return fresh.with_factors(
        {key: value if key != "scale" else torch.ones_like(value) for key, value in factors.items()}
    )


def test_the_cayley_transform_is_orthogonal():
    rotated = torch.eye(5, dtype=torch.float64) + cayley(skew(3, 5, 5))
    torch.testing.assert_close(rotated @ rotated.transpose(-1, -2), torch.eye(5, dtype=torch.float64).expand(3, 5, 5))


def test_the_series_approaches_the_cayley_transform():
    small = 0.02 * skew(3, 4, 4)
    errors = [float((neumann(small, terms) - cayley(small)).norm()) for terms in (1, 2, 3, 5, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6 * errors[0]
    assert torch.equal(neumann(small, 3), neumann(small, 4))


def test_one_block_is_used_for_every_part():
    change, values = torch.randn(1, 2, 2), torch.randn(3, 6)
    assert torch.equal(rotate_blocks(change, values), rotate_blocks(change.expand(3, 2, 2), values))


@pytest.mark.parametrize("kind", ["oft", "boft"])
def test_lycoris_rotations_keep_the_angles_between_inputs(kind):
    weight = torch.randn(8, 5)
    rotated = weight + random_rotation(kind, weight).delta_weight(weight)
    torch.testing.assert_close(rotated.T @ rotated, weight.T @ weight, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(rotated, weight, atol=0.1)


@pytest.mark.parametrize(("kind", "options"), [("peft-oft", {"terms": 0}), ("peft-boft", {"butterflies": 3})])
def test_peft_rotations_keep_the_angles_between_outputs(kind, options):
    weight = torch.randn(5, 16)
    rotated = weight + random_rotation(kind, weight, **options).delta_weight(weight)
    torch.testing.assert_close(rotated @ rotated.T, weight @ weight.T, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(rotated, weight, atol=0.1)


def test_butterflies_mix_all_outputs_and_plain_blocks_do_not():
    weight = torch.eye(16)
    mixed = {kind: weight + random_rotation(kind, weight).delta_weight(weight) for kind in ("oft", "boft")}
    assert torch.count_nonzero(mixed["boft"]) == 16 * 16
    assert torch.count_nonzero(mixed["oft"]) == 16 * 4


def test_a_constraint_limits_the_rotation_and_none_does_not():
    matrices = skew(3, 4, 4)
    assert float(limit_norm(matrices, 0.5).norm()) == pytest.approx(0.5, rel=1e-6)
    assert torch.equal(limit_norm(matrices, 0), matrices)
    assert torch.equal(limit_norm(matrices, 1e3), matrices)


@pytest.mark.parametrize("kind", ROTATIONS)
@pytest.mark.parametrize("alpha", [None, 0.1])
def test_training_can_start_without_rotation(kind, alpha):
    """At zero a norm has no gradient; the constraint must not make the first step NaN."""
    layer = nn.Linear(8, 8)
    base = {"unet": nn.ModuleDict({"layer": layer})}
    adapter = create_adapter(base, "*", kind, rank=2, alpha=alpha)
    with attach(base, adapter, trainable=True) as attachment:
        base["unet"]["layer"](torch.randn(3, 8)).square().sum().backward()
        gradients = [parameter.grad for parameter in attachment.parameters()]
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    assert any(bool(gradient.any()) for gradient in gradients)


def test_pefts_constraint_limits_the_value_and_not_the_gradient():
    angles = nn.Parameter(torch.tensor([[3.0], [0.001]]))
    delta = PeftOftDelta(angles, eps=0.1)
    weight = torch.eye(4)
    delta.delta_weight(weight).sum().backward()
    assert bool(angles.grad.isfinite().all())
    assert bool(angles.grad.all())
    # Two blocks: each norm, which is sqrt(2) of the angle, is at most 0.1 / sqrt(2).
    capped = PeftOftDelta(torch.tensor([[0.05], [0.001]]))
    torch.testing.assert_close(delta.delta_weight(weight), capped.delta_weight(weight))


@pytest.mark.parametrize("kind", ROTATIONS)
@pytest.mark.parametrize("size", [1, 12])
@pytest.mark.parametrize("kernel", [None, 1, 3])
def test_few_and_many_inputs_give_the_same_output(kind, size, kernel):
    """The smaller of inputs (or outputs) and weight is rotated, with the same result."""
    layer = nn.Linear(8, 8) if kernel is None else nn.Conv2d(8, 8, kernel, padding=kernel // 2)
    x = torch.randn(size, 8) if kernel is None else torch.randn(1, 8, size, size)
    delta, op = random_rotation(kind, layer.weight.detach()), LayerOp.of(layer)
    with torch.no_grad():
        output = delta.forward(x, layer(x), layer.weight, layer.bias, op, 0.5)
        expected = dense_forward(delta, x, layer(x), layer.weight, layer.bias, op, multiplier=0.5)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("width", "requested", "size"),
    [(320, 8, 8), (320, 7, 8), (320, 6, 5), (12, 1, 2), (7, 2, 7), (45, 4, 3), (45, 99, 45)],
)
def test_the_nearest_block_size_is_used(width, requested, size):
    assert nearest_block(width, requested, lambda size: True, "") == size


@pytest.mark.parametrize(
    ("kind", "shape", "rank"),
    [
        ("oft", (5, 4), 2),
        ("oft", (2, 4), 2),
        ("boft", (9, 4), 2),
        ("peft-oft", (4, 1), 2),
        ("oft", (8, 4), 0),
        ("oft", (8,), 2),
    ],
)
def test_channels_that_cannot_be_split_into_blocks_are_refused(kind, shape, rank):
    with pytest.raises(SettingsError, match=r"blocks|block size|no inputs"):
        kinds[kind].create(torch.ones(shape), None, rank, None, None)


def test_more_butterflies_need_more_blocks():
    delta = PeftBoftDelta.create(torch.ones(3, 16), None, 4, None, None, butterflies=3)
    assert delta.blocks.shape == (3, 4, 4, 4)
    with pytest.raises(SettingsError, match="times 4"):
        PeftBoftDelta.create(torch.ones(3, 6), None, 2, None, None, butterflies=3)


INVALID = {
    "blocks that are not square": (OftDelta(torch.ones(2, 3, 4)), None, "blocks"),
    "no blocks": (OftDelta(torch.ones(0, 2, 2)), None, "blocks"),
    "a constraint below 0": (OftDelta(torch.ones(2, 2, 2), -1.0), None, "alpha"),
    "a constraint without end": (OftDelta(torch.ones(2, 2, 2), float("inf")), None, "alpha"),
    "other outputs": (OftDelta(torch.ones(2, 2, 2)), (6, 3), "blocks"),
    "gains of other outputs": (OftDelta(torch.ones(2, 2, 2), 0.0, torch.ones(5, 1)), None, "rescale"),
    "gains along two dimensions": (OftDelta(torch.ones(2, 2, 2), 0.0, torch.ones(2, 2)), None, "rescale"),
    "an odd block of a butterfly": (BoftDelta(torch.ones(2, 2, 3, 3)), None, "blocks"),
    "too many stages": (BoftDelta(torch.ones(3, 2, 2, 2)), None, "blocks"),
    "stages of other outputs": (BoftDelta(torch.ones(1, 2, 2, 2)), (5, 3), "blocks"),
    "angles of no block": (PeftOftDelta(torch.ones(2, 4)), None, "angles"),
    "no angles": (PeftOftDelta(torch.ones(2, 0)), None, "angles"),
    "angles in a row": (PeftOftDelta(torch.ones(6)), None, "angles"),
    "fewer than no terms": (PeftOftDelta(torch.ones(2, 6), -1), None, "terms"),
    "a constraint of nothing": (PeftOftDelta(torch.ones(2, 6), 5, 0.0), None, "eps"),
    "other inputs": (PeftOftDelta(torch.ones(2, 6)), (3, 12), "angles"),
    "blocks of another size": (PeftOftDelta(torch.ones(1, 6)), (3, 6), "angles"),
    "angles on a norm": (PeftOftDelta(torch.ones(2, 6)), (8,), "angles"),
    "butterflies that are not square": (PeftBoftDelta(torch.ones(1, 2, 2, 3), torch.ones(3, 1)), None, "blocks"),
    "butterflies without blocks": (PeftBoftDelta(torch.ones(2, 1, 4, 4), torch.ones(3, 1)), None, "blocks"),
    "butterflies of other inputs": (PeftBoftDelta(torch.ones(1, 2, 2, 2), torch.ones(3, 1)), (3, 6), "blocks"),
    "scales of other outputs": (PeftBoftDelta(torch.ones(1, 2, 2, 2), torch.ones(3, 1)), (5, 4), "scale"),
    "a square of scales": (PeftBoftDelta(torch.ones(1, 2, 2, 2), torch.ones(2, 2)), None, "scale"),
}


@pytest.mark.parametrize("case", INVALID)
def test_structural_issues_of_rotations_are_named(case):
    delta, shape, factor = INVALID[case]
    assert [issue.factor for issue in delta.issues(shape)] == [factor]


def test_oft_and_boft_in_files_are_distinguished_by_their_dimensions(tmp_path):
    for blocks, kind in ((torch.ones(2, 2, 2), OftDelta), (torch.ones(2, 2, 2, 2), BoftDelta)):
        # LyCORIS stores the constraint 0 as an integer; a file without alpha has no constraint.
        for alpha in ({f"{KOHYA}.alpha": torch.tensor(0)}, {}):
            save_file({f"{KOHYA}.oft_blocks": blocks, **alpha}, tmp_path / "a.safetensors")
            delta = read_adapter(tmp_path / "a.safetensors", {"unet.layer": (4, 3)})[0].modules["unet.layer"]
            assert type(delta) is kind
            assert delta.alpha == 0.0


@pytest.mark.parametrize(
    "delta", [PeftOftDelta(torch.ones(2, 6)), PeftBoftDelta(torch.ones(1, 2, 4, 4), torch.ones(8, 1))]
)
def test_lycoris_formats_refuse_the_kinds_of_peft(delta, tmp_path):
    adapter = Adapter({"unet.layer": delta})
    with pytest.raises(AdapterError, match="cannot hold"):
        write_adapter(tmp_path / "a.safetensors", adapter, format="kohya")
    assert read_adapter(write_adapter(tmp_path / "b.safetensors", adapter)[0])[0] == adapter


@pytest.mark.parametrize(
    ("suffix", "value", "match"),
    [("oft_R.terms", torch.tensor(2.5), "whole number"), ("oft_R.eps", torch.ones(2), "one number")],
)
def test_settings_of_pefts_oft_that_are_not_numbers_are_refused(suffix, value, match, tmp_path):
    tensors = {"unet.layer.oft_R.weight": torch.ones(2, 6), "unet.layer.oft_R.terms": torch.tensor(5.0)}
    save_file({**tensors, f"unet.layer.{suffix}": value}, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match=match):
        read_adapter(tmp_path / "a.safetensors")


def test_on_an_embedding_peft_has_the_opposite_angles(tmp_path):
    adapter = Adapter({"text_encoder.text_model.embeddings.token_embedding": PeftOftDelta(torch.rand(2, 6))})
    write_adapter(tmp_path, adapter, format="peft")
    assert read_adapter(tmp_path)[0] == adapter

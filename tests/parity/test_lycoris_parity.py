"""Inconsistencies within LyCORIS: its behavior is pinned, and the test shows which variant we follow."""

import copy

import pytest
import torch
from law_adapters import forward_of, input_of, layer_of
from lycoris.functional import factorization
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from peers import lycoris_pair
from peft.tuners.lokr.layer import factorization as peft_factorization

from lora_engine.adapters import kinds
from lora_engine.adapters.lokr import factorize
from lora_engine.formats import codecs


@pytest.mark.parametrize("form", ["loha", "lokr", "lokr both"])
def test_lycoris_merges_loha_and_lokr_with_alpha_over_rank_twice_and_ours_is_what_it_trains(form):
    pair = lycoris_pair(form, "linear")
    with torch.no_grad():
        trained = pair.weight()[0] - pair.layer.weight
        merged = pair.module.get_merged_weight(1.0, pair.layer.weight.shape)[0] - pair.layer.weight
        torch.testing.assert_close(merged, 0.5 * trained, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(pair.delta.delta_weight(pair.layer.weight), trained, rtol=1e-4, atol=1e-5)
    assert pair.delta.scale == 0.5
    assert trained.abs().max() > 1e-2


def test_lycoris_cannot_merge_a_part_of_a_rescaled_rotation():
    """Its output at half strength differs; the matrix tests that ours is a fraction of the full change."""
    with pytest.raises(RuntimeError, match="must match the size"):
        lycoris_pair("oft rescaled", "linear").module.get_diff_weight(0.5)


@pytest.mark.parametrize("form", ["ia3", "oft", "boft"])
def test_lycoris_bypass_moves_the_bias_too_and_its_weights_do_not(form):
    """LyCORIS' merge and forward do not change the bias, and neither do we; its bypass form scales or rotates it."""
    pair = lycoris_pair(form, "linear")
    reference, layer, x = copy.deepcopy(pair.module), copy.deepcopy(pair.layer), input_of(pair.layer)
    with torch.no_grad():
        assert pair.delta.delta_bias(layer.bias) is None
        assert reference.get_merged_weight(1.0)[1] is None
        reference.org_forward = layer.forward
        assert not torch.allclose(forward_of(pair.delta, layer, x), reference.bypass_forward(x, 1), atol=1e-2)
        layer.bias.zero_()
        torch.testing.assert_close(
            forward_of(pair.delta, layer, x), reference.bypass_forward(x, 1), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(("kind", "module"), [("lora", LoConModule), ("loha", LohaModule), ("lokr", LokrModule)])
@pytest.mark.parametrize("layer_name", ["linear", "conv 3x3", "conv 1x1", "conv grouped", "conv oblong"])
def test_a_fresh_delta_has_the_shapes_of_lycoris(kind, module, layer_name):
    layer = layer_of(layer_name)
    for rank, options in ((1, {}), (2, {"tucker": True}), (50, {}) if kind == "lokr" else (3, {})):
        reference = module("x", layer, 1.0, rank, 1.0, use_tucker=options.get("tucker", False))
        delta = kinds[kind].create(layer.weight.detach(), None, rank, 1.0, None, **options)
        spelling = codecs["loraline"].key_layout.factor_keys[kind]
        expected = {key: value.shape for key, value in reference.state_dict().items() if key not in ("alpha", "scalar")}
        assert {key: value.shape for key, value in spelling.write(delta).items()} == expected


def test_dimensions_are_split_as_lycoris_and_peft_split_them():
    for dimension in range(1, 400):
        for factor in (-1, *range(1, 20), 64, 1000):
            assert factorize(dimension, factor) == factorization(dimension, factor)
            assert factorize(dimension, factor) == tuple(sorted(peft_factorization(dimension, factor)))


@pytest.mark.parametrize("rank", [4, 9])
def test_rslora_in_our_file_is_lycoris_rs_lora(rank):
    layer = torch.nn.Linear(24, 36)
    reference = LoConModule("x", layer, 1.0, rank, 2.0, rs_lora=True)
    delta = kinds["rslora"].create(layer.weight.detach(), None, rank, 2.0, None)
    assert delta.alpha == pytest.approx(float(reference.alpha))
    assert delta.scale == pytest.approx(reference.scale)

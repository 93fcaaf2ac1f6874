"""PEFT's merges and ours agree where PEFT merges deltas; errors of PEFT are pinned."""

import warnings

import pytest
import torch
from law_adapters import layer_of
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_engine.adapters import Adapter, LoraDelta
from lora_engine.merging.merge import merge_adapters
from lora_engine.merging.methods import parse_options
from lora_engine.merging.methods.dare import dare, dare_ties
from lora_engine.merging.methods.magnitude_prune import magnitude_prune
from lora_engine.merging.methods.ties import ties

LAYERS = ("linear", "conv 3x3")
NAMES, RANKS, ALPHAS = ("first", "second"), (3, 3), (5.0, 6.0)


def two_adapters(layer, **options):
    """Returns a PEFT model of a layer with two adapters, and the same adapters as ours."""
    model = nn.Sequential(layer_of(layer))
    configs = [
        LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"], init_lora_weights=False, **options)
        for rank, alpha in zip(RANKS, ALPHAS, strict=True)
    ]
    peft = get_peft_model(model, configs[0], "first")
    peft.add_adapter("second", configs[1])
    module = peft.base_model.model[0]
    ours = []
    for name, alpha in zip(NAMES, ALPHAS, strict=True):
        down, up = module.lora_A[name].weight.detach().clone(), module.lora_B[name].weight.detach().clone()
        ours.append(Adapter({"unet.0": LoraDelta(down, up, alpha)}))
    return peft, ours


def peft_merge(peft, weights, how, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.add_weighted_adapter(list(NAMES), weights, "merged", combination_type=how, **options)
    return peft.base_model.model[0].get_delta_weight("merged").detach()


def our_merge(ours, weights, method, layer, **options):
    merged, _ = merge_adapters(ours, weights, parse_options(method, options))
    return merged.modules["unet.0"].delta_weight(torch.zeros(layer_of(layer).weight.shape))


def dense(adapter, layer):
    return adapter.modules["unet.0"].delta_weight(torch.zeros(layer_of(layer).weight.shape))


def relative_error(actual, expected):
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("weights", [[0.7, 0.3], [1.0, -0.5]])
def test_cat_agrees_with_peft(layer, weights):
    peft, ours = two_adapters(layer)
    expected = peft_merge(peft, weights, "cat")
    for method in ("concatenate", "linear"):
        torch.testing.assert_close(our_merge(ours, weights, method, layer), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer", LAYERS)
def test_svd_agrees_with_peft(layer):
    peft, ours = two_adapters(layer)
    expected = peft_merge(peft, [0.7, 0.3], "svd", svd_rank=2)
    torch.testing.assert_close(our_merge(ours, [0.7, 0.3], "svd", layer, rank=2), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("peft_name", "name"), [("ties_svd", "ties"), ("magnitude_prune_svd", "magnitude-prune")])
def test_dense_merges_agree_with_peft(layer, peft_name, name):
    peft, ours = two_adapters(layer)
    full = min(layer_of(layer).weight.flatten(1).shape)
    expected = peft_merge(peft, [0.6, 0.6], peft_name, density=0.5, svd_rank=full)
    actual = our_merge(ours, [0.6, 0.6], name, layer, density=0.5, kind="full")
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("how", "ours_of"), [("dare_linear_svd", dare), ("dare_ties_svd", dare_ties)])
def test_dare_agrees_with_peft_where_the_masks_are_the_same(how, ours_of, monkeypatch):
    peft, ours = two_adapters("linear")
    masks = [torch.rand(8, 20, generator=torch.Generator().manual_seed(seed)) < 0.6 for seed in (1, 2)]
    drawn = iter(masks)
    with monkeypatch.context() as patch:
        # PEFT draws from the global generator; both sides use the same masks.
        patch.setattr(torch, "bernoulli", lambda chances, **_: next(drawn).to(chances.dtype))
        expected = peft_merge(peft, [0.6, 0.6], how, density=0.6, svd_rank=8)
    options = {"scale": 1.0} if ours_of is dare_ties else {}
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    actual = ours_of([dense(one, "linear") for one in ours], [0.6, 0.6], density=0.6, generators=generators, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_pefts_linear_merges_factors_and_is_not_the_weighted_sum():
    peft, ours = two_adapters("linear")
    expected = 0.7 * dense(ours[0], "linear") + 0.3 * dense(ours[1], "linear")
    assert relative_error(peft_merge(peft, [0.7, 0.3], "linear"), expected) > 0.2
    assert relative_error(our_merge(ours, [0.7, 0.3], "linear", "linear"), expected) < 1e-6


def test_pefts_ties_on_factors_is_not_ties():
    peft, ours = two_adapters("linear")
    expected = ties([dense(one, "linear") for one in ours], [1.0, 1.0], density=0.5, scale=1.0)
    assert relative_error(peft_merge(peft, [1.0, 1.0], "ties", density=0.5), expected) > 0.2


def test_peft_elects_signs_before_the_weights_so_that_a_subtracted_adapter_votes_for_itself():
    peft, ours = two_adapters("linear")
    actual = peft_merge(peft, [1.0, -1.0], "ties_svd", density=1.0 - 1e-9, svd_rank=8)
    first, second = (dense(one, "linear") for one in ours)
    negated = ties([first, -second], [1.0, 1.0], density=1.0, scale=1.0)
    weighted = ties([first, second], [1.0, -1.0], density=1.0, scale=1.0)
    assert torch.equal(weighted, negated)
    assert relative_error(actual, negated) > 0.2


def test_pefts_rslora_cat_is_too_strong_by_the_root_of_the_new_rank():
    peft, _ = two_adapters("linear", use_rslora=True)
    module = peft.base_model.model[0]
    expected = 0.7 * module.get_delta_weight("first").detach() + 0.3 * module.get_delta_weight("second").detach()
    actual = peft_merge(peft, [0.7, 0.3], "cat")
    torch.testing.assert_close(actual, sum(RANKS) ** 0.5 * expected, rtol=1e-4, atol=1e-5)


def test_magnitude_pruning_of_two_is_the_sum_of_the_pruned():
    _, ours = two_adapters("linear")
    deltas = [dense(one, "linear") for one in ours]
    each = [magnitude_prune([delta], [0.5], density=0.3) for delta in deltas]
    torch.testing.assert_close(magnitude_prune(deltas, [0.5, 0.5], density=0.3), sum(each))
    assert [int((part != 0).sum()) for part in each] == [48, 48]

"""LyCORIS' (IA)3, OFT, BOFT, full and norm modules and ours agree, on the tensors that LyCORIS itself saves.

Where LyCORIS disagrees with itself, a test pins what it does and says which of the two we follow.
"""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("lycoris", reason="LyCORIS is not installed")

from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.full import FullModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.norms import NormModule

from lora_engine.adapters import (
    Adapter,
    BoftDelta,
    FullDelta,
    Ia3Delta,
    LayerOp,
    OftDelta,
)
from lora_engine.formats import codecs

LAYERS = {
    "linear": (lambda: nn.Linear(12, 8), (5, 12)),
    "linear without bias": (lambda: nn.Linear(6, 16, bias=False), (2, 3, 6)),
    "conv 3x3": (lambda: nn.Conv2d(4, 8, 3, padding=1), (2, 4, 8, 8)),
    "conv 1x1": (lambda: nn.Conv2d(4, 12, 1), (2, 4, 8, 8)),
}
KINDS = {
    "ia3": (IA3Module, {}, Ia3Delta),
    "ia3 on input": (IA3Module, {"train_on_input": True}, Ia3Delta),
    "oft": (DiagOFTModule, {"lora_dim": 2}, OftDelta),
    "oft rescaled": (DiagOFTModule, {"lora_dim": 2, "rescaled": True}, OftDelta),
    "oft constrained": (DiagOFTModule, {"lora_dim": 2, "constraint": 0.05}, OftDelta),
    "boft": (ButterflyOFTModule, {"lora_dim": 6}, BoftDelta),
    "boft rescaled": (ButterflyOFTModule, {"lora_dim": 6, "rescaled": True}, BoftDelta),
    "boft constrained": (ButterflyOFTModule, {"lora_dim": 6, "constraint": 0.05}, BoftDelta),
    "full": (FullModule, {}, FullDelta),
}
pairs = pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in KINDS for name in LAYERS])


def make(kind, name, multiplier=1.0, **more):
    cls, options, _ = KINDS[kind]
    build, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = build()
    theirs = cls("unet_layer", layer, multiplier=multiplier, **{"lora_dim": 4, **options, **more})
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer, theirs, torch.randn(shape)


def saved(theirs):
    """What LyCORIS saves, under the name of a module of ours."""
    tensors = theirs.custom_state_dict() if isinstance(theirs, FullModule) else theirs.state_dict()
    return {f"unet.layer.{key}": value.detach().clone() for key, value in tensors.items()}


def read(tensors):
    return codecs["loraline"].decode(tensors, {}).modules["unet.layer"]


def outputs(delta, layer, x, multiplier=1.0):
    return delta.forward(x, layer(x), layer.weight, getattr(layer, "bias", None), LayerOp.of(layer), multiplier)


@pairs
def test_weight_and_forward_agree_with_lycoris(kind, name):
    layer, theirs, x = make(kind, name)
    tensors = saved(theirs) if kind != "full" else full_diff(theirs)
    delta, mine = read(tensors), copy.deepcopy(layer)
    assert type(delta) is KINDS[kind][2]
    with torch.no_grad():
        expected = theirs.get_diff_weight(1.0)[0]
        torch.testing.assert_close(delta.delta_weight(mine.weight), expected, rtol=1e-5, atol=1e-5)
        found = outputs(delta, mine, x)
        theirs.apply_to()
        torch.testing.assert_close(found, layer(x), rtol=1e-5, atol=2e-5)


def full_diff(theirs):
    """LyCORIS' full module holds the difference until it is applied."""
    bias = {} if theirs.bias is None else {"unet.layer.diff_b": theirs.bias.detach().clone()}
    return {"unet.layer.diff": theirs.weight.detach().clone(), **bias}


@pairs
def test_gradients_agree_with_lycoris(kind, name):
    layer, theirs, x = make(kind, name)
    delta, mine = read(saved(theirs) if kind != "full" else full_diff(theirs)), copy.deepcopy(layer)
    parameters = {key: nn.Parameter(value) for key, value in delta.factors().items()}
    outputs(delta.with_factors(parameters), mine.requires_grad_(False), x).square().sum().backward()
    theirs.apply_to()
    layer(x).square().sum().backward()
    own = {"scale": "weight", "blocks": "oft_blocks", "rescale": "rescale", "diff": "weight", "bias": "bias"}
    for key, parameter in parameters.items():
        expected = getattr(theirs, own[key]).grad
        size = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(parameter.grad, expected.reshape(parameter.shape), rtol=1e-4, atol=1e-4 * size)


@pytest.mark.parametrize("layer", [nn.LayerNorm(8), nn.GroupNorm(2, 8)], ids=["layer norm", "group norm"])
def test_norms_agree_with_lycoris_forward_and_gradients(layer):
    theirs = NormModule("unet_layer", layer)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    tensors = {f"unet.layer.{key}": value.detach().clone() for key, value in theirs.state_dict().items()}
    assert {key.rpartition(".")[2] for key in tensors} == {"w_norm", "b_norm"}
    delta = read(tensors)
    assert isinstance(delta, FullDelta)
    parameters = {key: nn.Parameter(value) for key, value in delta.factors().items()}
    x = torch.randn(3, 8) if isinstance(layer, nn.LayerNorm) else torch.randn(3, 8, 5)
    found = outputs(delta.with_factors(parameters), layer, x)
    found.square().sum().backward()
    theirs.apply_to()
    expected = layer(x)
    expected.square().sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parameters["diff"].grad, theirs.w_norm.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(parameters["bias"].grad, theirs.b_norm.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "full"])
def test_what_we_write_is_what_lycoris_saves(kind):
    _, theirs, _ = make(kind, "conv 3x3")
    tensors = saved(theirs)
    written, _ = codecs["loraline"].encode(Adapter({"unet.layer": read(tensors)}))
    assert written.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert torch.equal(written[key].to(tensor.dtype), tensor)
        assert written[key].shape == tensor.shape


@pytest.mark.parametrize(("kind", "is_linear"), [("ia3", True), ("oft", True), ("boft", False)])
def test_half_a_multiplier_is_half_the_change_but_for_lycoris_boft(kind, is_linear):
    """LyCORIS turns each stage of BOFT by a part; ours is a part of the whole change, for this kind as for all."""
    layer, theirs, _ = make(kind, "linear")
    with torch.no_grad():
        half = 0.5 * read(saved(theirs)).delta_weight(layer.weight)
        assert torch.allclose(theirs.get_diff_weight(0.5)[0], half, atol=1e-5) == is_linear


@pytest.mark.parametrize("kind", ["ia3", "oft", "boft"])
def test_lycoris_bypass_moves_the_bias_too_and_its_weights_do_not(kind):
    """LyCORIS' merge and its ordinary forward leave the bias, and so do we; its bypass form scales or rotates it."""
    layer, theirs, x = make(kind, "linear")
    delta = read(saved(theirs))
    with torch.no_grad():
        ours = outputs(delta, layer, x)
        assert delta.delta_bias(layer.bias) is None
        assert theirs.get_merged_weight(1.0)[1] is None
        theirs.org_forward = layer.forward
        torch.testing.assert_close(ours, theirs.forward(x), rtol=1e-5, atol=1e-5)
        bypass = theirs.bypass_forward(x, 1)
        assert not torch.allclose(ours, bypass, atol=1e-2)
        plain = copy.deepcopy(layer)
        plain.bias.zero_()
        theirs.org_forward = plain.forward
        torch.testing.assert_close(outputs(delta, plain, x), theirs.bypass_forward(x, 1), rtol=1e-5, atol=1e-5)


def test_lycoris_cannot_scale_a_rescaled_rotation_and_we_can():
    """At other multipliers than 1 LyCORIS adds tensors of different shapes; ours is a part of the whole change."""
    layer, theirs, x = make("oft rescaled", "linear")
    delta = read(saved(theirs))
    with torch.no_grad():
        torch.testing.assert_close(theirs.get_diff_weight(1.0)[0], delta.delta_weight(layer.weight))
        with pytest.raises(RuntimeError, match="must match the size"):
            theirs.get_diff_weight(0.5)
        half = layer.weight + 0.5 * delta.delta_weight(layer.weight)
        expected = nn.functional.linear(x, half, layer.bias)
        torch.testing.assert_close(outputs(delta, layer, x, 0.5), expected, rtol=1e-5, atol=1e-5)

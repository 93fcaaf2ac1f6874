"""LyCORIS' LoCon and ours agree, on the tensors that LyCORIS itself saves."""

import pytest
import torch
from torch import nn

lycoris = pytest.importorskip("lycoris.modules.locon", reason="LyCORIS is not installed")

from lora_engine.adapters import LayerOp  # noqa: E402
from lora_engine.formats import codecs  # noqa: E402

LAYERS = {
    "linear": (lambda: nn.Linear(12, 9), (5, 12), False),
    "conv 3x3": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 8, 8), False),
    "conv 3x3 tucker": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 8, 8), True),
    "conv 1x1": (lambda: nn.Conv2d(4, 6, 1), (2, 4, 8, 8), False),
}


@pytest.mark.parametrize("name", LAYERS)
def test_forward_and_delta_agree_with_lycoris(name):
    make, shape, use_tucker = LAYERS[name]
    torch.manual_seed(0)
    layer = make()
    theirs = lycoris.LoConModule("unet_layer", layer, multiplier=1.0, lora_dim=3, alpha=5, use_tucker=use_tucker)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    tensors = {f"unet.layer.{key}": value.detach() for key, value in theirs.state_dict().items()}
    tensors = {key: value for key, value in tensors.items() if not key.endswith("scalar")}
    delta = codecs["loraline"].decode(tensors, {}).modules["unet.layer"]
    x = torch.randn(shape)
    with torch.no_grad():
        expected = theirs.get_diff_weight(1.0)[0]
        torch.testing.assert_close(delta.delta_weight(layer.weight), expected, rtol=1e-5, atol=1e-6)
        found = delta.forward(x, layer(x), layer.weight, layer.bias, LayerOp.of(layer))
        theirs.apply_to()
        torch.testing.assert_close(found, layer(x), rtol=1e-5, atol=1e-5)
    assert (delta.mid is not None) == use_tucker

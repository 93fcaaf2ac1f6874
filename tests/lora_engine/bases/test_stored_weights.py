"""Frozen weights in float8, or in the CPU's memory: their bytes, their moves, and the training with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from lora_engine.adapters import attach, create_adapter
from lora_engine.bases import stored
from lora_engine.bases.base import BaseModel, load_base
from lora_engine.bases.quantized import QuantizedLinear
from lora_engine.training.specs.running import Running

Untrained = Callable[[str], Path]


def stored_bytes(layer: QuantizedLinear) -> int:
    """Returns the bytes that the operations of a stored weight hold."""
    cells = layer._restore.__closure__ or ()
    tensors = next(cell.cell_contents for cell in cells if isinstance(cell.cell_contents, list))
    return sum(tensor.nbytes for tensor in tensors)


def layers_of(base: BaseModel) -> list[QuantizedLinear]:
    layers = [base.get_module(name) for name in base.module_names()]
    return [layer for layer in layers if isinstance(layer, QuantizedLinear)]


def step_of(base: BaseModel, begin: Callable[[], None] = lambda: None) -> tuple[Tensor, dict[str, Tensor], int]:
    """Returns the output of a training step, the gradients, and the bytes that autograd keeps beside the base's own."""
    noisy = torch.randn(2, *base.latent_shape((16, 16)), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        text = base.encode_text(["a", "b"])
    adapter = create_adapter(base, "attention", rank=2, generator=torch.Generator().manual_seed(0))
    own = {value.data_ptr() for module in base.modules.values() for value in module.parameters()}
    kept = 0

    def keep(value: Tensor) -> Tensor:
        nonlocal kept
        kept += 0 if value.data_ptr() in own else value.nbytes
        return value

    with attach(base, adapter, trainable=True) as attachment:
        begin()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            output = base.predict(noisy, torch.tensor([100, 700]), text)
        output.square().mean().backward()
        gradients = {
            name: value.grad.clone() for name, value in attachment.named_parameters() if value.grad is not None
        }
    return output.detach(), gradients, kept


@pytest.mark.parametrize("shape", ["small-sd", "small-flux"])
def test_float8_weights_take_a_quarter_of_the_memory_also_until_the_backward_pass(
    untrained_base: Untrained, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(str(untrained_base(shape)), device="cpu", quantise="fp8")
    layers = layers_of(base)
    assert len(layers) > 5
    for layer in layers:
        assert stored_bytes(layer) == layer.meta_weight.numel() + 4 * len(layer.meta_weight)
    _, gradients, kept = step_of(base)
    assert gradients
    assert all(torch.isfinite(value).all() for value in gradients.values())

    def apply(x: Tensor, bias: Tensor | None, restore: Callable[[], Tensor]) -> Tensor:
        return nn.functional.linear(x, restore(), bias)

    # Without the function of its own, autograd keeps the restored weights of all layers behind the first adapted one.
    monkeypatch.setattr(stored._LinearOfStored, "apply", apply)
    _, plain_gradients, kept_by_autograd = step_of(base)
    assert kept_by_autograd - kept > 0.5 * sum(4 * layer.meta_weight.numel() for layer in layers)
    torch.testing.assert_close(plain_gradients, gradients)


@pytest.mark.parametrize("quantise", ["none", "fp8"])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_offloaded_weights_give_the_same_step_and_are_moved_for_each_use(
    untrained_base: Untrained, monkeypatch: pytest.MonkeyPatch, share: float, quantise: Any
) -> None:
    folder = str(untrained_base("small-sd"))
    plain = load_base(folder, device="cpu", quantise=quantise)
    base = load_base(folder, device="cpu", quantise=quantise, offload=share)
    moves = 0

    def begin() -> None:
        nonlocal moves
        moves = 0

    def move(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
        nonlocal moves
        moves += 1
        return [tensor.to(device).clone() for tensor in tensors]

    monkeypatch.setattr(stored, "fetch", move)
    expected, gradients, _ = step_of(plain)
    assert moves == 0
    output, offloaded_gradients, _ = step_of(base, begin)
    # Layers that are not offloaded have a fused forward pass, which rounds differently; those in float8 have none.
    tolerance = 1e-5 if quantise == "none" else 0.0
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(offloaded_gradients, gradients, rtol=tolerance, atol=tolerance)
    count = sum(isinstance(plain.get_module(name), nn.Linear) for name in base.module_names() if "blocks" in name)
    offloaded = round(share * count)
    # Once in the forward pass, and once more in the backward pass unless nothing before it is trained.
    assert offloaded < moves <= 2 * offloaded


def test_offload_goes_with_weights_that_can_be_moved() -> None:
    with pytest.raises(ValidationError, match="offload goes with quantise none and fp8, not with '8bit'"):
        Running(quantise="8bit", offload=0.5)
    assert Running(quantise="fp8", offload=0.5).offload == 0.5
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        Running(offload=2.0)

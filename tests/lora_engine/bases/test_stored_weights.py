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
from lora_engine.adapters.select import select_modules
from lora_engine.adapters.tree import module_shapes
from lora_engine.bases import stored, swapping
from lora_engine.bases.base import BaseModel, load_base
from lora_engine.bases.quantized import QuantizedLinear, quantize_base
from lora_engine.bases.swapping import BlockSwapper, swapped_block
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


def step_of(
    base: BaseModel, steps: int = 1, after: Callable[[], None] = lambda: None
) -> tuple[Tensor, dict[str, Tensor], int]:
    """Returns the output of a training step, the gradients, and the bytes that autograd keeps beside the base's own.

    Args:
        base: The base.
        steps: Number of equal steps.
        after: Called after each.
    """
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
        for _ in range(steps):
            kept = 0
            for parameter in attachment.parameters():
                parameter.grad = None
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
                output = base.predict(noisy, torch.tensor([100, 700]), text)
            output.square().mean().backward()
            after()
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


@pytest.mark.parametrize("shape", ["small-sd", "small-flux"])
@pytest.mark.parametrize("quantise", ["none", "fp8"])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_offloaded_weights_give_the_same_step_and_are_moved_by_blocks_ahead_of_their_use(
    untrained_base: Untrained, monkeypatch: pytest.MonkeyPatch, share: float, quantise: Any, shape: str
) -> None:
    folder = str(untrained_base(shape))
    plain, base = load_base(folder, device="cpu", quantise=quantise), load_base(folder, device="cpu")
    swapper = quantize_base(base, quantise, offload=share)
    assert swapper is not None
    largest = 0

    def move(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
        nonlocal largest
        largest = max(largest, swapper.resident + 1)
        return [tensor.to(device).clone() for tensor in tensors]

    monkeypatch.setattr(swapping, "fetch", move)
    expected, gradients, _ = step_of(plain)
    tolerance = 1e-5 if quantise == "none" else 0.0
    counts: list[tuple[int, int]] = []
    output, offloaded_gradients, _ = step_of(base, 4, lambda: counts.append((swapper.moves, swapper.waits)))
    # Layers that are not offloaded have a fused forward pass, which rounds differently; those in float8 have none.
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(offloaded_gradients, gradients, rtol=tolerance, atol=tolerance)
    layers = select_modules(module_shapes(plain), "linear")
    blocks = {swapped_block(name) for name in layers[len(layers) - round(share * len(layers)) :]}
    assert len(blocks) >= 3
    moves, waits = ([count[index] for count in counts] for index in (0, 1))
    # Once in the forward pass, and once more in the backward pass; the block at the turn stays.
    assert 0 < moves[3] - moves[2] == moves[2] - moves[1] <= 2 * len(blocks)
    assert waits[0] >= len(blocks)
    assert waits[3] == waits[1], "from the third step on, every block is copied ahead"
    assert largest == 2


def test_blocks_are_the_innermost_numbered_ones() -> None:
    assert swapped_block("unet.down_blocks.0.attentions.1.transformer_blocks.2.attn1.to_out.0") == (
        "unet.down_blocks.0.attentions.1.transformer_blocks.2"
    )
    assert swapped_block("unet.up_blocks.1.resnets.0.time_emb_proj") == "unet.up_blocks.1.resnets.0"
    assert swapped_block("transformer.single_blocks.37.proj_mlp") == "transformer.single_blocks.37"
    assert swapped_block("unet.mid_block.proj") == "unet.mid_block.proj"


def test_an_order_that_changes_costs_waits_and_no_errors() -> None:
    swapper = BlockSwapper(torch.device("cpu"))
    values = {name: torch.full((2,), float(number)) for number, name in enumerate("abcd")}
    find = {name: swapper.add(name, [value]) for name, value in values.items()}
    for order in ("abcd", "abcd", "dcba", "acbd", "abcd"):
        for name in order:
            assert torch.equal(find[name]()[0], values[name])
            assert swapper.resident <= 2
    before = swapper.waits
    for name in "abcd":
        find[name]()
    assert before > 4
    assert swapper.waits - before < 4


def test_offload_goes_with_weights_that_can_be_moved() -> None:
    with pytest.raises(ValidationError, match="offload goes with quantise none and fp8, not with '8bit'"):
        Running(quantise="8bit", offload=0.5)
    assert Running(quantise="fp8", offload=0.5).offload == 0.5
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        Running(offload=2.0)

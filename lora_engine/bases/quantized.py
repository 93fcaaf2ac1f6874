"""Stores the weights of frozen linear layers in fewer bits or in the CPU's memory, in memory only.

fp8: see `stored`. 8 and 4 bits are those of bitsandbytes (the extra `quantised`).

8 bits: one scale per row; on a GPU activations are rounded too (Dettmers et al. 2022, LLM.int8 without outliers).
4 bits: NF4 in blocks of 64 (Dettmers et al. 2023, section 3).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lora_engine.adapters.select import select_modules
from lora_engine.adapters.tree import ModuleTree, module_shapes
from lora_engine.bases.stored import Swap, WeightStorage, store_weight
from lora_engine.bases.swapping import BlockSwapper, swapped_block
from lora_engine.errors import SettingsError

Quantization = Literal["none", "8bit", "4bit", "fp8"]


class QuantizedLinear(nn.Linear):
    """A frozen linear layer whose weight is stored otherwise. Gradients flow to the input only.

    Args:
        layer: The layer; its weight is released, its bias is kept.
        quantization: Form of the weight.
        swap: Keeps the weight in the CPU's memory, with `none` and `fp8`; see `store_weight`.

    Attributes:
        meta_weight: A tensor with the shape, dtype and device of the weight, but no values.
    """

    def __init__(self, layer: nn.Linear, quantization: Quantization, *, swap: Swap | None = None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = layer.bias
        weight = layer.weight.detach()
        self.meta_weight = torch.empty((), dtype=weight.dtype, device=weight.device).expand(weight.shape)
        self._apply_weight, self._restore = (
            _QUANTIZERS[quantization](weight)
            if quantization in _QUANTIZERS
            else store_weight(weight, fp8=quantization == "fp8", swap=swap)
        )
        self.training = layer.training

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantized weight in its original dtype; computed at each access."""
        return self._restore()

    def forward(self, x: Tensor) -> Tensor:
        """Returns the layer's output, in the dtype of x."""
        return self._apply_weight(x, self.bias)


def _quantize_8bit(weight: Tensor) -> WeightStorage:
    import bitsandbytes
    import bitsandbytes.functional

    # The kernel takes no other dtype; weights of a valid base are within the range of float16.
    rows, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(weight.to(torch.float16))
    state = bitsandbytes.MatmulLtState()
    state.CB, state.SCB, state.has_fp16_weights, state.threshold = rows, scales, False, 0.0

    def apply(x: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor = bitsandbytes.matmul(x, rows, bias=bias, state=state)
        return out.to(x.dtype)

    def restore() -> Tensor:
        restored: Tensor = bitsandbytes.functional.int8_vectorwise_dequant(rows, scales)
        return restored.to(weight_dtype)

    weight_dtype = weight.dtype
    return apply, restore


def _quantize_4bit(weight: Tensor) -> WeightStorage:
    import bitsandbytes
    import bitsandbytes.functional

    packed, state = bitsandbytes.functional.quantize_4bit(weight.contiguous(), quant_type="nf4")

    def apply(x: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor = bitsandbytes.matmul_4bit(x, packed.t(), quant_state=state, bias=bias)
        return out

    def restore() -> Tensor:
        restored: Tensor = bitsandbytes.functional.dequantize_4bit(packed, state)
        return restored

    return apply, restore


_QUANTIZERS: dict[Any, Callable[[Tensor], WeightStorage]] = {"8bit": _quantize_8bit, "4bit": _quantize_4bit}


@torch.no_grad()
def quantize_base(base: ModuleTree, quantization: Quantization, *, offload: float = 0.0) -> BlockSwapper | None:
    """Replaces the linear layers in the blocks of a base's denoiser by quantized layers, in place.

    Text encoders are not quantized: their results are computed once and cached. Neither are the first, last and
    timestep layers: they are small and lose the most.

    Args:
        base: A frozen base with nothing attached.
        quantization: Form of the weights.
        offload: Share of these layers, from the last, whose weights stay in the CPU's memory.

    Returns:
        What moves the weights of the offloaded layers; None without any.

    Raises:
        SettingsError: The extra is not installed, or an unknown quantization.
    """
    check_quantization(quantization)
    names = [name for name in select_modules(module_shapes(base), "linear") if _is_plain(base.get_module(name))]
    first = len(names) - round(offload * len(names))
    swapper: BlockSwapper | None = None
    for number, name in enumerate(names):
        if quantization != "none" or number >= first:
            layer = cast(nn.Linear, base.get_module(name))
            swap = None
            if number >= first:
                swapper = swapper or BlockSwapper(layer.weight.device)
                swap = partial(swapper.add, swapped_block(name))
            base.set_module(name, QuantizedLinear(layer, quantization, swap=swap))
    return swapper


def _is_plain(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) and not isinstance(layer, QuantizedLinear)


def check_quantization(quantization: Quantization) -> None:
    """Raises an error if this machine lacks a quantization.

    Raises:
        SettingsError: The library is not installed, or an unknown quantization.
    """
    if quantization in ("none", "fp8"):
        return
    if quantization not in _QUANTIZERS:
        raise SettingsError(f"unknown quantise value {quantization!r}", allowed="none, fp8, 8bit, 4bit")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise SettingsError(
            f"quantise: {quantization} needs bitsandbytes, which is not installed",
            allowed="quantise: none or fp8, which need no extra package",
            remedy="install it: pip install 'loraline[quantised]'",
        ) from error

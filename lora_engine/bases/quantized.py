"""Frozen linear layers held in 8 or 4 bits, by bitsandbytes (the extra `quantised`). Nothing here is trained or saved.

8 bits: one scale a row, and activations too are rounded on a GPU (Dettmers et al. 2022, LLM.int8 without outliers).
4 bits: NF4 in blocks of 64 (Dettmers et al. 2023, section 3).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_engine.adapters.select import select_modules
from lora_engine.adapters.tree import ModuleTree, module_shapes
from lora_engine.errors import SettingsError

Quantization = Literal["none", "8bit", "4bit"]


class QuantizedLinear(nn.Linear):
    """A frozen linear layer that keeps its weight in few bits. Gradients go to the input alone.

    Args:
        layer: The layer; its weight is let go of, its bias is kept.
        quantisation: `8bit` or `4bit`.

    Attributes:
        sketch: A tensor with the shape, dtype and device of the weight, and no values: for those who need no more.
    """

    def __init__(self, layer: nn.Linear, quantisation: Quantization) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = layer.bias
        weight = layer.weight.detach()
        self.sketch = torch.empty((), dtype=weight.dtype, device=weight.device).expand(weight.shape)
        self._apply_weight, self._restore = _HOLDERS[quantisation](weight)
        self.training = layer.training

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight as the layer applies it, in its first dtype; computed anew at each call."""
        return self._restore()

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, in the dtype of x."""
        return self._apply_weight(x, self.bias)


_Held = tuple[Callable[[Tensor, Tensor | None], Tensor], Callable[[], Tensor]]


def _hold_in_8_bits(weight: Tensor) -> _Held:
    import bitsandbytes
    import bitsandbytes.functional

    # The kernel takes no other dtype; a weight beyond what half precision holds is none of a sound base.
    rows, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(weight.to(torch.float16))
    state = bitsandbytes.MatmulLtState()
    state.CB, state.SCB, state.has_fp16_weights, state.threshold = rows, scales, False, 0.0

    def apply(x: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor = bitsandbytes.matmul(x, rows, bias=bias, state=state)
        return out.to(x.dtype)

    def restore() -> Tensor:
        found: Tensor = bitsandbytes.functional.int8_vectorwise_dequant(rows, scales)
        return found.to(weight_dtype)

    weight_dtype = weight.dtype
    return apply, restore


def _hold_in_4_bits(weight: Tensor) -> _Held:
    import bitsandbytes
    import bitsandbytes.functional

    packed, state = bitsandbytes.functional.quantize_4bit(weight.contiguous(), quant_type="nf4")

    def apply(x: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor = bitsandbytes.matmul_4bit(x, packed.t(), quant_state=state, bias=bias)
        return out

    def restore() -> Tensor:
        found: Tensor = bitsandbytes.functional.dequantize_4bit(packed, state)
        return found

    return apply, restore


_HOLDERS: dict[Any, Callable[[Tensor], _Held]] = {"8bit": _hold_in_8_bits, "4bit": _hold_in_4_bits}


@torch.no_grad()
def quantize_base(base: ModuleTree, quantisation: Quantization) -> None:
    """Puts quantised layers in the place of the linear layers in the blocks of a base's denoiser; the rest stays.

    Text encoders stay as they are: what they give is computed once and kept. The first and last layers and those of
    the timesteps are narrow, and lose most.

    Args:
        base: A base, frozen, with nothing attached to it.
        quantisation: `none` does nothing.

    Raises:
        SettingsError: The extra is not installed, or an unknown quantisation.
    """
    if quantisation == "none":
        return
    check_quantization(quantisation)
    for name in select_modules(module_shapes(base), "linear"):
        layer = base.get_module(name)
        if isinstance(layer, nn.Linear) and not isinstance(layer, QuantizedLinear):
            base.set_module(name, QuantizedLinear(layer, quantisation))


def check_quantization(quantisation: Quantization) -> None:
    """Does nothing where this machine can quantise so.

    Raises:
        SettingsError: The library is not installed, or an unknown quantisation.
    """
    if quantisation == "none":
        return
    if quantisation not in _HOLDERS:
        raise SettingsError(f"unknown quantisation {quantisation!r}", allowed="none, 8bit, 4bit")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise SettingsError(
            f"a base in {quantisation} needs bitsandbytes, which is not installed",
            allowed="quantise: none, which needs nothing",
            remedy="install it: pip install 'loraline[quantised]'",
        ) from error

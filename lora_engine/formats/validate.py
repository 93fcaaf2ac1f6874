"""What every tensor of an adapter file must be before it is looked at as an adapter: named well, float, finite.

How factors have to agree with each other and with the base is each kind's own affair (`Delta.faults`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lora_engine.adapters import Delta
from lora_engine.errors import AdapterError

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
"""What single numbers may be besides: LyCORIS keeps `on_input`, and an `alpha` of 0, as integers."""


def validate_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Does nothing for tensors that may be an adapter's.

    Raises:
        AdapterError: No tensor at all, a dtype that is not one of float16, bfloat16, float32, float64 (a single
            number may be an integer), or a NaN or infinite value; names the tensor.
    """
    if not tensors:
        raise AdapterError("the file holds no tensors", remedy="save or download the adapter again")
    for name, tensor in tensors.items():
        is_number = tensor.dim() == 0 and tensor.dtype in INTEGERS
        if tensor.dtype not in FLOATS and not is_number:
            raise AdapterError(
                f"the dtype is {tensor.dtype}",
                where=f"tensor {name!r}",
                allowed=", ".join(str(dtype) for dtype in FLOATS),
                remedy="save the adapter in one of these dtypes",
            )
        if not is_finite(tensor) and not _is_idle_alpha(name, tensors):
            count = int((~torch.isfinite(tensor)).sum())
            raise AdapterError(
                f"{count} of {tensor.numel()} values are NaN or infinite",
                where=f"tensor {name!r}",
                allowed="finite values",
                remedy="train again or ask for another file; this one would give black pictures",
            )


def _is_idle_alpha(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether it is the alpha of a LoKr of two whole factors, which means nothing.

    ai-toolkit stores 9999999999 there, which is infinite in half precision.
    """
    module, dot, suffix = name.rpartition(".")
    return dot + suffix == ".alpha" and f"{module}.lokr_w1" in tensors and f"{module}.lokr_w2" in tensors


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    if tensor.numel() < 2:
        return all(math.isfinite(value) for value in tensor.flatten().tolist())
    # Both ends of the values are found in one pass, NaN where any value is; `isfinite` takes twenty times as long.
    least, most = torch.aminmax(tensor)
    return math.isfinite(least.item()) and math.isfinite(most.item())


def check_delta(delta: Delta, sources: Callable[[], Mapping[str, str]], shape: Sequence[int] | None = None) -> None:
    """Does nothing for a delta that is whole and, where a weight's shape is given, fits it.

    Args:
        delta: The delta.
        sources: Gives factor name, or `alpha`, to the name of its tensor in the file; asked where there is a fault.
        shape: Shape of the weight of the base.

    Raises:
        AdapterError: The first fault; names the tensor.
    """
    for fault in delta.faults(shape):
        where = f"tensor {sources().get(fault.factor, fault.factor)!r}"
        raise AdapterError(fault.problem, where=where, allowed=fault.allowed, remedy=fault.remedy)

"""Checks that written values are finite, and words the error for those that are not.

A value beyond the range of its dtype becomes infinite when it is cast, so the same check finds overflow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lora_engine.errors import AdapterError
from lora_engine.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

# Safetensors dtype to the unsigned integer of its size, and the bits without the sign of its smallest value that is not
# finite. Compared as integers, 16-bit numbers need no cast, and float8, for which torch computes nothing, works too.
_NOT_FINITE: dict[str, tuple[type[np.unsignedinteger[Any]], int]] = {
    "F64": (np.uint64, 0x7FF0_0000_0000_0000),
    "F32": (np.uint32, 0x7F80_0000),
    "BF16": (np.uint16, 0x7F80),
    "F16": (np.uint16, 0x7C00),
    "F8_E4M3": (np.uint8, 0x7F),
    "F8_E5M2": (np.uint8, 0x7C),
}
_SUMMED = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# Bytes per step, which bounds the memory of the check.
_STEP = 1 << 20
_SOURCE = "train again or use another file; this one gives black images"


def is_finite(tensor: Tensor) -> bool:
    """Returns True if no value is NaN or infinite."""
    if tensor.numel() < 2:
        return all(math.isfinite(value) for value in tensor.flatten().tolist())
    values = tensor.float() if tensor.element_size() == 1 else tensor
    # A finite sum has only finite terms, and takes a fifth of the time of `aminmax`, which takes a twentieth of that of
    # `isfinite`. The sum of finite values may overflow.
    if math.isfinite(torch.sum(values).item()):
        return True
    minimum, maximum = torch.aminmax(values)
    return math.isfinite(minimum.item()) and math.isfinite(maximum.item())


def are_finite(content: bytes | memoryview, dtype: str) -> bool:
    """Returns True if no stored value is NaN or infinite; always for dtypes without such values.

    Args:
        content: Bytes of whole values.
        dtype: The name of safetensors, such as `F16`.
    """
    if dtype not in _NOT_FINITE:
        return True
    kind, limit = _NOT_FINITE[dtype]
    view = memoryview(content)
    if dtype in _SUMMED and view and not view.readonly:
        return is_finite(torch.frombuffer(view, dtype=getattr(torch, _SUMMED[dtype])))
    return all(int(part.max()) < limit for part in _magnitudes(view, kind))


def count_not_finite(content: bytes | memoryview, dtype: str) -> int:
    """Returns how many stored values are NaN or infinite; arguments as for `are_finite`."""
    if dtype not in _NOT_FINITE:
        return 0
    kind, limit = _NOT_FINITE[dtype]
    return sum(int((part >= limit).sum()) for part in _magnitudes(memoryview(content), kind))


def _magnitudes(view: memoryview, kind: type[np.unsignedinteger[Any]]) -> Iterator[NDArray[np.unsignedinteger[Any]]]:
    """Yields the values as integers without the sign."""
    mask = kind(np.iinfo(kind).max >> 1)
    for first in range(0, len(view), _STEP):
        yield np.frombuffer(view[first : first + _STEP], dtype=kind) & mask


def not_finite(where: str, values: Tensor, original: Tensor | None = None) -> AdapterError:
    """Returns the error for values that are not finite.

    Args:
        where: File, module, factor or tensor.
        values: The values that would be written.
        original: The same values before a cast; None if unknown.
    """
    plain = values.float() if values.element_size() == 1 else values
    count = int((~torch.isfinite(plain)).sum())
    problem = f"{count} of {values.numel()} values are NaN or infinite in {_name(values.dtype)}"
    if original is None or not is_finite(original):
        return AdapterError(problem, where=where, allowed="finite values", remedy=_SOURCE)
    largest = float(original.double().abs().max())
    holding = [_name(dtype) for dtype in _dtypes() if largest <= torch.finfo(dtype).max]
    problem += f"; the largest is {largest:.6g}, and the dtype's maximum is {torch.finfo(values.dtype).max:.6g}"
    return AdapterError(problem, where=where, allowed=", ".join(holding), remedy=f"write it in {holding[0]}")


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raises an error for the first tensor with a value that is NaN or infinite.

    Args:
        tensors: Tensors by name; those of integers are not checked.
        where: The file to be written.

    Raises:
        AdapterError: A value is not finite; names the tensor.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not is_finite(tensor):
            raise not_finite(f"{where}: tensor {name!r}", tensor)


def _dtypes() -> Sequence[torch.dtype]:
    """Returns the dtypes in which a value may be written, the narrowest first."""
    return torch.float16, torch.bfloat16, torch.float32, torch.float64


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

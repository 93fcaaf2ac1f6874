"""Validates the tensors of adapter files: dtype, finite values, and the shapes of factors.

Each kind checks its own factors (`Delta.issues`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from lora_engine.adapters import Delta
from lora_engine.errors import AdapterError
from lora_engine.finite import is_finite
from lora_engine.formats.mapped_tensor import MappedTensor, name_of_dtype
from lora_engine.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

_FLOATS = ("float32", "float16", "bfloat16", "float64")
INTEGERS = ("int64", "int32", "int16", "int8", "uint8", "bool")
"""Further dtypes of single numbers: LyCORIS stores `on_input`, and an `alpha` of 0, as integers."""
RESHAPE = "reshape_weight"
"""Suffix of ComfyUI's tensor with the sizes of a weight, as integers."""
ROWS = "lokr_rows"
"""Suffix of our tensor with the first row of a product and the row after the last, as integers."""
SPARSE_INDICES, SPARSE_SIZE = "bias_indices", "bias_size"
"""Suffixes of the indices [2, n] and the shape [2] of LyCORIS' sparse remainder, as integers."""
_MAX_DIMENSIONS = 5


def validate_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Raises an error for tensors that cannot be an adapter's.

    Raises:
        AdapterError: There is no tensor, a dtype is not float16, bfloat16, float32 or float64 (a single number may be
            an integer), or a value is NaN or infinite; names the tensor.
    """
    if not tensors:
        raise AdapterError("the file holds no tensors", remedy="save or download the adapter again")
    for name, tensor in tensors.items():
        dtype = name_of_dtype(tensor)
        is_number = tensor.dim() == 0 and dtype in INTEGERS
        is_shape = (
            name.endswith((f".{RESHAPE}", f".{ROWS}", f".{SPARSE_SIZE}"))
            and tensor.dim() == 1
            and 2 <= tensor.numel() <= _MAX_DIMENSIONS
        )
        is_indices = name.endswith(f".{SPARSE_INDICES}") and tensor.dim() == 2
        if dtype not in _FLOATS and not is_number and not ((is_shape or is_indices) and dtype in INTEGERS):
            raise AdapterError(
                f"the dtype is torch.{dtype}",
                where=f"tensor {name!r}",
                allowed=", ".join(f"torch.{name}" for name in _FLOATS),
                remedy="save the adapter in one of these dtypes",
            )
        count = _count_not_finite(tensor)
        if count and not _is_unused_alpha(name, tensors):
            raise AdapterError(
                f"{count} of {tensor.numel()} values are NaN or infinite",
                where=f"tensor {name!r}",
                allowed="finite values",
                remedy="train again or use another file; this one gives black images",
            )


def _count_not_finite(tensor: Tensor | MappedTensor) -> int:
    if isinstance(tensor, MappedTensor):
        return tensor.count_not_finite()
    return 0 if is_finite(tensor) else int((~torch.isfinite(tensor)).sum())


def _is_unused_alpha(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Returns True for the alpha of a LoKr with two whole factors, which has no effect.

    ai-toolkit stores 9999999999 in it, which is infinite in half precision.
    """
    module, dot, suffix = name.rpartition(".")
    return dot + suffix == ".alpha" and f"{module}.lokr_w1" in tensors and f"{module}.lokr_w2" in tensors


def check_delta(delta: Delta, sources: Callable[[], Mapping[str, str]], shape: Sequence[int] | None = None) -> None:
    """Raises an error for a delta that is incomplete or does not fit a weight.

    Args:
        delta: The delta.
        sources: Returns factor name, or `alpha`, to tensor name in the file; called only for an error.
        shape: Shape of the base's weight; None skips this check.

    Raises:
        AdapterError: The first issue; names the tensor.
    """
    for issue in delta.issues(shape):
        where = f"tensor {sources().get(issue.factor, issue.factor)!r}"
        raise AdapterError(issue.problem, where=where, allowed=issue.allowed, remedy=issue.remedy)

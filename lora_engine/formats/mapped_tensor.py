"""Defines the tensors of a mapped file as recognition needs them: shapes and dtypes, and values only on request.

Recognition, and the checks of a file, run on these without torch. Everything that computes reads the file as torch
tensors (`safetensors_io.read_safetensors`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lora_engine.finite import are_finite, count_not_finite
from lora_engine.formats.dtypes import STORED_DTYPES
from lora_engine.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

Bits = NDArray[Any]
_STORED = {dtype: name for name, dtype in STORED_DTYPES.items()}
# A dtype that numpy lacks is held as unsigned integers of its size.
_HELD_AS = {"bfloat16": "uint16", "float8_e4m3fn": "uint8", "float8_e5m2": "uint8"}
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class MappedTensor:
    """A tensor in a mapped file, with the part of torch's interface that needs no arithmetic.

    Any other attribute, and any function of torch, is that of the torch tensor with the same values, whose first use
    imports torch. A law test compares the two.

    Args:
        bits: The stored values, in the shape of the tensor.
        dtype_name: Name of its dtype in torch, such as `bfloat16`.
    """

    __slots__ = ("_bits", "dtype_name")

    def __init__(self, bits: Bits, dtype_name: str) -> None:
        self._bits, self.dtype_name = bits, dtype_name

    @classmethod
    def in_buffer(cls, buffer: Any, dtype_name: str, shape: Sequence[int], offset: int) -> MappedTensor:
        """Returns the tensor at an offset of a mapped file."""
        dtype, count = np.dtype(_HELD_AS.get(dtype_name, dtype_name)), math.prod(shape)
        bits = np.frombuffer(buffer, dtype, count, offset) if count else np.empty(0, dtype)
        return cls(bits.reshape(shape), dtype_name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.as_torch(), name)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Calls a function of torch with torch tensors."""
        return function(*map(as_torch, args), **{name: as_torch(value) for name, value in (kwargs or {}).items()})

    def as_torch(self) -> Tensor:
        """Returns the torch tensor with these values; a copy."""
        dtype: torch.dtype = getattr(torch, self.dtype_name)
        # Not `frombuffer`, which refuses tensors without values.
        return torch.from_numpy(self._bits.reshape(-1).copy()).view(dtype).reshape(self.shape)

    def __repr__(self) -> str:
        return f"MappedTensor({self.dtype_name}, {list(self.shape)})"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape."""
        return self._bits.shape

    def dim(self) -> int:
        """Returns the number of dimensions."""
        return self._bits.ndim

    def numel(self) -> int:
        """Returns the number of values."""
        return self._bits.size

    def __len__(self) -> int:
        return len(self._bits)

    def __getitem__(self, index: Any) -> MappedTensor:
        return self._with(self._bits[index])

    def flatten(self, start: int = 0) -> MappedTensor:
        """Returns the tensor with all dimensions from `start` on as one."""
        return self.reshape(*self.shape[:start], math.prod(self.shape[start:]))

    def reshape(self, *shape: Any) -> MappedTensor:
        """Returns the tensor in another shape: sizes, or one sequence of them."""
        return self._with(self._bits.reshape(*shape))

    def unsqueeze(self, dim: int) -> MappedTensor:
        """Returns the tensor with a dimension of size 1 at `dim`."""
        return self._with(np.expand_dims(self._bits, dim))

    def transpose(self, first: int, second: int) -> MappedTensor:
        """Returns the tensor with two dimensions swapped."""
        return self._with(np.swapaxes(self._bits, first, second))

    @property
    def T(self) -> MappedTensor:  # noqa: N802 (torch's name)
        """The tensor with its dimensions in reverse order."""
        return self._with(self._bits.T)

    def clone(self) -> MappedTensor:
        """Returns the tensor itself, which nothing writes to."""
        return self

    def ne(self, number: int) -> MappedTensor:
        """Returns True for each value that is not 0."""
        return MappedTensor(self._magnitudes() != number, "bool")

    def any(self, dim: int | None = None) -> MappedTensor:
        """Returns True if a value (in each line along `dim`) is not 0."""
        return MappedTensor(np.asarray(np.any(self._magnitudes(), axis=dim)), "bool")

    def __bool__(self) -> bool:
        return bool(self.item())

    def numpy(self) -> Bits:
        """Returns the values of a dtype that numpy has."""
        return self._bits

    def item(self) -> Any:
        """Returns the value of a tensor of one."""
        return self._values().item()

    def tolist(self) -> Any:
        """Returns the values as numbers in nested lists."""
        return self._values().tolist()

    def double(self) -> MappedTensor:
        """Returns the values as float64."""
        return MappedTensor(self._values().astype(np.float64), "float64")

    def half(self) -> MappedTensor:
        """Returns the values as float16."""
        return MappedTensor(self._values().astype(np.float16), "float16")

    def count_not_finite(self) -> int:
        """Returns how many values are NaN or infinite."""
        if self.numel() == 1:
            return int(not math.isfinite(self.item()))
        content = np.ascontiguousarray(self._bits).reshape(-1).view(np.uint8).data.toreadonly()
        stored = _STORED[self.dtype_name]
        return 0 if are_finite(content, stored) else count_not_finite(content, stored)

    def __mul__(self, number: float) -> Any:
        # In float64, numpy rounds as torch does.
        is_wide = self.dtype_name == "float64"
        return self._with(self._bits * number) if is_wide else self.as_torch() * number

    def __neg__(self) -> Tensor:
        return -self.as_torch()

    def _with(self, bits: Bits) -> MappedTensor:
        return MappedTensor(np.asarray(bits), self.dtype_name)

    def _magnitudes(self) -> Bits:
        """Returns numbers that are 0 where the value is 0: those of floats are the bits without the sign."""
        if "float" not in self.dtype_name:
            return self._bits
        unsigned: Bits = self._bits.view(_UNSIGNED[self._bits.dtype.itemsize])
        return unsigned << 1

    def _values(self) -> Bits:
        """Returns the values in a dtype of numpy."""
        if self.dtype_name == "bfloat16":
            return (self._bits.astype(np.uint32) << 16).view(np.float32)
        if self.dtype_name == "float8_e5m2":  # the upper half of float16
            return (self._bits.astype(np.uint16) << 8).view(np.float16)
        return _e4m3_values()[self._bits] if self.dtype_name == "float8_e4m3fn" else self._bits


@functools.cache
def _e4m3_values() -> Bits:
    """Returns the value of each byte in float8_e4m3fn: four bits of exponent with bias 7, three of the fraction."""
    bits = np.arange(256)
    exponent, fraction = (bits >> 3) & 15, bits & 7
    values = np.where(exponent > 0, (8 + fraction) * 2.0 ** (exponent - 10), fraction * 2.0**-9)
    values[(bits & 127) == 127] = np.nan
    return np.where(bits < 128, values, -values).astype(np.float16)


def name_of_dtype(tensor: Tensor | MappedTensor) -> str:
    """Returns torch's name of a tensor's dtype, such as `float16`; that of a mapped tensor without importing torch."""
    return tensor.dtype_name if isinstance(tensor, MappedTensor) else _name(tensor.dtype)


@functools.cache
def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_tensor(value: object) -> bool:
    """Returns True for a mapped tensor and a torch tensor."""
    if isinstance(value, MappedTensor):  # alone, because `torch.Tensor` imports torch
        return True
    return isinstance(value, torch.Tensor)


def as_torch(value: Any) -> Any:
    """Returns a tensor, or an argument of a function of torch, with torch tensors for mapped ones."""
    if isinstance(value, MappedTensor):
        return value.as_torch()
    return type(value)(map(as_torch, value)) if isinstance(value, list | tuple) else value

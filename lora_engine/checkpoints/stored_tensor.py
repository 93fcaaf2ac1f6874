"""Defines tensors as byte ranges of safetensors files: those that exist, and those to be written. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

SIZES = {
    "U64": 8, "I64": 8, "F64": 8, "F32": 4, "U32": 4, "I32": 4, "BF16": 2, "F16": 2, "U16": 2, "I16": 2,
    "F8_E5M2FNUZ": 1, "F8_E4M3FNUZ": 1, "F8_E8M0": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""safetensors' dtype name -> bytes per element, in the order of the safetensors library."""
PLAIN = "BF16"
"""The dtype in which dequantized weights are written."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        path: The file.
        offset: First byte in it.
        dtype: safetensors' dtype name, such as `F16`.
        shape: Shape of the tensor, stored by rows.
        scale: The factor of its values: one number, or one per row or per equal part of a row; None means 1.
    """

    path: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]
    scale: StoredTensor | None = None

    @property
    def size(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * SIZES[self.dtype]

    @property
    def value_dtype(self) -> str:
        """The dtype of the values when they are written without a scale."""
        return self.dtype if self.scale is None else PLAIN

    def rows(self, first: int, last: int) -> StoredTensor:
        """Returns the rows from `first` to `last` (exclusive) as a tensor of the same file."""
        stride, shape = self.size // self.shape[0], (last - first, *self.shape[1:])
        scale = self.scale
        if scale is not None and math.prod(scale.shape) > 1:
            scale = scale.rows(first, last)
        return StoredTensor(self.path, self.offset + first * stride, self.dtype, shape, scale)


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of a file to be written.

    Attributes:
        shape: Shape of the tensor.
        pieces: Stored tensors to concatenate by rows; all of one dtype.
        transposed: True if it is the transpose of its only piece.
        cast: The dtype to write, `PLAIN` or that of the pieces; empty means the pieces' dtype without a scale.
        source: Yields the bytes of a tensor that has no pieces; `cast` is its dtype. None means the pieces.
    """

    shape: tuple[int, ...]
    pieces: tuple[StoredTensor, ...]
    transposed: bool = False
    cast: str = ""
    source: Callable[[], Iterator[memoryview]] | None = None

    @property
    def dtype(self) -> str:
        """The dtype name of safetensors."""
        return self.cast or self.pieces[0].value_dtype

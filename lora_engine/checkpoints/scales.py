"""Decodes scaled weights: stored values times their scale, which is one number, or one per row or part of a row."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import torch
from torch import Tensor

from lora_engine.checkpoints.stored_tensor import StoredTensor
from lora_engine.errors import BaseModelError

FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""Safetensors dtype name to torch dtype, for the dtypes that arithmetic supports."""


def read_scale(stored: StoredTensor) -> Tensor | None:
    """Reads the scale of a weight in float32, [1, 1] or [rows, parts of a row]; None if the weight has none.

    Raises:
        BaseModelError: The file is too short.
    """
    scale = stored.scale
    if scale is None:
        return None
    with scale.path.open("rb") as file:
        content = os.pread(file.fileno(), scale.size, scale.offset)
    if len(content) < scale.size:
        raise BaseModelError("the file was truncated while it was read", where=str(scale.path))
    values = torch.frombuffer(bytearray(content), dtype=FLOATS[scale.dtype]).float()
    return values.reshape(1, 1) if values.numel() == 1 else values.reshape(scale.shape[0], -1)


def multiply(values: Tensor, scale: Tensor, first: int) -> Tensor:
    """Multiplies a block by its scale in place, and returns it.

    Args:
        values: Contiguous `[rows, inner]` in float32 or wider.
        scale: The scale of the whole weight, as `read_scale` returns it.
        first: First row of the block in the weight.
    """
    if len(scale) == 1:
        return values.mul_(scale)
    part = scale[first : first + len(values)].to(values.dtype)
    values.view(len(values), part.shape[1], -1).mul_(part[:, :, None])
    return values


class Decoder:
    """Casts the values of a stored tensor to another dtype, in blocks of rows.

    Args:
        stored: The tensor; its dtype is in `FLOATS`, and it has at least one dimension or no scale.
        dtype: The dtype to cast to; a name in `FLOATS`.
    """

    def __init__(self, stored: StoredTensor, dtype: str) -> None:
        self._source, self._target = FLOATS[stored.dtype], FLOATS[dtype]
        self._rows, self._inner = (stored.shape[0] if stored.shape else 1), math.prod(stored.shape[1:])
        self._scale = read_scale(stored)

    def row_blocks(self, size: int) -> Iterator[tuple[int, int]]:
        """Yields first and end row (exclusive) of blocks of about `size` bytes."""
        step = max(1, size // max(1, self._inner * self._source.itemsize))
        for first in range(0, self._rows, step):
            yield first, min(self._rows, first + step)

    def decode(self, content: bytes, first: int) -> memoryview:
        """Returns the bytes of the cast values.

        Args:
            content: Stored bytes of whole rows.
            first: Index of the first of these rows.
        """
        values = torch.frombuffer(bytearray(content), dtype=self._source).float().view(-1, self._inner)
        if self._scale is not None:
            multiply(values, self._scale, first)
        return values.to(self._target).reshape(-1).view(torch.uint8).numpy().data

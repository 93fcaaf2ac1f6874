"""Reads stored tensors, and gives the bytes of tensors, in blocks that fit into the processor's caches.

Reads with `pread` into buffers instead of mapping files, because mapped pages count as memory of the process.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable

import torch
from torch import Tensor

from lora_engine.checkpoints.scales import FLOATS, multiply, read_scale
from lora_engine.checkpoints.stored_tensor import StoredTensor
from lora_engine.errors import BaseModelError
from lora_engine.finite import are_finite
from lora_engine.streaming.direct_writer import read_bytes

BLOCK = 1 << 20


def as_bytes(tensor: Tensor) -> memoryview:
    """Returns the memory of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def read_tensor(source: int, stored: StoredTensor) -> Tensor:
    """Reads a tensor from an open file: in its stored dtype, which must be in `FLOATS`, or in float32 if it is scaled.

    Args:
        source: File descriptor.
        stored: The tensor.
    """
    rows = stored.shape[0] if stored.shape else 1
    return read_rows(source, stored, 0, rows).view(stored.shape)


def read_rows(source: int, stored: StoredTensor, first: int, rows: int) -> Tensor:
    """Reads rows of a tensor, starting at `first`, as `[rows, inner]`; dtype as in `read_tensor`."""
    block = torch.empty(rows, math.prod(stored.shape[1:]), dtype=FLOATS[stored.dtype])
    read_bytes(source, as_bytes(block), stored.offset + first * block.shape[1] * block.element_size())
    scale = read_scale(stored)
    return block if scale is None else multiply(block.float(), scale, first)


def refuse_not_finite(tensors: Iterable[tuple[str, StoredTensor]]) -> None:
    """Reads tensors that are copied unchanged, all of one file, and raises if a value is NaN or infinite.

    Raises:
        BaseModelError: Names the file and the first such tensor.
    """
    source, buffer = -1, bytearray(BLOCK)
    try:
        for name, stored in tensors:
            source = os.open(stored.path, os.O_RDONLY) if source < 0 else source
            for first in range(0, stored.size, BLOCK):
                view = memoryview(buffer)[: min(BLOCK, stored.size - first)]
                read_bytes(source, view, stored.offset + first)
                if not are_finite(view, stored.dtype):
                    raise not_finite_model(f"{stored.path}: tensor {name!r}")
    finally:
        if source >= 0:
            os.close(source)


def not_finite_model(where: str) -> BaseModelError:
    """Returns the error for a tensor of a model whose values are not finite."""
    return BaseModelError(
        "the model has values that are NaN or infinite",
        where=where,
        allowed="finite values",
        remedy="download or save the model again",
    )

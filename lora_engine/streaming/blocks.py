"""Reads stored tensors, and gives the bytes of tensors, in blocks that fit into the processor's caches.

Reads with `pread` into buffers instead of mapping files, because mapped pages count as memory of the process.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lora_engine.checkpoints.scales import FLOATS, multiply, read_scale
from lora_engine.checkpoints.tensor_files import StoredTensor
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

"""Reads stored tensors, and gives the bytes of tensors, in blocks that fit into the processor's caches.

Reads with `pread` into buffers instead of mapping files, because mapped pages count as memory of the process.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_engine.checkpoints.tensor_files import StoredTensor
from lora_engine.streaming.direct_writer import read_bytes

FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""Safetensors dtype name to torch dtype, for the dtypes that arithmetic supports."""
BLOCK = 1 << 20


def as_bytes(tensor: Tensor) -> memoryview:
    """Returns the memory of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def read_tensor(source: int, stored: StoredTensor) -> Tensor:
    """Reads a tensor from an open file, in its stored dtype, which must be in `FLOATS`."""
    tensor = torch.empty(stored.shape, dtype=FLOATS[stored.dtype])
    read_bytes(source, as_bytes(tensor), stored.offset)
    return tensor

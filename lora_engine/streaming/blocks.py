"""Copies bytes between files, and between files and tensors, in blocks that fit into the processor's caches.

Reads with `pread` into buffers instead of mapping files, because mapped pages count as memory of the process.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lora_engine.checkpoints.tensor_files import StoredTensor
from lora_engine.streaming.direct_writer import read_bytes, shorter_than

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
# With larger pieces the kernel searches for huge pages, which often takes longer than filling them.
_PIECE = 128 << 10
# Errors of systems and file systems that cannot copy within the kernel.
_UNSUPPORTED = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM}


def as_bytes(tensor: Tensor) -> memoryview:
    """Returns the memory of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def read_tensor(source: int, stored: StoredTensor) -> Tensor:
    """Reads a tensor from an open file, in its stored dtype, which must be in `FLOATS`."""
    tensor = torch.empty(stored.shape, dtype=FLOATS[stored.dtype])
    read_bytes(source, as_bytes(tensor), stored.offset)
    return tensor


def copy_bytes(source: int, output: int, first: int, last: int) -> None:
    """Appends the bytes from `first` to `last` (exclusive) of one open file to another, in the kernel if possible.

    Raises:
        BaseModelError: The source is too short.
    """
    done = first
    for copy in (_copy_range, _send, _read_and_write):
        try:
            while done < last:
                count = copy(source, output, done, last - done)
                if count == 0:
                    raise shorter_than(done)
                done += count
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
        else:
            return


def copy_file(source: Path, output: int) -> None:
    """Appends a file to an open one."""
    descriptor = os.open(source, os.O_RDONLY)
    try:
        copy_bytes(descriptor, output, 0, os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)


def _copy_range(source: int, output: int, offset: int, count: int) -> int:
    # Shares blocks on btrfs and xfs, and copies within the kernel on other file systems.
    if not hasattr(os, "copy_file_range"):
        raise OSError(errno.ENOSYS, "no copy_file_range")
    return os.copy_file_range(source, output, count, offset)


def _send(source: int, output: int, offset: int, count: int) -> int:
    sendfile: Callable[..., int] | None = getattr(os, "sendfile", None)
    if sendfile is None:
        raise OSError(errno.ENOSYS, "no sendfile")
    return sendfile(output, source, offset, count)


def _read_and_write(source: int, output: int, offset: int, count: int) -> int:
    return os.write(output, os.pread(source, min(count, _PIECE), offset))

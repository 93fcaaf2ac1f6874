"""Bytes from file to file and between files and tensors, in blocks that stay within the processor's caches.

Reads with `pread` into buffers instead of mapping files, since mapped pages count as memory of the process.
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
"""Torch's dtype of each dtype of safetensors that arithmetic is done on."""
BLOCK = 1 << 20
# Larger pieces make the kernel look for large pages, which on many machines takes longer than filling them.
_PIECE = 128 << 10
# Systems and file systems that cannot copy within the kernel.
_UNABLE = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM}


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def read_tensor(source: int, stored: StoredTensor) -> Tensor:
    """A whole tensor of an open file, in its own dtype, which must be among `FLOATS`."""
    tensor = torch.empty(stored.shape, dtype=FLOATS[stored.dtype])
    read_bytes(source, as_bytes(tensor), stored.offset)
    return tensor


def copy_bytes(source: int, output: int, first: int, last: int) -> None:
    """Appends the bytes from `first` up to and without `last` of one open file to another, within the kernel if it can.

    Raises:
        BaseModelError: The source ends before.
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
            if error.errno not in _UNABLE:
                raise
        else:
            return


def copy_file(source: Path, output: int) -> None:
    """Appends a whole file to an open one."""
    descriptor = os.open(source, os.O_RDONLY)
    try:
        copy_bytes(descriptor, output, 0, os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)


def _copy_range(source: int, output: int, offset: int, count: int) -> int:
    # Shares the blocks on file systems that can (btrfs, xfs) and copies within the kernel on the others.
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

"""Rewrites one safetensors file with some tensors changed; copies the bytes of all others.

The layout of the body does not change. A `Change` computes the new values of a tensor.
"""

from __future__ import annotations

import contextlib
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor

from lora_engine.checkpoints.tensor_files import StoredTensor
from lora_engine.errors import AdapterError
from lora_engine.files import atomic_write, canonical_json
from lora_engine.streaming.blocks import BLOCK, FLOATS, as_bytes
from lora_engine.streaming.direct_writer import PAGE, DirectWriter, read_bytes


class TensorChange(Protocol):
    """The change of one tensor.

    Attributes:
        is_whole: True if it needs the whole tensor at once instead of blocks of rows.
        bound: Upper bound of the change of an element; infinity if unknown.
    """

    @property
    def is_whole(self) -> bool: ...  # noqa: D102

    @property
    def bound(self) -> float: ...  # noqa: D102

    def apply(self, values: Tensor, stored: Tensor, first: int) -> None:
        """Changes a block in place.

        Args:
            values: `[rows, inner]`, float32 (float64 for a float64 tensor).
            stored: The same values in the stored dtype; for float32 and float64 the same memory as `values`.
            first: First row of the block in the tensor.
        """
        ...


Opener = Callable[[], TensorChange]
"""Creates the change of a tensor just before it is written: only its factors are in memory in float32."""
Watch = Callable[[str, int, Tensor], None]
"""Called with every written block: name of the tensor, first row, `[rows, inner]` in the tensor's dtype."""


def rewrite(
    tensors: Mapping[str, StoredTensor],
    output: Path,
    metadata: Mapping[str, str],
    changes: Mapping[str, Opener],
    watch: Watch | None = None,
) -> None:
    """Rewrites a file atomically. Equal inputs give equal bytes.

    Args:
        tensors: All tensors of one file.
        output: The new file.
        metadata: Metadata of the new file.
        changes: Tensor name to its change; the dtypes of these tensors must be in `FLOATS`.
        watch: See `Watch`; None means no calls.

    Raises:
        AdapterError: A changed value does not fit the tensor's dtype; partial files are removed.
        OSError: The disk is full; partial files are removed.
    """
    atomic_write(output, lambda file: _write(file, tensors, metadata, changes, watch))


def _write(
    file: BinaryIO,
    tensors: Mapping[str, StoredTensor],
    metadata: Mapping[str, str],
    changes: Mapping[str, Opener],
    watch: Watch | None,
) -> None:
    ordered = sorted(tensors.items(), key=lambda item: item[1].offset)
    with DirectWriter(file.fileno()) as writer:
        writer.write(_header(ordered, metadata))
        if not ordered:
            return
        with ordered[0][1].path.open("rb", buffering=0) as opened:
            source = opened.fileno()
            copied = ordered[0][1].offset
            for name, stored in ordered:
                if name not in changes:
                    continue
                writer.copy(source, copied, stored.offset)
                _write_changed(source, writer, name, stored, changes[name](), watch)
                copied = stored.offset + stored.size
            last = ordered[-1][1]
            writer.copy(source, copied, last.offset + last.size)


def _header(ordered: list[tuple[str, StoredTensor]], metadata: Mapping[str, str]) -> bytes:
    start = ordered[0][1].offset if ordered else 0
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, stored in ordered:
        first = stored.offset - start
        header[name] = {
            "dtype": stored.dtype,
            "shape": list(stored.shape),
            "data_offsets": [first, first + stored.size],
        }
    text = canonical_json(header)
    # The body keeps its offset within a page, which lets `DirectWriter.copy` copy pages.
    spaces = (start - 8 - len(text)) % PAGE if start % 8 == 0 else -len(text) % 8
    text += b" " * spaces
    return struct.pack("<Q", len(text)) + text


def _write_changed(
    source: int, writer: DirectWriter, name: str, stored: StoredTensor, change: TensorChange, watch: Watch | None
) -> None:
    dtype = FLOATS[stored.dtype]
    rows = stored.shape[0] if stored.shape else 1
    inner = math.prod(stored.shape[1:])
    stride = inner * dtype.itemsize
    step = rows if change.is_whole else max(1, min(rows, BLOCK // max(stride, 1)))
    work = torch.empty(step, inner) if dtype.itemsize < 4 else None
    may_overflow = change.bound >= _safe_change(dtype)
    for first in range(0, rows, step):
        count = min(step, rows - first)
        with _next_block(writer, count * stride, dtype) as flat:
            read_bytes(source, as_bytes(flat), stored.offset + first * stride)
            block = flat.view(count, inner)
            values = block if work is None else work[:count].copy_(block)
            change.apply(values, block, first)
            if work is not None:
                block.copy_(values)
            if may_overflow:
                _check_finite(block, f"{stored.path}: tensor {name!r}")
            if watch is not None:
                watch(name, first, block)


@contextlib.contextmanager
def _next_block(writer: DirectWriter, size: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yields a tensor for the next bytes of the file, in the writer's memory if it is aligned there."""
    if writer.is_aligned(size, dtype.itemsize):
        with writer.block(size) as raw:
            yield raw.view(dtype)
    else:
        block = torch.empty(size // dtype.itemsize, dtype=dtype)
        yield block
        writer.write(as_bytes(block))


def _check_finite(block: Tensor, where: str) -> None:
    values = block.float() if block.element_size() == 1 else block
    if not all(math.isfinite(float(end)) for end in torch.aminmax(values)):
        raise AdapterError(
            f"a changed value is not finite in {block.dtype}",
            where=where,
            allowed="a smaller weight of the adapters, or a model in float32 or bfloat16",
            remedy="lower the weights",
        )


def _safe_change(dtype: torch.dtype) -> float:
    """Returns half of the spacing of the largest numbers of a dtype; smaller changes cannot overflow."""
    limits = torch.finfo(dtype)
    return limits.max / (2 - limits.eps) * limits.eps / 2

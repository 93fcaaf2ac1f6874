"""One safetensors file written anew with some of its tensors changed; all the others are copied as bytes.

The layout of the body stays; what is done to a tensor is a `Change`, of which this module knows nothing more.
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


class Change(Protocol):
    """What is done to one tensor.

    Attributes:
        is_whole: Whether it has to see the whole tensor at once, not one block of rows after the other.
        bound: No element is changed by more than this; infinity where that is not known.
    """

    @property
    def is_whole(self) -> bool: ...  # noqa: D102

    @property
    def bound(self) -> float: ...  # noqa: D102

    def apply(self, values: Tensor, stored: Tensor, first: int) -> None:
        """Changes a block in place.

        Args:
            values: `[rows, inner]`, float32 (float64 for a float64 tensor).
            stored: The same in the tensor's own dtype; of float32 and float64 the same memory as `values`.
            first: Row of the tensor that the block begins with.
        """
        ...


Opener = Callable[[], Change]
"""Makes a change when its tensor's turn comes, so that the factors of one tensor alone are at hand in float32."""
Watch = Callable[[str, int, Tensor], None]
"""Told of every block that was written: name of the tensor, first row, `[rows, inner]` in the tensor's dtype."""


def rewrite(
    tensors: Mapping[str, StoredTensor],
    output: Path,
    metadata: Mapping[str, str],
    changes: Mapping[str, Opener],
    watch: Watch | None = None,
) -> None:
    """Writes a file anew, atomically. The same input gives the same bytes.

    Args:
        tensors: All tensors of one file.
        output: The new file.
        metadata: Its metadata.
        changes: By tensor; every one of these has a dtype among `FLOATS`.
        watch: See `Watch`.

    Raises:
        AdapterError: A changed value does not fit the tensor's dtype; nothing is left behind.
        OSError: The disk is full; nothing is left behind.
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
    with DirectWriter(file.fileno()) as stage:
        stage.write(_header(ordered, metadata))
        if not ordered:
            return
        with ordered[0][1].path.open("rb", buffering=0) as opened:
            source = opened.fileno()
            copied = ordered[0][1].offset
            for name, stored in ordered:
                if name not in changes:
                    continue
                stage.copy(source, copied, stored.offset)
                _write_changed(source, stage, name, stored, changes[name](), watch)
                copied = stored.offset + stored.size
            last = ordered[-1][1]
            stage.copy(source, copied, last.offset + last.size)


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
    # The body keeps its place within a page, so that what is only copied can go by pages.
    spaces = (start - 8 - len(text)) % PAGE if start % 8 == 0 else -len(text) % 8
    text += b" " * spaces
    return struct.pack("<Q", len(text)) + text


def _write_changed(
    source: int, stage: DirectWriter, name: str, stored: StoredTensor, change: Change, watch: Watch | None
) -> None:
    dtype = FLOATS[stored.dtype]
    rows = stored.shape[0] if stored.shape else 1
    inner = math.prod(stored.shape[1:])
    stride = inner * dtype.itemsize
    step = rows if change.is_whole else max(1, min(rows, BLOCK // max(stride, 1)))
    work = torch.empty(step, inner) if dtype.itemsize < 4 else None
    may_overflow = change.bound >= _harmless(dtype)
    for first in range(0, rows, step):
        count = min(step, rows - first)
        with _next_block(stage, count * stride, dtype) as flat:
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
def _next_block(stage: DirectWriter, size: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """The next bytes of the file as numbers to be filled: in the stage's own memory where they fit."""
    if stage.is_aligned(size, dtype.itemsize):
        with stage.block(size) as raw:
            yield raw.view(dtype)
    else:
        block = torch.empty(size // dtype.itemsize, dtype=dtype)
        yield block
        stage.write(as_bytes(block))


def _check_finite(block: Tensor, where: str) -> None:
    wide = block.float() if block.element_size() == 1 else block
    if not all(math.isfinite(float(end)) for end in torch.aminmax(wide)):
        raise AdapterError(
            f"a value is not finite in {block.dtype} any more",
            where=where,
            allowed="a smaller weight of the adapters, or a model in float32 or bfloat16",
            remedy="lower the weights",
        )


def _harmless(dtype: torch.dtype) -> float:
    """A change below half of the spacing of the largest numbers never leads beyond them."""
    limits = torch.finfo(dtype)
    return limits.max / (2 - limits.eps) * limits.eps / 2

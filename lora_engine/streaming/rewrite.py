"""Rewrites one safetensors file with some tensors changed; copies the bytes of all others.

The layout of the body does not change. A `Change` computes the new values of a tensor.
"""

from __future__ import annotations

import contextlib
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lora_engine.checkpoints.scales import FLOATS, multiply, read_scale
from lora_engine.checkpoints.stored_tensor import StoredTensor
from lora_engine.errors import BaseModelError, EngineError
from lora_engine.files import atomic_write, canonical_json
from lora_engine.finite import are_finite, is_finite, not_finite
from lora_engine.streaming.blocks import BLOCK, as_bytes, not_finite_model, read_rows, refuse_not_finite
from lora_engine.streaming.direct_writer import PAGE, DirectWriter, read_bytes
from lora_engine.streaming.rounding import Rounding, cast_into
from lora_engine.streaming.tensor_change import Opener, TensorChange, fitting_scale

Watch = Callable[[str, int, Tensor], None]
"""Called with every written block: name of the tensor, first row, `[rows, inner]` in the tensor's dtype or, if it is
scaled, as float32 values."""


def rewrite(
    tensors: Mapping[str, StoredTensor],
    output: Path,
    metadata: Mapping[str, str],
    changes: Mapping[str, Opener],
    watch: Watch | None = None,
    rounding: Rounding | None = None,
) -> None:
    """Rewrites a file atomically. Equal inputs give equal bytes.

    Args:
        tensors: All tensors of one file.
        output: The new file.
        metadata: Metadata of the new file.
        changes: Tensor name to its change; the dtypes of these tensors must be in `FLOATS`.
        watch: See `Watch`; None means no calls.
        rounding: Casts the changed values and measures what is kept; None rounds to nearest.

    Raises:
        AdapterError: A changed value is NaN or does not fit the tensor's dtype; partial files are removed.
        BaseModelError: A tensor holds NaN or infinity, or a scale has to be raised and is in another file.
        OSError: The disk is full; partial files are removed.
    """
    rounding = Rounding() if rounding is None else rounding
    refuse_not_finite((name, stored) for name, stored in tensors.items() if name not in changes)
    atomic_write(output, lambda file: _write(file, tensors, metadata, changes, watch, rounding))


def _write(
    file: BinaryIO,
    tensors: Mapping[str, StoredTensor],
    metadata: Mapping[str, str],
    changes: Mapping[str, Opener],
    watch: Watch | None,
    rounding: Rounding,
) -> None:
    ordered = sorted(tensors.items(), key=lambda item: item[1].offset)
    with DirectWriter(file.fileno()) as writer:
        writer.write(_header(ordered, metadata))
        if not ordered:
            return
        with ordered[0][1].path.open("rb", buffering=0) as opened:
            source = opened.fileno()
            copied = ordered[0][1].offset
            scales = _raised_scales(source, tensors, changes, rounding)
            for name, stored in ordered:
                scale = scales.get(stored.offset) if stored.size else None
                if name not in changes and scale is None:
                    continue
                writer.copy(source, copied, stored.offset)
                if scale is not None:
                    writer.write(as_bytes(scale.to(FLOATS[stored.dtype])))
                else:
                    raised = scales.get(stored.scale.offset) if stored.scale else None
                    block = _ChangedTensor(name, stored, changes[name](), raised, rounding)
                    block.write(source, writer, watch)
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


def _raised_scales(
    source: int, tensors: Mapping[str, StoredTensor], changes: Mapping[str, Opener], rounding: Rounding
) -> dict[int, Tensor]:
    """Returns the scales that have to be raised, by their offset in the file."""
    scales = {}
    for name, open_change in changes.items():
        stored = tensors[name]
        scale = None if stored.scale is None else fitting_scale(source, stored, open_change())
        if scale is None or stored.scale is None:
            continue
        if stored.scale.path != stored.path:
            raise BaseModelError(
                "the scale has to be raised, and is in another shard than its weight",
                where=f"{stored.path}: tensor {name!r}",
                allowed="changed values that fit with the scale, or a scale in the weight's file",
                remedy="remove the quantization first: loraline convert MODEL --to plain",
            )
        scales[stored.scale.offset] = scale
    rounding.raised += len(scales)
    return scales


class _ChangedTensor:
    """Writes one changed tensor."""

    def __init__(
        self, name: str, stored: StoredTensor, change: TensorChange, raised: Tensor | None, rounding: Rounding
    ) -> None:
        self._name, self._stored, self._change, self._rounding = name, stored, change, rounding
        self._dtype = FLOATS[stored.dtype]
        self._old = read_scale(stored)
        self._new = self._old if raised is None else raised
        self._draws = rounding.source_for(name)

    def write(self, source: int, writer: DirectWriter, watch: Watch | None) -> None:
        """Reads, changes and writes the tensor in blocks of rows."""
        rows = self._stored.shape[0] if self._stored.shape else 1
        inner = math.prod(self._stored.shape[1:])
        stride = inner * self._dtype.itemsize
        step = rows if self._change.is_whole else max(1, min(rows, BLOCK // max(stride, 1)))
        is_cast = self._dtype.itemsize < 4 or self._old is not None
        work = torch.empty(step, inner) if is_cast else None
        for first in range(0, rows, step):
            count = min(step, rows - first)
            with _next_block(writer, count * stride, self._dtype) as flat:
                read_bytes(source, as_bytes(flat), self._stored.offset + first * stride)
                block = flat.view(count, inner)
                if work is None:
                    self._change.apply(block, block, first)
                else:
                    self._apply(block, work[:count], first)
                if not are_finite(as_bytes(flat), self._stored.dtype):
                    raise self._not_finite(source, block, first)
                if watch is not None:
                    watch(self._name, first, self._decoded(block, self._new, first))

    def _apply(self, block: Tensor, values: Tensor, first: int) -> None:
        """Changes a block in place by way of its values in float32."""
        rows = self._rounding.measured_rows(block)
        values.copy_(block)
        if self._old is None:
            before = block[rows].clone()
            self._change.apply(values, block, first)
        else:
            before = multiply(values, self._old, first)[rows].clone()
            self._change.apply(values, values, first)
        is_scratch = self._draws is not None or self._new is not None
        wanted = values[rows].clone() if is_scratch else values[rows]
        if self._new is not None:
            multiply(values, self._new.reciprocal(), first)
        elif block.element_size() == 1:
            self._check_range(values)
        cast_into(block, values, self._draws)
        if len(wanted):
            self._rounding.measure(before, wanted, self._decoded(block, self._new, first)[rows])

    def _check_range(self, values: Tensor) -> None:
        # torch casts larger values to the maximum of float8_e4m3fn, so they would not be found afterwards.
        limits = torch.finfo(self._dtype)
        if not float(values.abs().max()) <= limits.max * (1 + limits.eps / 4):
            values.masked_fill_(values.abs() > limits.max, math.nan)

    def _not_finite(self, source: int, block: Tensor, first: int) -> EngineError:
        where = f"{self._stored.path}: tensor {self._name!r}"
        before = read_rows(source, self._stored, first, len(block))
        if not is_finite(before):
            return not_finite_model(where)
        values = before.to(torch.float64)
        self._change.apply(values, before, first)
        return not_finite(where, block, values)

    def _decoded(self, block: Tensor, scale: Tensor | None, first: int) -> Tensor:
        return block if scale is None else multiply(block.float(), scale, first)


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

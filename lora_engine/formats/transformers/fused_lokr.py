"""Row rules of fused layers for Kronecker products, and other exact forms of their rows.

A part whose borders are borders of blocks is a LoKr of its own. Any other part is a `LokrRowsDelta`, which shares the
factors of the product, so the parts are fused again without loss.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import numpy as np

from lora_engine.adapters import Adapter, Delta, DoraDelta, FullDelta, LokrDelta, LokrRowsDelta, LoraDelta, same_delta
from lora_engine.adapters.dora import Inner
from lora_engine.formats.transformers.fused import (
    Index,
    RowRule,
    Rows,
    UnsplittableError,
    indices,
    matrix_shape,
    refusal,
    required,
    row_rules,
    same_tensor,
    scaled_up,
    stack_rows,
)
from lora_engine.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

_MAX_ELEMENTS = 1 << 27  # of a LoRA that replaces rows of a LoKr


def with_exact_rows(adapter: Adapter, kinds: Collection[str]) -> Adapter:
    """Returns an adapter with the same differences and without `LokrRowsDelta`.

    Rows within one block become a LoKr if the format has the kind, other rows a LoRA, or a full difference if its rank
    would be full. These can be many times as large.

    Args:
        adapter: The adapter.
        kinds: Names of the kinds that the format can hold.

    Raises:
        AdapterError: A LoRA would be too large.
    """
    modules = dict(adapter.modules)
    for name, delta in modules.items():
        if rows_of(delta) is not None:
            try:
                modules[name] = _exact(delta, kinds)
            except UnsplittableError as error:
                raise refusal(delta, str(error), name) from error
    return replace(adapter, modules=modules)


def rows_of(delta: Delta) -> LokrRowsDelta | None:
    """Returns the rows of a LoKr that a delta is, or that are the direction of a DoRA; else None."""
    inner = delta.inner if isinstance(delta, DoraDelta) else delta
    return inner if isinstance(inner, LokrRowsDelta) else None


def _exact(delta: Delta, kinds: Collection[str]) -> Delta:
    if isinstance(delta, DoraDelta):
        inner = _exact(delta.inner, kinds)
        if isinstance(inner, FullDelta):
            raise UnsplittableError("the direction of a DoRA would have full rank")
        return delta.with_inner(cast(Inner, inner))
    if not isinstance(delta, LokrRowsDelta):
        return delta
    blocks, offset = delta.blocks()
    if "lokr" not in kinds or blocks.left_sides[0] > 1 or blocks.right_core is not None:
        return _as_lora(delta.whole, np.arange(delta.start, delta.stop))
    name = "right" if blocks.right is not None else "right_up"
    rows = blocks.factors()[name][offset : offset + delta.stop - delta.start]
    return blocks.with_factors({**blocks.factors(), name: rows.clone()})


def _take(delta: LokrDelta, index: Index) -> Delta:
    size = _right_of(delta).shape[0]
    if len(index) % size == 0:
        blocks = index.reshape(-1, size)
        starts = blocks[:, 0]
        if (starts % size == 0).all() and np.array_equal(blocks, starts[:, None] + np.arange(size)):
            name = "left" if delta.left is not None else "left_up"
            return delta.with_factors({**delta.factors(), name: delta.factors()[name][starts // size].clone()})
    start, stop = int(index[0]), int(index[-1]) + 1
    if np.array_equal(index, np.arange(start, stop)):
        return LokrRowsDelta(delta, start, stop)
    return _as_lora(delta, index)


def _split(delta: LokrDelta, rows: Rows) -> list[Delta | None]:
    parts = [_take(delta, index) for index in indices(rows)]
    if all(isinstance(part, LokrDelta) for part in parts):
        return [*parts]
    # One kind for all parts, which the layer needs to be fused again.
    return [LokrRowsDelta(delta, int(index[0]), int(index[-1]) + 1) for index in indices(rows)]


def _right_of(delta: LokrDelta) -> Tensor:
    right = delta.right if delta.right is not None else required(delta.right_up)
    if delta.right_core is not None or right.dim() != 2:
        raise UnsplittableError("it is of a convolution")
    return right


def _as_lora(delta: LokrDelta, index: Index) -> LoraDelta | FullDelta:
    """Returns rows that begin or end inside a block as a LoRA: `kron(L, u d) = kron(I, u) kron(L, d)`.

    Each entry is one product. Rows whose LoRA would have full rank are returned as a full difference.
    """
    size = _right_of(delta).shape[0]
    touched = np.unique(index // size)
    left = delta.dense_left(torch.float32 if delta.left is None else delta.left.dtype)[touched]
    if delta.right is not None:
        up, down = delta.right, torch.eye(delta.right.shape[1], dtype=delta.right.dtype)
    else:
        up, down = required(delta.right_up), required(delta.right_down)
    rank, columns = len(touched) * down.shape[0], left.shape[1] * down.shape[1]
    if min(rank, len(index), columns) * (len(index) + columns) > _MAX_ELEMENTS:
        raise UnsplittableError(
            "the borders of the parts are inside its blocks, and the expanded rows would be too large"
        )
    positions = np.searchsorted(touched, index // size) * size + index % size
    if rank >= min(len(index), columns):
        dense = torch.kron(left, up @ down)[positions]
        return FullDelta(scaled_up(dense, delta.scale))
    ups = torch.kron(torch.eye(len(touched), dtype=up.dtype), up)[positions]
    return LoraDelta(torch.kron(left, down), ups, delta.scale * rank)


def _fuse(parts: Sequence[LokrDelta | None], rows: Rows) -> LokrDelta:
    present = [part for part in parts if part is not None]
    first = present[0]
    shared = ("left_down", "right", "right_up", "right_down", "right_core")
    for part in present:
        if part.alpha != first.alpha or not all(
            same_tensor(getattr(part, name), getattr(first, name)) for name in shared
        ):
            raise UnsplittableError("the parts do not share their right factor")
    size = first.right_sides[0]
    if any(count % size for count in rows):
        raise UnsplittableError(f"the rows of a part are no multiple of {size}, the rows of the right factor")
    name = "left" if first.left is not None else "left_up"
    lefts = [None if part is None else getattr(part, name) for part in parts]
    whole = required(stack_rows(lefts, [count // size for count in rows]))
    return first.with_factors({**first.factors(), name: whole})


def _fuse_rows(parts: Sequence[LokrRowsDelta | None], rows: Rows) -> LokrDelta:
    expected, first = 0, parts[0]
    for part, count in zip(parts, rows, strict=True):
        if first is None or part is None or (part.start, part.stop) != (expected, expected + count):
            raise UnsplittableError("the parts are not consecutive rows of one product")
        if not same_delta(part.whole, first.whole):
            raise UnsplittableError("the parts are rows of several products")
        expected += count
    if first is None or expected != first.whole.sides[0]:
        raise UnsplittableError("the parts are not all rows of the product")
    return first.whole


def _take_of_rows(delta: LokrRowsDelta, index: Index) -> Delta:
    return _take(delta.whole, index + delta.start)


row_rules.add("lokr", RowRule(matrix_shape, _take, _fuse, _split))
row_rules.add("lokr-rows", RowRule(matrix_shape, _take_of_rows, _fuse_rows))

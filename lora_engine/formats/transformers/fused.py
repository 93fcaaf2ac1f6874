"""Splits and fuses the deltas of fused layers: one linear layer of the original code is several in diffusers.

For example q, k and v are parts of one layer. The parts are consecutive rows of the weight. `split` and `fuse` are
exact and refuse what a kind cannot do exactly. Each kind has a `RowRule`; the families' tables of names list the fused
layers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lora_engine.adapters import Delta, FullDelta, LoraDelta
from lora_engine.errors import AdapterError
from lora_engine.lazy_torch import torch
from lora_engine.registries import Registry

if TYPE_CHECKING:
    from torch import Tensor

Rows = Sequence[int]
"""Number of rows of each part, in order."""
Index = NDArray[np.int64]
"""Indices of rows; numpy's, because mapped tensors are split without torch."""


@dataclass(frozen=True)
class RowRule:
    """Row operations on the deltas of one kind.

    Attributes:
        shape: Returns rows and columns of the weight by the factors; 0 columns means unknown, None means that the delta
            acts only on the inputs, for any number of rows.
        take: Returns the delta of the given row indices; of another kind if only that is exact.
        fuse: Returns one delta for the parts (None for a part without a delta) and their rows.
        split: Returns the deltas of the parts, None for a part that is all zero. None uses `take` for each part.
    """

    shape: Callable[[Any], tuple[int, int] | None]
    take: Callable[[Any, Index], Delta]
    fuse: Callable[[Sequence[Any], Rows], Delta]
    split: Callable[[Any, Rows], list[Delta | None]] | None = None


row_rules: Registry[RowRule] = Registry("rule for fused layers")


class UnsplittableError(ValueError):
    """Raised if a rule cannot do this exactly; `split` and `fuse` turn it into an `AdapterError` with the location."""


def delta_shape(delta: Delta) -> tuple[int, int] | None:
    """Returns rows and columns of a delta's weight, None if its kind has no rule or its factors show no rows."""
    return row_rules[delta.kind].shape(delta) if delta.kind in row_rules else None


def split(delta: Delta, rows: Rows, where: str) -> list[Delta | None]:
    """Returns the deltas of a fused layer's parts; None for a part that the delta does not change.

    Args:
        delta: The delta of the fused layer.
        rows: Rows of each part; their sum is the rows of the weight.
        where: Location for errors.

    Raises:
        AdapterError: The kind's factors cannot be split exactly.
    """
    rule = _rule(delta, where)
    try:
        if rule.split is not None:
            return rule.split(delta, rows)
        return [rule.take(delta, index) for index in indices(rows)]
    except UnsplittableError as error:
        raise refusal(delta, str(error), where) from error


def fuse_layers(parts: Sequence[Delta | None], rows: Rows, where: str) -> Delta:
    """Returns the delta of a fused layer from those of its parts; `split` is the inverse.

    Raises:
        AdapterError: The parts are of several kinds, or their factors cannot be fused exactly.
    """
    present = [part for part in parts if part is not None]
    if len({part.kind for part in present}) > 1:
        kinds = ", ".join(sorted({part.kind for part in present}))
        raise AdapterError(
            f"the parts of this fused layer are of several kinds ({kinds})",
            where=where,
            allowed="one kind for all of q, k and v",
            remedy="choose a format with diffusers' names",
        )
    try:
        return _rule(present[0], where).fuse(parts, rows)
    except UnsplittableError as error:
        raise refusal(present[0], str(error), where) from error


def swap_halves(delta: Delta, where: str) -> Delta:
    """Returns the delta with the halves of its rows swapped: diffusers swapped shift and scale of the last norms.

    Raises:
        AdapterError: As `split`.
    """
    rule = _rule(delta, where)
    rows = (rule.shape(delta) or (0, 0))[0]
    try:
        return rule.take(delta, np.roll(np.arange(rows), rows // 2))
    except UnsplittableError as error:
        raise refusal(delta, str(error), where) from error


def indices(rows: Rows) -> list[Index]:
    """Returns the row indices of each part."""
    return np.split(np.arange(sum(rows)), np.cumsum(rows)[:-1])


def _rule(delta: Delta, where: str) -> RowRule:
    if delta.kind in row_rules:
        return row_rules[delta.kind]
    raise refusal(delta, f"the rows of kind {delta.kind!r} have no exact rule", where)


def refusal(delta: Delta, problem: str, where: str) -> AdapterError:
    """Returns the error for a delta that cannot be converted exactly between a fused layer and its parts."""
    return AdapterError(
        f"the adapter of kind {delta.kind!r} cannot be converted exactly between the fused layer of the original"
        f" names and its parts in diffusers: {problem}",
        where=where,
        allowed=f"the kinds {', '.join(row_rules)}, if their factors end at the borders of the parts",
        remedy="convert it with a format that keeps the names of the layers, or to kind lora",
    )


def _take_lora(delta: LoraDelta, index: Index) -> LoraDelta:
    bias = None if delta.bias is None else delta.bias[index].clone()
    return replace(delta, up=delta.up[index].clone(), bias=bias)


def _split_lora(delta: LoraDelta, rows: Rows) -> list[Delta | None]:
    ups = split_rows(delta.up, rows)
    biases = [None] * len(rows) if delta.bias is None else split_rows(delta.bias, rows)
    used = np.stack([used_columns(up) for up in ups])
    blocks = rank_blocks(used) if delta.mid is None else None
    parts: list[Delta | None] = []
    for index, (up, bias) in enumerate(zip(ups, biases, strict=True)):
        block = slice(None) if blocks is None else blocks[index]
        is_zero = bool(used.any()) and not used[index].any()
        if is_zero and (bias is None or not bool(bias.any())):
            parts.append(None)
            continue
        down = delta.down[block].clone()
        alpha = delta.alpha * down.shape[0] / delta.rank
        parts.append(LoraDelta(down, up[:, block].clone(), alpha, delta.mid, None if bias is None else bias.clone()))
    return parts


def split_rows(tensor: Tensor, rows: Rows) -> Sequence[Tensor]:
    """Returns views of consecutive rows of these numbers."""
    ends = itertools.accumulate(rows)
    return [tensor[end - size : end] for end, size in zip(ends, rows, strict=True)]


def used_columns(matrix: Tensor) -> NDArray[np.bool_]:
    """Returns True for each column with a value that is not 0; further dimensions are columns, too."""
    used: NDArray[np.bool_] = matrix.flatten(1).ne(0).any(0).numpy()
    return used


def rank_blocks(used: NDArray[np.bool_]) -> list[slice] | None:
    """Returns the block of ranks of each part; None if parts share ranks.

    Args:
        used: `[parts, rank]`, True if a part's rows of `up` have a nonzero value in this column.
    """
    parts, rank = used.shape
    if (used.sum(0) > 1).any() or not used.any():
        return None
    if rank % parts == 0:
        size = rank // parts
        equal = [slice(index * size, (index + 1) * size) for index in range(parts)]
        if all(row[block].sum() == row.sum() for row, block in zip(used, equal, strict=True)):
            return equal
    # Blocks of several sizes, in the order of the parts; an unused column goes to the block before it.
    first = [int(np.flatnonzero(row)[0]) if row.any() else rank for row in used]
    last = [int(np.flatnonzero(row)[-1]) if row.any() else -1 for row in used]
    nonzero = [part for part in range(parts) if last[part] >= 0]
    if any(last[part] >= first[following] for part, following in itertools.pairwise(nonzero)):
        return None
    starts = [0, *(first[part] for part in nonzero[1:]), rank]
    blocks = {part: slice(starts[number], starts[number + 1]) for number, part in enumerate(nonzero)}
    return [blocks.get(part, slice(None)) for part in range(parts)]


def _fuse_lora(parts: Sequence[LoraDelta | None], rows: Rows) -> LoraDelta:
    present = [part for part in parts if part is not None]
    if any(part.mid is not None for part in present):
        raise UnsplittableError("it has a Tucker core")
    dtype = joint_dtype([part.up for part in present])
    bias = stack_rows([None if part is None else part.bias for part in parts], rows)
    if _have_same_down(present):
        first = present[0]
        up = stack_rows([None if part is None else part.up.flatten(1) for part in parts], rows)
        return LoraDelta(first.down, first.up if up is None else up, first.alpha, None, bias)
    is_same_scale = len({part.scale for part in present}) == 1
    ups = [None if part is None else part.up.flatten(1) for part in parts]
    if not is_same_scale:
        ups = [
            None if up is None or part is None else scaled_up(up, part.scale)
            for up, part in zip(ups, parts, strict=True)
        ]
    rank = sum(part.rank for part in present)
    down = torch.cat([part.down.to(dtype) for part in present])
    alpha = present[0].alpha * rank / present[0].rank if is_same_scale else float(rank)
    return LoraDelta(down, block_rows(ups, rows), alpha, None, bias)


def _have_same_down(parts: Sequence[LoraDelta]) -> bool:
    first = parts[0]
    return all(
        part.alpha == first.alpha and part.down.dtype == first.down.dtype and torch.equal(part.down, first.down)
        for part in parts
    )


def scaled_up(up: Tensor, scale: float) -> Tensor:
    """Returns `up` times a scale in its dtype; raises `UnsplittableError` on overflow."""
    folded = up.float().mul(scale).to(up.dtype)
    if not bool(folded.isfinite().all()):
        raise UnsplittableError(f"the scale {scale!r} cannot be folded into {up.dtype}: a value would overflow")
    return folded


def stack_rows(tensors: Sequence[Tensor | None], rows: Rows) -> Tensor | None:
    """Returns the tensors stacked by rows, with zeros for missing ones; None if all are missing."""
    present = [tensor for tensor in tensors if tensor is not None]
    if not present:
        return None
    dtype, inner = joint_dtype(present), present[0].shape[1:]
    sized = zip(tensors, rows, strict=True)
    return torch.cat(
        [torch.zeros(size, *inner, dtype=dtype) if part is None else part.to(dtype) for part, size in sized]
    )


def block_rows(tensors: Sequence[Tensor | None], rows: Rows) -> Tensor:
    """Returns the block-diagonal matrix of the tensors."""
    present = [tensor for tensor in tensors if tensor is not None]
    whole = torch.zeros(sum(rows), sum(tensor.shape[1] for tensor in present), dtype=joint_dtype(present))
    row = column = 0
    for tensor, size in zip(tensors, rows, strict=True):
        if tensor is not None:
            whole[row : row + size, column : column + tensor.shape[1]] = tensor
            column += tensor.shape[1]
        row += size
    return whole


def same_tensor(first: Tensor | None, second: Tensor | None) -> bool:
    """Returns True if dtype and values of two factors are equal, or both are missing."""
    if first is None or second is None:
        return first is second
    return first is second or (first.dtype == second.dtype and torch.equal(first, second))


def required(tensor: Tensor | None) -> Tensor:
    """Returns a factor that a valid delta has; raises `UnsplittableError` if it is None."""
    if tensor is None:
        raise UnsplittableError("a factor is missing")
    return tensor


def joint_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """Returns the dtype that holds the values of all tensors."""
    dtype = tensors[0].dtype
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _full_shape(delta: FullDelta) -> tuple[int, int]:
    if delta.diff is None:
        return (0 if delta.bias is None else delta.bias.shape[0]), 0
    flat = delta.diff.flatten(1) if delta.diff.dim() > 1 else delta.diff[:, None]
    return flat.shape[0], flat.shape[1]


def _take_full(delta: FullDelta, index: Index) -> FullDelta:
    return delta.with_factors({name: factor[index].clone() for name, factor in delta.factors().items()})


def _split_full(delta: FullDelta, rows: Rows) -> list[Delta | None]:
    parts = [_take_full(delta, index) for index in indices(rows)]
    nonzero = [any(bool(factor.any()) for factor in part.factors().values()) for part in parts]
    return [part if keep or not any(nonzero) else None for part, keep in zip(parts, nonzero, strict=True)]


def _fuse_full(parts: Sequence[FullDelta | None], rows: Rows) -> FullDelta:
    diff = stack_rows([None if part is None else part.diff for part in parts], rows)
    return FullDelta(diff, stack_rows([None if part is None else part.bias for part in parts], rows))


def matrix_shape(delta: Delta) -> tuple[int, int] | None:
    """Returns rows and columns of the weight, for kinds whose factors determine its shape."""
    shape = delta.weight_shape
    return None if shape is None else (shape[0], math.prod(shape[1:]))


row_rules.add("lora", RowRule(matrix_shape, _take_lora, _fuse_lora, _split_lora))
row_rules.add("full", RowRule(_full_shape, _take_full, _fuse_full, _split_full))

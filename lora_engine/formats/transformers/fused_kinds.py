"""Row rules of fused layers for the kinds beyond LoRA and full (see `fused`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from lora_engine.adapters import (
    Delta,
    DoraDelta,
    GloraDelta,
    Ia3Delta,
    LohaDelta,
    OftDelta,
    OftPartsDelta,
)
from lora_engine.adapters.dora import Inner
from lora_engine.adapters.peft_oft import PeftOftDelta
from lora_engine.adapters.replacement import ReplacementDelta
from lora_engine.formats.transformers.fused import (
    Index,
    RowRule,
    Rows,
    UnsplittableError,
    block_rows,
    indices,
    matrix_shape,
    rank_blocks,
    required,
    row_rules,
    same_tensor,
    scaled_up,
    stack_rows,
    used_columns,
)
from lora_engine.lazy_torch import torch

if TYPE_CHECKING:
    pass

_T = TypeVar("_T")


def _take_loha(delta: LohaDelta, index: Index) -> LohaDelta:
    if delta.core1 is not None:
        raise UnsplittableError("it has Tucker cores")
    return replace(delta, up1=delta.up1[index].clone(), up2=delta.up2[index].clone())


def _split_loha(delta: LohaDelta, rows: Rows) -> list[Delta | None]:
    taken = [_take_loha(delta, index) for index in indices(rows)]
    nonzero = [bool(part.up1.any()) and bool(part.up2.any()) for part in taken]
    blocks = rank_blocks(np.stack([used_columns(part.up1) | used_columns(part.up2) for part in taken]))
    parts: list[Delta | None] = []
    for number, part in enumerate(taken):
        if any(nonzero) and not nonzero[number]:
            parts.append(None)
            continue
        block = slice(None) if blocks is None else blocks[number]
        narrow = {name: getattr(part, name)[:, block].clone() for name in ("up1", "up2")}
        narrow |= {name: getattr(part, name)[block].clone() for name in ("down1", "down2")}
        alpha = delta.alpha * narrow["down1"].shape[0] / delta.rank
        parts.append(LohaDelta(**narrow, alpha=alpha))
    return parts


def _fuse_loha(parts: Sequence[LohaDelta | None], rows: Rows) -> LohaDelta:
    present = [part for part in parts if part is not None]
    first = present[0]
    if any(part.core1 is not None for part in present):
        raise UnsplittableError("it has Tucker cores")
    same = all(same_tensor(part.down1, first.down1) and same_tensor(part.down2, first.down2) for part in present)
    if same and len({part.alpha for part in present}) == 1:
        ups = [stack_rows([None if part is None else getattr(part, n) for part in parts], rows) for n in ("up1", "up2")]
        return replace(first, up1=required(ups[0]), up2=required(ups[1]))
    # The entrywise product of block-diagonal matrices is block-diagonal, so both products can be.
    is_same_scale = len({part.scale for part in present}) == 1
    rank = sum(part.rank for part in present)
    firsts = [None if p is None else (p.up1 if is_same_scale else scaled_up(p.up1, p.scale)) for p in parts]
    return LohaDelta(
        up1=block_rows(firsts, rows),
        down1=torch.cat([part.down1 for part in present]),
        up2=block_rows([None if part is None else part.up2 for part in parts], rows),
        down2=torch.cat([part.down2 for part in present]),
        alpha=first.alpha * rank / first.rank if is_same_scale else float(rank),
    )


def _dora_shape(delta: DoraDelta) -> tuple[int, int] | None:
    return row_rules[delta.inner.kind].shape(delta.inner)


def _take_dora(delta: DoraDelta, index: Index) -> DoraDelta:
    if delta.axis == 1:
        raise UnsplittableError("its magnitudes are per input, each over the rows of all parts")
    inner = row_rules[delta.inner.kind].take(delta.inner, index)
    if not isinstance(inner, Inner):
        raise UnsplittableError("its direction cannot be split within its kind")
    return replace(delta.with_inner(inner), magnitude=delta.magnitude[index].clone())


def _split_dora(delta: DoraDelta, rows: Rows) -> list[Delta | None]:
    parts: list[Delta | None] = [_take_dora(delta, index) for index in indices(rows)]
    split = row_rules[delta.inner.kind].split
    narrow = [None] * len(rows) if split is None else split(delta.inner, rows)
    # A part with an unchanged direction still has magnitudes.
    return [
        part.with_inner(inner) if isinstance(part, DoraDelta) and isinstance(inner, Inner) else part
        for part, inner in zip(parts, narrow, strict=True)
    ]


def _fuse_dora(parts: Sequence[DoraDelta | None], rows: Rows) -> DoraDelta:
    present = _all_present(parts, "magnitudes")
    if any(part.axis == 1 for part in present):
        raise UnsplittableError(
            "its magnitudes are per input, and those of a fused layer are over the rows of all parts"
        )
    if len({part.inner.kind for part in present}) > 1:
        raise UnsplittableError("the directions of its parts are of several kinds")
    inner = row_rules[present[0].inner.kind].fuse([part.inner for part in present], rows)
    if not isinstance(inner, Inner):
        raise UnsplittableError("its direction cannot be fused within its kind")
    return replace(present[0].with_inner(inner), magnitude=torch.cat([part.magnitude for part in present]))


def _ia3_shape(delta: Ia3Delta) -> tuple[int, int] | None:
    return None if delta.axis == "input" else (delta.scale.numel(), 0)


def _take_ia3(delta: Ia3Delta, index: Index) -> Ia3Delta:
    if delta.axis == "input":
        return delta  # all rows share the inputs
    return replace(delta, scale=delta.scale.flatten()[index].clone()).reshaped_for((len(index), 1))


def _fuse_ia3(parts: Sequence[Ia3Delta | None], rows: Rows) -> Ia3Delta:
    first = next(part for part in parts if part is not None)
    if any(part is not None and part.axis == "input" for part in parts):
        if not all(same_tensor(part.scale, first.scale) for part in _all_present(parts, "gains")):
            raise UnsplittableError("its parts scale the inputs differently")
        return first
    identity = torch.full((1,), first.identity, dtype=first.scale.dtype)
    gains = [
        identity.expand(size) if part is None else part.scale.flatten() for part, size in zip(parts, rows, strict=True)
    ]
    return replace(first, scale=torch.cat(gains)).reshaped_for((sum(rows), 1))


def _take_glora(delta: GloraDelta, index: Index) -> GloraDelta:
    return replace(delta, up=delta.up[index].clone())  # all rows share the inputs


def _fuse_glora(parts: Sequence[GloraDelta | None], rows: Rows) -> GloraDelta:
    present = _all_present(parts, "change of the inputs")
    first = present[0]
    shared = ("input_up", "input_down", "down")
    for part in present:
        if part.alpha != first.alpha or not all(
            same_tensor(getattr(part, name), getattr(first, name)) for name in shared
        ):
            raise UnsplittableError("its parts change the inputs differently")
    return replace(first, up=torch.cat([part.up for part in present]))


def _oft_shape(delta: OftDelta) -> tuple[int, int]:
    return delta.outputs, 0


def _take_oft(delta: OftDelta, index: Index) -> OftDelta:
    size = delta.blocks.shape[-1]
    blocks = index.reshape(-1, size) if len(index) % size == 0 else index[:0].reshape(0, size)
    starts = blocks[:, :1]
    is_aligned = (starts % size == 0).all() and np.array_equal(blocks, starts + np.arange(size))
    if delta.alpha or not len(blocks) or not is_aligned:
        raise UnsplittableError("its blocks cross the borders of the parts, or share one constraint")
    gains = None if delta.rescale is None else delta.rescale[index].clone()
    return replace(delta, blocks=delta.blocks[starts.flatten() // size].clone(), rescale=gains)


def _fuse_oft(parts: Sequence[OftDelta | None], rows: Rows) -> OftDelta | OftPartsDelta:
    present = _all_present(parts, "blocks")
    if len({(part.blocks.shape[-1], part.alpha, part.rescale is None) for part in present}) > 1 or present[0].alpha:
        return _as_parts(present)
    gains = None if present[0].rescale is None else torch.cat([required(part.rescale) for part in present])
    return replace(present[0], blocks=torch.cat([part.blocks for part in present]), rescale=gains)


def _as_parts(parts: Sequence[OftDelta]) -> OftPartsDelta:
    # kohya has one number of blocks and one constraint, which is not 0, for all parts.
    numbers = {(part.blocks.shape[0], part.alpha) for part in parts}
    if len(numbers) > 1 or not parts[0].alpha or any(part.rescale is not None for part in parts):
        raise UnsplittableError("its parts have blocks of several sizes, or constraints of their own")
    return OftPartsDelta(tuple(part.blocks for part in parts), parts[0].alpha)


def _split_parts(delta: OftPartsDelta, rows: Rows) -> list[Delta | None]:
    if delta.rows != list(rows):
        raise UnsplittableError(f"its blocks are for parts of {delta.rows} rows, those of the layer have {list(rows)}")
    return [*delta.parts]


def _take_parts(delta: OftPartsDelta, index: Index) -> OftPartsDelta:
    raise UnsplittableError("it is of several parts")


def _fuse_parts(parts: Sequence[OftPartsDelta | None], rows: Rows) -> OftPartsDelta:
    raise UnsplittableError("its parts have parts")


def _take_peft_oft(delta: PeftOftDelta, index: Index) -> PeftOftDelta:
    return delta  # it rotates the inputs, which all rows share


def _peft_oft_shape(delta: PeftOftDelta) -> tuple[int, int] | None:
    return None


def _fuse_peft_oft(parts: Sequence[PeftOftDelta | None], rows: Rows) -> PeftOftDelta:
    present = _all_present(parts, "rotation")
    if not all(same_tensor(part.angles, present[0].angles) for part in present):
        raise UnsplittableError("its parts rotate the inputs differently")
    return present[0]


def _take_replacement(delta: ReplacementDelta, index: Index) -> ReplacementDelta:
    return ReplacementDelta(delta.value[index].clone())


def _replacement_shape(delta: ReplacementDelta) -> tuple[int, int]:
    return delta.value.shape[0], math.prod(delta.value.shape[1:]) if delta.value.dim() > 1 else 0


def _fuse_replacement(parts: Sequence[ReplacementDelta | None], rows: Rows) -> ReplacementDelta:
    return ReplacementDelta(torch.cat([part.value for part in _all_present(parts, "value")]))


def _all_present(parts: Sequence[_T | None], noun: str) -> list[_T]:
    present = [part for part in parts if part is not None]
    if len(present) < len(parts):
        raise UnsplittableError(f"a part without an adapter has no {noun}, which the fused layer needs")
    return present


row_rules.add("loha", RowRule(matrix_shape, _take_loha, _fuse_loha, _split_loha))
row_rules.add("dora", RowRule(_dora_shape, _take_dora, _fuse_dora, _split_dora))
row_rules.add("glora", RowRule(matrix_shape, _take_glora, _fuse_glora))
row_rules.add("ia3", RowRule(_ia3_shape, _take_ia3, _fuse_ia3))
row_rules.add("peft-ia3", RowRule(_ia3_shape, _take_ia3, _fuse_ia3))
row_rules.add("oft", RowRule(_oft_shape, _take_oft, _fuse_oft))
row_rules.add("oft-parts", RowRule(lambda delta: (sum(delta.rows), 0), _take_parts, _fuse_parts, _split_parts))
row_rules.add("peft-oft", RowRule(_peft_oft_shape, _take_peft_oft, _fuse_peft_oft))
row_rules.add("replacement", RowRule(_replacement_shape, _take_replacement, _fuse_replacement))

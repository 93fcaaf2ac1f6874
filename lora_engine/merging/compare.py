"""Compares the deltas of two adapters, module by module. Different factors of equal deltas count as equal.

Two LoRA are compared in the space that their factors span, without a dense delta. Other kinds are compared by their
dense deltas, one module at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_engine.adapters import Adapter, Delta, LoraDelta, same_delta
from lora_engine.adapters.tree import Base
from lora_engine.errors import AdapterError
from lora_engine.formats.embeddings import Embedding
from lora_engine.merging.compress import plain_factors
from lora_engine.merging.deltas import ModuleDeltas


@dataclass(frozen=True)
class ModuleDifference:
    """The comparison of two deltas of one module.

    Attributes:
        kinds: Kinds of the first and second delta; None means the adapter lacks the module.
        ranks: Ranks of the first and second delta; None also for kinds without a rank.
        relative: Frobenius norm of the difference over that of the first delta, 0 or more; None means unknown (the
            base is needed and missing, or the first delta is zero).
        cosine: Cosine of the two deltas as vectors, -1 to 1; None means a delta is zero or unknown.
        largest: Largest absolute difference of two factor elements; None means the factors' shapes differ.
        note: Why a value is unknown.
    """

    kinds: tuple[str | None, str | None]
    ranks: tuple[int | None, int | None]
    relative: float | None
    cosine: float | None
    largest: float | None
    note: str = ""


@dataclass(frozen=True)
class AdapterComparison:
    """The comparison of two adapters.

    Attributes:
        modules: Module name to its comparison, the largest difference first.
        relative: `ModuleDifference.relative` over all modules that could be compared; a module that only one adapter
            has counts in full.
        cosine: `ModuleDifference.cosine` over the same modules.
        largest: The maximum of the modules' `largest`.
        words: Learned token to the largest absolute difference of an element; None means that only one adapter has it,
            or that the sizes differ.
        untold: Number of modules that could not be compared.
    """

    modules: dict[str, ModuleDifference]
    relative: float | None
    cosine: float | None
    largest: float | None
    words: dict[str, float | None] = field(default_factory=dict)
    untold: int = 0

    @property
    def added(self) -> list[str]:
        """Modules that only the second adapter has."""
        return sorted(name for name, module in self.modules.items() if module.kinds[0] is None)

    @property
    def removed(self) -> list[str]:
        """Modules that only the first adapter has."""
        return sorted(name for name, module in self.modules.items() if module.kinds[1] is None)

    def as_json(self) -> dict[str, Any]:
        """Returns the comparison as JSON values."""
        modules = {name: vars(module) for name, module in self.modules.items()}
        totals = {name: getattr(self, name) for name in ("relative", "cosine", "largest", "words", "untold")}
        return totals | {"added": self.added, "removed": self.removed, "modules": modules}


@dataclass(frozen=True)
class _Norms:
    """Squared norms of the first delta, the second and their difference, and their inner product; in float64."""

    first: float = 0.0
    second: float = 0.0
    difference: float = 0.0
    product: float = 0.0

    def __add__(self, other: _Norms) -> _Norms:
        return _Norms(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def relative(self) -> float | None:
        if self.first == 0.0:
            return 0.0 if self.difference == 0.0 else None
        return math.sqrt(self.difference / self.first)

    @property
    def cosine(self) -> float | None:
        size = math.sqrt(self.first) * math.sqrt(self.second)
        return max(-1.0, min(1.0, self.product / size)) if size else None


def compare_adapters(
    first: Adapter,
    second: Adapter,
    *,
    base: Base | None = None,
    words: tuple[Sequence[Embedding], Sequence[Embedding]] = ((), ()),
) -> AdapterComparison:
    """Compares what two adapters add to each weight and bias of their base.

    Args:
        first: The reference.
        second: The adapter to compare with it.
        base: Needed by kinds whose delta depends on the base's weight (DoRA, OFT, (IA)3). Without it, only the factors
            of such modules are compared.
        words: The embeddings of the first and the second adapter.
    """
    modules: dict[str, ModuleDifference] = {}
    total, unknown = _Norms(), 0
    for name in sorted({*first.modules, *second.modules}):
        pair = first.modules.get(name), second.modules.get(name)
        norms, note = _norms(name, pair, base)
        unknown += norms is None
        total += norms or _Norms()
        modules[name] = ModuleDifference(
            (_kind(pair[0]), _kind(pair[1])),
            (_rank(pair[0]), _rank(pair[1])),
            None if norms is None else norms.relative,
            None if norms is None else norms.cosine,
            _largest(*pair),
            note,
        )
    farthest = sorted(modules, key=lambda name: -_distance(modules[name]))
    any_known = unknown < len(modules)
    largest = [module.largest for module in modules.values() if module.largest is not None]
    return AdapterComparison(
        {name: modules[name] for name in farthest},
        total.relative if any_known else None,
        total.cosine if any_known else None,
        max(largest, default=None),
        _compare_tokens(*words),
        unknown,
    )


def _norms(name: str, pair: tuple[Delta | None, Delta | None], base: Base | None) -> tuple[_Norms | None, str]:
    first, second = pair
    if first and second and same_delta(first, second):
        second = first  # the difference is exactly 0, without rounding
    if isinstance(first, LoraDelta | None) and isinstance(second, LoraDelta | None):
        if first and second and not _same_matrix_shape(first, second):
            return None, f"for weights {list(first.weight_shape)} and {list(second.weight_shape)}"
        return _norms_of_factors(first, second), ""
    deltas = [delta for delta in pair if delta is not None]
    if base is None and any(delta.reads_base for delta in deltas):
        if first is second:
            return _Norms(), ""
        return None, "the delta depends on the base's weight, and no base is set"
    try:
        module = ModuleDeltas.of(name, deltas, base)
    except AdapterError as error:
        return None, error.problem
    return _norms_of_dense(*(None if delta is None else module.dense(delta) for delta in (first, second))), ""


def _kind(delta: Delta | None) -> str | None:
    return None if delta is None else delta.kind


def _rank(delta: Delta | None) -> int | None:
    return None if delta is None else delta.rank


def _same_matrix_shape(first: LoraDelta, second: LoraDelta) -> bool:
    shapes = [(shape[0], math.prod(shape[1:])) for shape in (first.weight_shape, second.weight_shape)]
    return shapes[0] == shapes[1]


def _norms_of_factors(first: LoraDelta | None, second: LoraDelta | None) -> _Norms:
    # QR of all columns and all rows leaves small cores with the norms and angles of the deltas. The difference of the
    # cores is computed before it is squared, which is exact for nearly equal deltas.
    deltas = [delta for delta in (first, None if second is first else second) if delta is not None]
    factors = [tuple(factor.double() for factor in plain_factors(delta)) for delta in deltas]
    columns = torch.linalg.qr(torch.cat([up for _, up in factors], dim=1)).R
    rows = torch.linalg.qr(torch.cat([down for down, _ in factors]).T).R
    cores: list[Tensor] = []
    start = 0
    for delta, (down, _) in zip(deltas, factors, strict=True):
        end = start + len(down)
        cores.append(columns[:, start:end] @ rows[:, start:end].T * delta.scale)
        start = end
    parts = {id(delta): (core, delta.bias) for delta, core in zip(deltas, cores, strict=True)}
    return _norms_of_dense(*(None if delta is None else parts[id(delta)] for delta in (first, second)))


def _norms_of_dense(first: tuple[Tensor, Tensor | None] | None, second: tuple[Tensor, Tensor | None] | None) -> _Norms:
    total = _Norms()
    for pair in zip(first or (None, None), second or (None, None), strict=True):
        present = pair[0] if pair[0] is not None else pair[1]
        if present is None:
            continue
        a, b = ((torch.zeros_like(present) if part is None else part).detach().double().flatten() for part in pair)
        gap = a - b
        total += _Norms(float(a @ a), float(b @ b), float(gap @ gap), float(a @ b))
    return total


def _largest(first: Delta | None, second: Delta | None) -> float | None:
    if first is None or second is None or first.kind != second.kind:
        return None
    firsts, seconds = first.factors(), second.factors()
    if firsts.keys() != seconds.keys() or any(firsts[name].shape != seconds[name].shape for name in firsts):
        return None
    return max((_gap(firsts[name], seconds[name]) for name in firsts), default=0.0)


def _gap(first: Tensor, second: Tensor) -> float:
    return float((first.detach().double() - second.detach().double()).abs().max()) if first.numel() else 0.0


def _distance(module: ModuleDifference) -> float:
    if None in module.kinds:
        return math.inf
    return math.inf if module.relative is None else module.relative


def _compare_tokens(first: Sequence[Embedding], second: Sequence[Embedding]) -> dict[str, float | None]:
    firsts, seconds = ({item.token: item.vectors for item in embeddings} for embeddings in (first, second))
    gaps: dict[str, float | None] = {}
    for token in sorted({*firsts, *seconds}):
        a, b = firsts.get(token, {}), seconds.get(token, {})
        same = a.keys() == b.keys() and all(a[name].shape == b[name].shape for name in a)
        gaps[token] = max((_gap(a[name], b[name]) for name in a), default=0.0) if same and a else None
    return gaps

"""How far two adapters lie apart, module by module, in what they do: never in the factors that happen to say it.

Two LoRA are compared in the space that their factors span, so that no dense difference is formed; other kinds, one
module at a time, by their dense difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_engine.adapters import Adapter, Delta, LoraDelta, same_delta
from lora_engine.adapters.attach import Base
from lora_engine.errors import AdapterError
from lora_engine.formats.embeddings import Embedding
from lora_engine.merging.compress import plain_factors, shape_of
from lora_engine.merging.deltas import ModuleDeltas, needs_base_values


@dataclass(frozen=True)
class ModuleDifference:
    """Two deltas of one module.

    Attributes:
        kinds: Of the first and of the second; None where it has none.
        ranks: Likewise; None also for kinds without one.
        relative: Frobenius norm of the difference over that of the first delta, 0 or more; None where it cannot be
            told (the base is needed and not there, or the first is zero).
        cosine: Of the two deltas as vectors, -1 to 1; None where one of them is zero or cannot be told.
        largest: Largest absolute difference of two factors' elements; None where the factors are of other shapes.
        note: Why something cannot be told.
    """

    kinds: tuple[str | None, str | None]
    ranks: tuple[int | None, int | None]
    relative: float | None
    cosine: float | None
    largest: float | None
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """Two adapters.

    Attributes:
        modules: Per module of either, how the two differ there; the farthest apart first.
        relative: As of a module, over all modules that could be compared; what only one has counts in full.
        cosine: Likewise.
        largest: The largest of the modules'.
        words: Per learned word, the largest absolute difference of an element; None where only one has it, or it is of
            another size.
        untold: How many modules could not be compared.
    """

    modules: dict[str, ModuleDifference]
    relative: float | None
    cosine: float | None
    largest: float | None
    words: dict[str, float | None] = field(default_factory=dict)
    untold: int = 0

    @property
    def added(self) -> list[str]:
        """Modules that only the second has."""
        return sorted(name for name, module in self.modules.items() if module.kinds[0] is None)

    @property
    def removed(self) -> list[str]:
        """Modules that only the first has."""
        return sorted(name for name, module in self.modules.items() if module.kinds[1] is None)

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        modules = {name: vars(module) for name, module in self.modules.items()}
        own = {name: getattr(self, name) for name in ("relative", "cosine", "largest", "words", "untold")}
        return own | {"added": self.added, "removed": self.removed, "modules": modules}


@dataclass(frozen=True)
class _Sizes:
    """Squared norms of the first, the second and their difference, and the inner product; all in float64."""

    first: float = 0.0
    second: float = 0.0
    difference: float = 0.0
    product: float = 0.0

    def __add__(self, other: _Sizes) -> _Sizes:
        return _Sizes(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

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
) -> Comparison:
    """Compares what two adapters add to each weight and bias of their base.

    Args:
        first: What the other is measured against.
        second: The other.
        base: Where a kind says what it adds only together with the base's weight (DoRA, OFT, (IA)3); without it, such
            modules are told apart by their factors alone.
        words: The embeddings that came with each.
    """
    modules: dict[str, ModuleDifference] = {}
    total, untold = _Sizes(), 0
    for name in sorted({*first.modules, *second.modules}):
        pair = first.modules.get(name), second.modules.get(name)
        sizes, note = _sizes(name, pair, base)
        untold += sizes is None
        total += sizes or _Sizes()
        modules[name] = ModuleDifference(
            (_kind(pair[0]), _kind(pair[1])),
            (_rank(pair[0]), _rank(pair[1])),
            None if sizes is None else sizes.relative,
            None if sizes is None else sizes.cosine,
            _largest(*pair),
            note,
        )
    farthest = sorted(modules, key=lambda name: -_distance(modules[name]))
    all_told = untold < len(modules)
    known = [module.largest for module in modules.values() if module.largest is not None]
    return Comparison(
        {name: modules[name] for name in farthest},
        total.relative if all_told else None,
        total.cosine if all_told else None,
        max(known, default=None),
        _compare_words(*words),
        untold,
    )


def _sizes(name: str, pair: tuple[Delta | None, Delta | None], base: Base | None) -> tuple[_Sizes | None, str]:
    first, second = pair
    if first and second and same_delta(first, second):
        second = first  # and no rounding shall tell otherwise
    if isinstance(first, LoraDelta | None) and isinstance(second, LoraDelta | None):
        if first and second and not _same_sides(first, second):
            return None, f"for weights {list(shape_of(first))} and {list(shape_of(second))}"
        return _sizes_of_factors(first, second), ""
    there = [delta for delta in pair if delta is not None]
    if base is None and any(needs_base_values(delta) for delta in there):
        if first is second:
            return _Sizes(), ""
        return None, "what it adds follows from the base's weight alone"
    try:
        site = ModuleDeltas.of(name, there, base)
    except AdapterError as error:
        return None, error.problem
    return _sizes_of_dense(*(None if delta is None else site.dense(delta) for delta in (first, second))), ""


def _kind(delta: Delta | None) -> str | None:
    return None if delta is None else delta.kind


def _rank(delta: Delta | None) -> int | None:
    return None if delta is None else delta.rank


def _same_sides(first: LoraDelta, second: LoraDelta) -> bool:
    shapes = [(shape[0], math.prod(shape[1:])) for shape in (shape_of(first), shape_of(second))]
    return shapes[0] == shapes[1]


def _sizes_of_factors(first: LoraDelta | None, second: LoraDelta | None) -> _Sizes:
    # Orthonormal bases of all columns and of all rows leave cores of the ranks' sum, with the deltas' own norms and
    # angles. The difference is taken there, before it is squared: it stays exact where the two are nearly the same.
    deltas = [delta for delta in (first, None if second is first else second) if delta is not None]
    factors = [tuple(factor.double() for factor in plain_factors(delta)) for delta in deltas]
    columns = torch.linalg.qr(torch.cat([up for _, up in factors], dim=1)).R
    rows = torch.linalg.qr(torch.cat([down for down, _ in factors]).T).R
    cores: list[Tensor] = []
    begin = 0
    for delta, (down, _) in zip(deltas, factors, strict=True):
        end = begin + len(down)
        cores.append(columns[:, begin:end] @ rows[:, begin:end].T * delta.scale)
        begin = end
    parts = {id(delta): (core, delta.bias) for delta, core in zip(deltas, cores, strict=True)}
    return _sizes_of_dense(*(None if delta is None else parts[id(delta)] for delta in (first, second)))


def _sizes_of_dense(first: tuple[Tensor, Tensor | None] | None, second: tuple[Tensor, Tensor | None] | None) -> _Sizes:
    total = _Sizes()
    for one, other in zip(first or (None, None), second or (None, None), strict=True):
        there = one if one is not None else other
        if there is None:
            continue
        a, b = (
            (torch.zeros_like(there) if part is None else part).detach().double().flatten() for part in (one, other)
        )
        gap = a - b
        total += _Sizes(float(a @ a), float(b @ b), float(gap @ gap), float(a @ b))
    return total


def _largest(first: Delta | None, second: Delta | None) -> float | None:
    if first is None or second is None or first.kind != second.kind:
        return None
    mine, theirs = first.factors(), second.factors()
    if mine.keys() != theirs.keys() or any(mine[name].shape != theirs[name].shape for name in mine):
        return None
    return max((_gap(mine[name], theirs[name]) for name in mine), default=0.0)


def _gap(first: Tensor, second: Tensor) -> float:
    return float((first.detach().double() - second.detach().double()).abs().max()) if first.numel() else 0.0


def _distance(module: ModuleDifference) -> float:
    if None in module.kinds:
        return math.inf
    return math.inf if module.relative is None else module.relative


def _compare_words(first: Sequence[Embedding], second: Sequence[Embedding]) -> dict[str, float | None]:
    mine, theirs = ({word.token: word.vectors for word in words} for words in (first, second))
    found: dict[str, float | None] = {}
    for token in sorted({*mine, *theirs}):
        one, other = mine.get(token, {}), theirs.get(token, {})
        same = one.keys() == other.keys() and all(one[name].shape == other[name].shape for name in one)
        found[token] = max((_gap(one[name], other[name]) for name in one), default=0.0) if same and one else None
    return found

"""Merges whole adapters: checks every module first, then applies a method module by module.

A merge either concatenates factors, which is exact, or combines dense deltas and compresses the result. It never
averages factors of different adapters.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from lora_engine.adapters import Adapter, Delta, LoraDelta
from lora_engine.adapters.tree import Base
from lora_engine.errors import AdapterError, SettingsError
from lora_engine.files import sha256_bytes
from lora_engine.finite import is_finite, not_finite
from lora_engine.merging.budget import Budget
from lora_engine.merging.compress import compress_to
from lora_engine.merging.concatenate import check_bases, combine_exactly, require_lora
from lora_engine.merging.deltas import ModuleDeltas, content_digest, full_delta, located
from lora_engine.merging.methods import METHODS, Combination, Elementwise, MergeMethod
from lora_engine.merging.methods.sums import Concatenate
from lora_engine.merging.report import ModuleReport, Report
from lora_engine.merging.spec import MergeOptions, Weight
from lora_engine.merging.weights import weights_by_module
from lora_engine.seeds import generator

_WEIGHTS = "choose smaller weights, or other adapters"


def merge_adapters(
    adapters: Sequence[Adapter],
    weights: Sequence[Weight],
    options: MergeOptions | None = None,
    *,
    seed: int = 0,
    base: Base | None = None,
) -> tuple[Adapter, Report]:
    """Merges several adapters into one. Does not change them.

    An adapter without a module counts with a delta of zero there. Modules with a merged delta of zero are omitted. The
    result does not depend on the order of the adapters, bit for bit. Random draws depend only on the seed, the module's
    name and the adapter's content.

    Args:
        adapters: At least one, for one base.
        weights: One per adapter: a number, or numbers by pattern over module names (`merging.weights`).
        options: The method and its options (`merging.methods`); None means `Concatenate()`.
        seed: Random seed of the methods that draw.
        base: The base of the adapters; needed by kinds whose delta depends on it (DoRA, OFT, (IA)3).

    Returns:
        The adapter, float32 in every computed module, and what each module keeps of the merge.

    Raises:
        SettingsError: No adapter, invalid weights, or an option that the method does not allow.
        AdapterError: Families, bases or shapes differ, or a kind needs another method or the missing base.
    """
    options = options if options is not None else Concatenate()
    method = METHODS[options.name]
    check_bases(adapters, weights)
    if method.adapters is not None and len(adapters) != method.adapters:
        raise SettingsError(
            f"{method.name} of {len(adapters)} adapters", allowed=f"{method.adapters}", remedy="choose another method"
        )
    adapters = [adapter.to_export() for adapter in adapters]
    names = sorted({name for adapter in adapters for name in adapter.modules})
    tables = [weights_by_module(w, a.modules, names) for a, w in zip(adapters, weights, strict=True)]
    plans = []
    for name in names:
        deltas = [(a.modules.get(name), table[name]) for a, table in zip(adapters, tables, strict=True)]
        plans.append(_Plan.of(name, deltas, method, options, base, seed))
    results = {plan.name: result for plan in plans if (result := plan.run()) is not None}
    if not results:
        raise SettingsError("the merged adapter is zero", remedy="choose other weights, or another method")
    family = next((adapter.base for adapter in adapters if adapter.base), "")
    fingerprint = next((adapter.fingerprint for adapter in adapters if adapter.fingerprint), None)
    modules = {name: delta for name, (delta, _) in results.items()}
    return Adapter(modules, family, fingerprint), Report({name: report for name, (_, report) in results.items()})


WeightedDeltas = Sequence[tuple[Delta | None, float]]
MergeResult = tuple[Delta, ModuleReport]


@dataclass(frozen=True)
class _Plan:
    """The merge of one module. All plans are made, and checked, before the first one runs.

    Attributes:
        name: Canonical name of the module.
        weighted_deltas: Deltas (None for an adapter that lacks the module) and weights, sorted by content: the order of
            the adapters does not change a bit.
        coefficients: One per delta; None means that they depend on the deltas.
        module: The checked module; None means that one delta is passed on unchanged.
    """

    name: str
    weighted_deltas: tuple[tuple[Delta | None, float], ...]
    coefficients: tuple[float, ...] | None
    module: ModuleDeltas | None
    method: MergeMethod
    options: MergeOptions
    seed: int

    @classmethod
    def of(
        cls,
        name: str,
        weighted_deltas: WeightedDeltas,
        method: MergeMethod,
        options: MergeOptions,
        base: Base | None,
        seed: int,
    ) -> _Plan:
        def order(item: tuple[Delta | None, float]) -> tuple[str, float]:
            return "" if item[0] is None else content_digest(item[0]), item[1]

        ordered = tuple(sorted(weighted_deltas, key=order))
        coefficients: tuple[float, ...] | None = None
        if isinstance(method, Combination) and not method.sees_deltas:
            with located(name):
                values = method.coefficients([weight for _, weight in ordered], None, **options.parameters())
            coefficients = tuple(values)
            active = _active(ordered, coefficients)
            if not active or _is_passed_on(active, options):
                return cls(name, ordered, coefficients, None, method, options, seed)
            if method.lora_only:
                require_lora(name, [delta for delta, _ in active])
        module = ModuleDeltas.of(name, [delta for delta, _ in ordered if delta is not None], base)
        return cls(name, ordered, coefficients, module, method, options, seed)

    def run(self) -> MergeResult | None:
        """Returns the merged delta and its report; None if the merged delta is zero."""
        with located(self.name):
            result = self._merge_elements(self.method) if isinstance(self.method, Elementwise) else self._combine()
            if result is not None:
                _check_finite(result[0])
            return result

    def _combine(self) -> MergeResult | None:
        coefficients = self.coefficients if self.coefficients is not None else self._coefficients_from_deltas()
        active = _active(self.weighted_deltas, coefficients)
        if not active:
            return None
        if _is_passed_on(active, self.options):
            delta = active[0][0]
            return delta, ModuleReport(delta.kind, delta.rank)
        if self.options.kind == "lora" and all(isinstance(delta, LoraDelta) for delta, _ in active):
            exact = combine_exactly(self.name, active)
            if not self.options.compresses or not isinstance(exact, LoraDelta):
                return exact, ModuleReport(exact.kind, exact.rank)
            small = compress_to(exact, self._budget())
            return small.delta, ModuleReport("lora", small.delta.rank, small.retained, small.energy)
        dense = [self._checked_module.dense(delta) for delta, _ in active]
        scales = [scale for _, scale in active]
        weight = torch.stack([scale * part for scale, (part, _) in zip(scales, dense, strict=True)]).sum(0)
        biases = [scale * bias for scale, (_, bias) in zip(scales, dense, strict=True) if bias is not None]
        return self._store(weight, torch.stack(biases).sum(0) if biases else None, exact=True)

    def _coefficients_from_deltas(self) -> Sequence[float]:
        def gram() -> Tensor:
            count = len(self.weighted_deltas)
            present = [(index, delta) for index, (delta, _) in enumerate(self.weighted_deltas) if delta is not None]
            indices = torch.tensor([index for index, _ in present])
            products = torch.zeros(count, count, dtype=torch.float64)
            products[indices[:, None], indices[None, :]] = self._checked_module.gram([delta for _, delta in present])
            return products

        method = cast(Combination, self.method)
        return method.coefficients([weight for _, weight in self.weighted_deltas], gram, **self.options.parameters())

    def _merge_elements(self, method: Elementwise) -> MergeResult | None:
        # A delta of zero changes no sum, no sign election and no mean of the agreeing elements.
        active = _active(self.weighted_deltas, [weight for _, weight in self.weighted_deltas])
        if not active:
            return None
        dense = [self._checked_module.dense(delta) for delta, _ in active]
        scales = [scale for _, scale in active]
        weight = self._elements(method, [part for part, _ in dense], scales, "weight")
        with_bias = [(scale, bias) for scale, (_, bias) in zip(scales, dense, strict=True) if bias is not None]
        bias = None
        if with_bias:
            bias = self._elements(method, [bias for _, bias in with_bias], [scale for scale, _ in with_bias], "bias")
        return self._store(weight, bias, exact=False)

    def _elements(self, method: Elementwise, deltas: Sequence[Tensor], scales: Sequence[float], part: str) -> Tensor:
        if not method.draws:
            return method.merge(deltas, scales, **self.options.parameters())
        # Seeded by content, not by position: what is dropped of an adapter does not depend on the other adapters.
        seen: Counter[str] = Counter()
        generators = []
        for delta in deltas:
            digest = sha256_bytes(delta.detach().cpu().contiguous().numpy().tobytes())
            generators.append(generator(self.seed, "merge", self.name, part, digest, seen[digest]))
            seen[digest] += 1
        return method.merge(deltas, scales, generators=generators, **self.options.parameters())

    def _store(self, weight: Tensor, bias: Tensor | None, *, exact: bool) -> MergeResult | None:
        """Returns the result as LoRA, or as the dense difference if requested or not larger."""
        if not bool(weight.any()):
            return None if bias is None or not bool(bias.any()) else _as_full(weight, bias)
        if self.options.kind == "full" or weight.dim() < 2:
            return _as_full(weight, bias)
        rows, columns = weight.shape[0], weight[0].numel()
        largest_rank = rows * columns // (rows + columns)  # above it, factors are larger than the dense difference
        if not exact and not self.options.compresses and self._rank_sum(min(rows, columns)) > largest_rank:
            return _as_full(weight, bias)
        budget = Budget(error=0.0) if exact and not self.options.compresses else self._budget(min(rows, columns))
        small = compress_to(weight, budget, generator(self.seed, "compress", self.name))
        if small.delta.rank > largest_rank and not self.options.compresses:
            return _as_full(weight, bias)
        delta = replace(small.delta, bias=None if bias is None else bias.float())
        return delta, ModuleReport("lora", delta.rank, small.retained, small.energy)

    def _budget(self, max_rank: int = 1) -> Budget:
        options = self.options
        if options.compresses:
            return Budget(options.rank, options.energy, options.error)
        return Budget(rank=self._rank_sum(max_rank))

    def _rank_sum(self, max_rank: int) -> int:
        """Returns the sum of the ranks, at most `max_rank`; a delta without a rank counts as `max_rank`."""
        ranks = [delta.rank or max_rank for delta, weight in self.weighted_deltas if delta is not None and weight]
        return min(max_rank, sum(ranks))

    @property
    def _checked_module(self) -> ModuleDeltas:
        return cast(ModuleDeltas, self.module)


def _check_finite(delta: Delta) -> None:
    """Raises an error for factors that are not finite, or whose product is not: a base with it computes only NaN.

    Raises:
        AdapterError: A factor, or the product in float32, in which it is computed, is not finite.
    """
    for name, factor in delta.factors().items():
        if not is_finite(factor):
            raise AdapterError(not_finite("", factor).problem, allowed=f"a finite factor {name}", remedy=_WEIGHTS)
    if not isinstance(delta, LoraDelta):
        return
    largest = [float(factor.double().abs().max()) for factor in (delta.up, delta.mid, delta.down) if factor is not None]
    terms = delta.rank if delta.mid is None else delta.rank**2
    if math.prod(largest) * terms * abs(delta.scale) <= torch.finfo(torch.float32).max:
        return
    product = delta.delta_weight(torch.zeros(delta.weight_shape))
    if not is_finite(product):
        problem = f"the product of the factors overflows: {not_finite('', product).problem}"
        raise AdapterError(problem, allowed="finite products", remedy=_WEIGHTS)


def _active(weighted_deltas: WeightedDeltas, coefficients: Sequence[float]) -> list[tuple[Delta, float]]:
    return [
        (delta, scale)
        for (delta, _), scale in zip(weighted_deltas, coefficients, strict=True)
        if delta is not None and scale != 0.0
    ]


def _is_passed_on(active: Sequence[tuple[Delta, float]], options: MergeOptions) -> bool:
    return len(active) == 1 and active[0][1] == 1.0 and not options.compresses and options.kind == "lora"


def _as_full(weight: Tensor, bias: Tensor | None) -> MergeResult:
    delta = full_delta(weight, bias)
    return delta, ModuleReport(delta.kind, None)

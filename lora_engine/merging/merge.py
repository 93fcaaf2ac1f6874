"""Merging whole adapters: checks everything first, then lets a method work module by module.

Merging happens in two spaces: factors side by side, which is exact, or dense deltas, which are then compressed. Factors
of different adapters are never averaged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from lora_engine.adapters import Adapter, Delta, LoraDelta
from lora_engine.adapters.attach import Base
from lora_engine.errors import SettingsError
from lora_engine.files import sha256_bytes
from lora_engine.merging.budget import Budget
from lora_engine.merging.compress import compress_to
from lora_engine.merging.concatenate import check_bases, combine_exactly, refuse_others
from lora_engine.merging.deltas import ModuleDeltas, content_digest, full_delta, located
from lora_engine.merging.methods import METHODS, Combination, Elementwise
from lora_engine.merging.report import ModuleReport, Report
from lora_engine.merging.spec import Concatenate, MergeOptions, Weight
from lora_engine.merging.weights import weights_by_module
from lora_engine.seeds import generator


def merge_adapters(
    adapters: Sequence[Adapter],
    weights: Sequence[Weight],
    options: MergeOptions | None = None,
    *,
    seed: int = 0,
    base: Base | None = None,
) -> tuple[Adapter, Report]:
    """One adapter that stands for several. None of them is changed.

    An adapter adds nothing to a module that it lacks: its delta there is zero, and it counts as such. Modules in which
    nothing is left are left out. The result does not depend on the order of the adapters, bit for bit; what is drawn by
    chance depends on the seed, the module's name and the adapter's content alone.

    Args:
        adapters: At least one, for one base.
        weights: One for each: a number, or numbers by pattern over module names (`merging.weights`).
        options: The method and what is set about it (`merging.spec`); None is `Concatenate()`.
        seed: Of the methods that draw.
        base: The base that the adapters were made for; needed by kinds that say nothing without it (DoRA, OFT, (IA)3).

    Returns:
        The adapter, float32 wherever anything was computed, and what each module keeps of the merge.

    Raises:
        SettingsError: No adapter, weights that do not fit, or a setting that the method does not take.
        AdapterError: Another family, base or shape, or a kind that the method or the missing base does not allow.
    """
    chosen = options if options is not None else Concatenate()
    method = METHODS[chosen.name]
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
        terms = [(a.modules.get(name), table[name]) for a, table in zip(adapters, tables, strict=True)]
        plans.append(_Plan.of(name, terms, method, chosen, base, seed))
    found = {plan.name: result for plan in plans if (result := plan.run()) is not None}
    if not found:
        raise SettingsError("nothing is left of the adapters", remedy="choose other weights, or another method")
    family = next((adapter.base for adapter in adapters if adapter.base), "")
    fingerprint = next((adapter.fingerprint for adapter in adapters if adapter.fingerprint), None)
    modules = {name: delta for name, (delta, _) in found.items()}
    return Adapter(modules, family, fingerprint), Report({name: report for name, (_, report) in found.items()})


Terms = Sequence[tuple[Delta | None, float]]
Result = tuple[Delta, ModuleReport]


@dataclass(frozen=True)
class _Plan:
    """What is done in one module; made for all modules before anything is done in one.

    Attributes:
        name: Of the module.
        terms: Deltas (None for an adapter that lacks the module) with their weights, in an order of their own, so that
            the order of the adapters does not change a bit.
        coefficients: Of the terms, where they are known without looking at the deltas.
        site: None where a delta is passed on as it is.
    """

    name: str
    terms: tuple[tuple[Delta | None, float], ...]
    coefficients: tuple[float, ...] | None
    site: ModuleDeltas | None
    method: Combination | Elementwise
    options: MergeOptions
    seed: int

    @classmethod
    def of(
        cls,
        name: str,
        terms: Terms,
        method: Combination | Elementwise,
        options: MergeOptions,
        base: Base | None,
        seed: int,
    ) -> _Plan:
        ordered = tuple(sorted(terms, key=lambda term: ("" if term[0] is None else content_digest(term[0]), term[1])))
        coefficients: tuple[float, ...] | None = None
        if isinstance(method, Combination) and not method.sees_deltas:
            with located(name):
                found = method.coefficients([weight for _, weight in ordered], None, **options.parameters())
            coefficients = tuple(found)
            active = _active(ordered, coefficients)
            if not active or _is_passed_on(active, options):
                return cls(name, ordered, coefficients, None, method, options, seed)
            if method.lora_only:
                refuse_others(name, [delta for delta, _ in active])
        site = ModuleDeltas.of(name, [delta for delta, _ in ordered if delta is not None], base)
        return cls(name, ordered, coefficients, site, method, options, seed)

    def run(self) -> Result | None:
        """The merged delta and what is to be said of it; None where nothing is left."""
        with located(self.name):
            return self._combine() if isinstance(self.method, Combination) else self._merge_elements(self.method)

    def _combine(self) -> Result | None:
        coefficients = self.coefficients if self.coefficients is not None else self._see_deltas()
        active = _active(self.terms, coefficients)
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
        dense = [self._site.dense(delta) for delta, _ in active]
        scales = [scale for _, scale in active]
        weight = torch.stack([scale * part for scale, (part, _) in zip(scales, dense, strict=True)]).sum(0)
        biases = [scale * bias for scale, (_, bias) in zip(scales, dense, strict=True) if bias is not None]
        return self._store(weight, torch.stack(biases).sum(0) if biases else None, exact=True)

    def _see_deltas(self) -> Sequence[float]:
        def gram() -> Tensor:
            present = [(place, delta) for place, (delta, _) in enumerate(self.terms) if delta is not None]
            places = torch.tensor([place for place, _ in present])
            whole = torch.zeros(len(self.terms), len(self.terms), dtype=torch.float64)
            whole[places[:, None], places[None, :]] = self._site.gram([delta for _, delta in present])
            return whole

        method = cast(Combination, self.method)
        return method.coefficients([weight for _, weight in self.terms], gram, **self.options.parameters())

    def _merge_elements(self, method: Elementwise) -> Result | None:
        # A delta of zero changes no sum, no election and no mean of those that agree.
        active = _active(self.terms, [weight for _, weight in self.terms])
        if not active:
            return None
        dense = [self._site.dense(delta) for delta, _ in active]
        scales = [scale for _, scale in active]
        weight = self._elements(method, [part for part, _ in dense], scales, "weight")
        with_bias = [(scale, bias) for scale, (_, bias) in zip(scales, dense, strict=True) if bias is not None]
        bias = None
        if with_bias:
            bias = self._elements(method, [bias for _, bias in with_bias], [scale for scale, _ in with_bias], "bias")
        return self._store(weight, bias, exact=False)

    def _elements(self, method: Elementwise, deltas: Sequence[Tensor], scales: Sequence[float], what: str) -> Tensor:
        if not method.draws:
            return method.merge(deltas, scales, **self.options.parameters())
        # Of the content and not of the place, so that what is dropped of an adapter does not depend on its company.
        seen: Counter[str] = Counter()
        generators = []
        for delta in deltas:
            digest = sha256_bytes(delta.detach().cpu().contiguous().numpy().tobytes())
            generators.append(generator(self.seed, "merge", self.name, what, digest, seen[digest]))
            seen[digest] += 1
        return method.merge(deltas, scales, generators=generators, **self.options.parameters())

    def _store(self, weight: Tensor, bias: Tensor | None, *, exact: bool) -> Result | None:
        """The result as LoRA or, where that is asked for or takes no more room, as the dense difference."""
        if not bool(weight.any()):
            return None if bias is None or not bool(bias.any()) else _as_full(weight, bias)
        if self.options.kind == "full" or weight.dim() < 2:
            return _as_full(weight, bias)
        rows, columns = weight.shape[0], weight[0].numel()
        room = rows * columns // (rows + columns)
        if not exact and not self.options.compresses and self._ranks(min(rows, columns)) > room:
            return _as_full(weight, bias)
        budget = Budget(error=0.0) if exact and not self.options.compresses else self._budget(min(rows, columns))
        small = compress_to(weight, budget, generator(self.seed, "compress", self.name))
        if small.delta.rank > room and not self.options.compresses:
            return _as_full(weight, bias)
        delta = replace(small.delta, bias=None if bias is None else bias.float())
        return delta, ModuleReport("lora", delta.rank, small.retained, small.energy)

    def _budget(self, most: int = 1) -> Budget:
        options = self.options
        if options.compresses:
            return Budget(options.rank, options.energy, options.error)
        return Budget(rank=self._ranks(most))

    def _ranks(self, most: int) -> int:
        """The sum of the ranks, where a delta without one counts with the largest that the shape allows."""
        return min(most, sum(delta.rank or most for delta, weight in self.terms if delta is not None and weight))

    @property
    def _site(self) -> ModuleDeltas:
        return cast(ModuleDeltas, self.site)


def _active(terms: Terms, coefficients: Sequence[float]) -> list[tuple[Delta, float]]:
    return [
        (delta, scale)
        for (delta, _), scale in zip(terms, coefficients, strict=True)
        if delta is not None and scale != 0.0
    ]


def _is_passed_on(active: Sequence[tuple[Delta, float]], options: MergeOptions) -> bool:
    return len(active) == 1 and active[0][1] == 1.0 and not options.compresses and options.kind == "lora"


def _as_full(weight: Tensor, bias: Tensor | None) -> Result:
    delta = full_delta(weight, bias)
    return delta, ModuleReport(delta.kind, None)

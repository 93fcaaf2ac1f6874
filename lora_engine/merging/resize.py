"""Changes the rank of whole adapters, and converts deltas of any kind to LoRA. `compress` has the algebra."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, cast

import torch
from torch import Tensor

from lora_engine.adapters import Adapter, Delta, LoraDelta
from lora_engine.adapters.tree import Base
from lora_engine.errors import AdapterError
from lora_engine.merging.budget import Budget
from lora_engine.merging.compress import Compressed, compress_to
from lora_engine.merging.deltas import ModuleDeltas, located
from lora_engine.merging.report import ModuleReport, Report
from lora_engine.seeds import generator


def resize(
    adapter: Adapter,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    threshold: float | None = None,
    ratio: float | None = None,
    cumulative: float | None = None,
    others: Literal["refuse", "keep", "lora"] = "refuse",
    base: Base | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> tuple[Adapter, Report]:
    """Returns the adapter at another rank, with the best approximation of each delta (Eckart and Young 1936).

    With a criterion besides `rank`, each module gets the least rank that meets it, and at most `rank`. The factors come
    from QR and an SVD of the small core, without a dense delta. Alpha becomes the rank.

    Args:
        adapter: The adapter, which does not change.
        rank: The rank; with another criterion, the maximum rank.
        energy: Share of the squared Frobenius norm to keep, in (0, 1].
        error: Maximum relative Frobenius error, in [0, 1).
        threshold: Smallest singular value to keep.
        ratio: Smallest singular value to keep, as the largest one divided by this.
        cumulative: Share of the sum of the singular values to keep, in (0, 1].
        others: Modules that are not LoRA raise an error (`refuse`), do not change (`keep`), or become LoRA (`lora`).
        base: The base; needed to convert kinds whose delta depends on it.
        dtype: Dtype of the factors; None keeps that of each module.
        seed: Random seed of the sketches of large dense deltas.

    Returns:
        The adapter, and what each module keeps.

    Raises:
        SettingsError: No criterion is set, or a value is out of range.
        AdapterError: A module is not LoRA, or needs the base and there is none.
    """
    budget = Budget(rank, energy, error, threshold, ratio, cumulative)
    adapter = adapter.to_export()
    if others == "refuse":
        _require_lora(adapter)
    modules: dict[str, Delta] = {}
    reports: dict[str, ModuleReport] = {}
    for name, delta in adapter.modules.items():
        converts = others == "lora" and not isinstance(delta, LoraDelta)
        module = ModuleDeltas.of(name, [delta], base) if converts else None
        if not isinstance(delta, LoraDelta) and (module is None or len(module.shape) < 2):
            modules[name], reports[name] = delta, ModuleReport(delta.kind, delta.rank)
            continue
        with located(name):
            small = _compressed(name, delta, module, budget, seed)
        factor_dtype = dtype or next(iter(delta.factors().values())).dtype
        modules[name] = small.delta.with_factors(
            {key: factor.to(factor_dtype) for key, factor in small.delta.factors().items()}
        )
        reports[name] = ModuleReport("lora", small.delta.rank, small.retained, small.energy)
    return replace(adapter, modules=modules), Report(reports)


def to_lora(
    delta: Delta,
    base_weight: Tensor | None = None,
    *,
    shape: Sequence[int] | None = None,
    base_bias: Tensor | None = None,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    generator: torch.Generator | None = None,
) -> tuple[LoraDelta, float]:
    """Returns the LoRA nearest to a delta of any kind, and the share of the squared Frobenius norm that it keeps.

    The relative error is `sqrt(1 - retained)`.

    Args:
        delta: A delta of any kind.
        base_weight: Weight of the base. DoRA, OFT and (IA)3 need it; LoRA and full need nothing; other kinds need the
            weight or its shape.
        shape: Shape of the weight, used without `base_weight`.
        base_bias: Bias of the base, for kinds that scale it.
        rank: The rank; with energy or error, the maximum rank.
        energy: Share of the squared norm to keep.
        error: Maximum relative error.
        generator: For the sketch of a large delta.

    Raises:
        SettingsError: No criterion is set, or a value is out of range.
        AdapterError: The base's weight or its shape is missing, or the delta is that of a vector.
    """
    budget = Budget(rank, energy, error)
    delta = delta.to_export()
    if isinstance(delta, LoraDelta):
        small = compress_to(delta, budget)
        return small.delta, small.retained
    weight_shape = None if shape is None else tuple(shape)
    module = ModuleDeltas.of("", [delta], weight=base_weight, bias=base_bias, shape=weight_shape)
    weight, bias = module.dense(delta)
    small = compress_to(weight, budget, generator)
    return replace(small.delta, bias=bias), small.retained


def _compressed(name: str, delta: Delta, module: ModuleDeltas | None, budget: Budget, seed: int) -> Compressed:
    if module is None:
        return compress_to(cast(LoraDelta, delta), budget)
    weight, bias = module.dense(delta)
    small = compress_to(weight, budget, generator(seed, "resize", name))
    return replace(small, delta=replace(small.delta, bias=bias))


def _require_lora(adapter: Adapter) -> None:
    others = {name: delta for name, delta in adapter.modules.items() if not isinstance(delta, LoraDelta)}
    if others:
        name, delta = next(iter(others.items()))
        with_base = " and the base" if delta.reads_base else ""
        raise AdapterError(
            f"{len(others)} of {len(adapter.modules)} modules are not LoRA, the first of kind {delta.kind!r}",
            where=name,
            allowed="lora",
            remedy=f"convert them (others='lora'{with_base}), or keep them unchanged (others='keep')",
        )

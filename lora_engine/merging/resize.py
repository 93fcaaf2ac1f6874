"""Changing the rank of a whole adapter, and making LoRA of any kind. The algebra of one delta is in `compress`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, cast

import torch
from torch import Tensor

from lora_engine.adapters import Adapter, Delta, LoraDelta
from lora_engine.adapters.attach import Base
from lora_engine.errors import AdapterError
from lora_engine.merging.budget import Budget
from lora_engine.merging.compress import Compressed, compress_to
from lora_engine.merging.deltas import ModuleDeltas, located, needs_base_values
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
    """The adapter at another rank: the best approximation of each module's delta (Eckart and Young 1936).

    With anything but `rank`, each module gets the least rank that keeps what is asked for, and at most `rank`. The
    factors come from QR of both and an SVD of the small core, so no dense delta is formed. Alpha becomes the rank.

    Args:
        adapter: Never changed.
        rank: The rank, or the largest one.
        energy: Share of the squared Frobenius norm to keep, in (0, 1].
        error: Largest relative Frobenius error, in [0, 1).
        threshold: Smallest singular value to keep.
        ratio: Smallest singular value to keep, as the largest one divided by this.
        cumulative: Share of the sum of the singular values to keep, in (0, 1].
        others: What becomes of modules that are not LoRA: the resize is refused, they stay, or become LoRA as well.
        base: The base, for kinds that need it to become LoRA.
        dtype: Of the factors; None keeps each module's.
        seed: Of the sketches of large dense deltas.

    Returns:
        The adapter, and what each module keeps.

    Raises:
        SettingsError: Nothing, or something impossible, is asked for.
        AdapterError: A module is not LoRA, or needs the base and none is given.
    """
    budget = Budget(rank, energy, error, threshold, ratio, cumulative)
    adapter = adapter.to_export()
    if others == "refuse":
        _refuse_others(adapter)
    modules: dict[str, Delta] = {}
    reports: dict[str, ModuleReport] = {}
    for name, delta in adapter.modules.items():
        site = ModuleDeltas.of(name, [delta], base) if others == "lora" and not isinstance(delta, LoraDelta) else None
        if not isinstance(delta, LoraDelta) and (site is None or len(site.shape) < 2):
            modules[name], reports[name] = delta, ModuleReport(delta.kind, delta.rank)
            continue
        with located(name):
            small = _compressed(name, delta, site, budget, seed)
        kept_dtype = dtype or next(iter(delta.factors().values())).dtype
        modules[name] = small.delta.with_factors(
            {key: factor.to(kept_dtype) for key, factor in small.delta.factors().items()}
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
    """The LoRA nearest to a delta of any kind, and the share of the squared Frobenius norm that it keeps.

    The relative error is `sqrt(1 - retained)`.

    Args:
        delta: Of any kind.
        base_weight: The weight under it. DoRA, OFT and (IA)3 need it; for LoRA and full nothing is needed, for the
            other kinds the weight or its shape.
        shape: Of the weight, where the weight itself is not given.
        base_bias: The bias under it, for kinds that scale it.
        rank: The rank, or where energy or error is set too, the largest one.
        energy: Share of the squared norm to keep.
        error: Largest relative error.
        generator: For the sketch of a large delta.

    Raises:
        SettingsError: Nothing, or something impossible, is asked for.
        AdapterError: The base's weight or its shape is needed, or the delta is a vector's.
    """
    budget = Budget(rank, energy, error)
    delta = delta.to_export()
    if isinstance(delta, LoraDelta):
        found = compress_to(delta, budget)
        return found.delta, found.retained
    wanted = None if shape is None else tuple(shape)
    site = ModuleDeltas.of("", [delta], weight=base_weight, bias=base_bias, shape=wanted)
    weight, bias = site.dense(delta)
    found = compress_to(weight, budget, generator)
    return replace(found.delta, bias=bias), found.retained


def _compressed(name: str, delta: Delta, site: ModuleDeltas | None, budget: Budget, seed: int) -> Compressed:
    if site is None:
        return compress_to(cast(LoraDelta, delta), budget)
    weight, bias = site.dense(delta)
    found = compress_to(weight, budget, generator(seed, "resize", name))
    return replace(found, delta=replace(found.delta, bias=bias))


def _refuse_others(adapter: Adapter) -> None:
    others = {name: delta for name, delta in adapter.modules.items() if not isinstance(delta, LoraDelta)}
    if others:
        name, delta = next(iter(others.items()))
        need = " and the base" if needs_base_values(delta) else ""
        raise AdapterError(
            f"{len(others)} of {len(adapter.modules)} modules are not LoRA, the first of kind {delta.kind!r}",
            where=name,
            allowed="lora",
            remedy=f"ask for LoRA of the other kinds too (give others='lora'{need}), or keep them as they are",
        )

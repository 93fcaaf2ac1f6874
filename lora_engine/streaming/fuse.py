"""Fuses adapters into a whole model and unfuses them, file by file and block by block."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from lora_engine.checkpoints.stored_tensor import StoredTensor
from lora_engine.errors import AdapterError
from lora_engine.streaming.blocks import read_rows, refuse_not_finite
from lora_engine.streaming.inputs import (
    Sameness,
    Updates,
    Weighted,
    WeightedAdapter,
    check_base,
    check_removable,
    check_same_tensors,
    read_adapters,
    updates_by_tensor,
)
from lora_engine.streaming.model import StoredModel, open_model
from lora_engine.streaming.output import check_output, copy_whole, write_model
from lora_engine.streaming.provenance import FusedAdapter, fused_adapters, with_adapters
from lora_engine.streaming.rewrite import Watch, rewrite
from lora_engine.streaming.rounding import Rounding, RoundingMode
from lora_engine.streaming.updates import open_updates


@dataclass(frozen=True)
class FuseReport:
    """The result of `fuse` or `unfuse`.

    Attributes:
        files: The written files.
        modules: Number of changed modules.
        tensors: Number of changed tensors in the files.
        adapters: The adapters by digest, with the requested weights.
        fingerprint: Comparison of the base with the one that the adapters name: `same`, `other` (if allowed), or
            `unknown` if a fingerprint is missing.
        recorded: After `unfuse`, True if the model's header named these adapters.
        difference: After `unfuse` with a base, the largest absolute difference of a changed element from the base; None
            without a base.
        survived: Share of the change that rounding to the weights' dtypes keeps, near 1; see `Rounding.survived`. None
            if all changed weights are float32 or float64.
        raised_scales: Number of scales of quantized weights that were raised because changed values would not fit.
    """

    files: list[Path]
    modules: int
    tensors: int
    adapters: list[FusedAdapter]
    fingerprint: Sameness = "unknown"
    recorded: bool = False
    difference: float | None = None
    survived: float | None = None
    raised_scales: int = 0


def fuse(
    base: Path,
    adapters: Weighted,
    output: Path,
    *,
    component: str | None = None,
    architecture: str | None = None,
    allow_other_base: bool = False,
    rounding: RoundingMode = "nearest",
    seed: int = 0,
) -> FuseReport:
    """Adds adapters to the weights of a model, and writes a new model of the same layout.

    The sum is computed in float32 (float64 for float64 weights) and cast once to the weight's dtype. Scaled float8
    weights are computed with their scale, and keep it if the result fits. Every adapter refers to the weights of the
    base, without the other adapters. All other tensors keep their bytes. After an error, there is no output.

    Args:
        base: A diffusers folder, a component's folder or file, or an original single file; see `open_model`.
        adapters: Files (or folders) of adapters of any format and kind, each with its weight.
        output: Path of the new model; a folder if the base is one. Written atomically.
        component: Component of a single file; None means inferred.
        architecture: Architecture of an original single file; None means inferred.
        allow_other_base: True if adapters may name another base by fingerprint.
        rounding: `nearest`, or `stochastic`, which keeps small changes on average, also in float8.
        seed: Seed of stochastic rounding.

    Raises:
        AdapterError: An adapter does not fit: a module is missing, or a shape differs.
        BaseModelError: The base cannot be read, or is not the one that an adapter names.
        SettingsError: There is no adapter, a weight is not finite, or the output is not valid.
    """
    model = open_model(base, component=component, architecture=architecture)
    check_output(model, output)
    weighted = read_adapters(model, adapters)
    updates = updates_by_tensor(model, weighted, sign=1.0)
    same = check_base(model, weighted, is_other_allowed=allow_other_base)
    entries = [item.entry for item in weighted]
    headers = {
        file: with_adapters(model.files[file][1], [*fused_adapters(model.files[file][1], file), *entries])
        for file in {file for file, _ in updates}
    }
    cast = Rounding(rounding, seed)
    files = write_model(model, output, partial(_write, model, updates, headers, None, cast))
    return _report(files, updates, weighted, same, cast)


def unfuse(
    fused: Path,
    adapters: Weighted,
    output: Path,
    *,
    base: Path | None = None,
    component: str | None = None,
    architecture: str | None = None,
    allow_other_base: bool = False,
    rounding: RoundingMode = "nearest",
    seed: int = 0,
) -> FuseReport:
    """Subtracts adapters from a model that they were fused into.

    Exact up to the rounding of the fused weights to their dtype. With a base, the report's `difference` is the distance
    of the result from it. After an error, there is no output.

    Args:
        fused: The model; see `open_model`.
        adapters: The adapters with the weights that they were fused with.
        output: Path of the new model.
        base: The model before fusing; needed by kinds whose delta depends on the weight (DoRA, OFT, IA3).
        component: See `fuse`.
        architecture: See `fuse`.
        allow_other_base: True if the header may name other adapters, and an adapter another base.
        rounding: See `fuse`.
        seed: See `fuse`.

    Raises:
        AdapterError: An adapter does not fit, its kind needs the base, or the header does not name it.
        BaseModelError: A model cannot be read, or the base is another one.
        SettingsError: As for `fuse`.
    """
    model = open_model(fused, component=component, architecture=architecture)
    check_output(model, output)
    original = None if base is None else open_model(base, component=component, architecture=architecture)
    weighted = read_adapters(model, adapters)
    if original is None:
        check_removable(weighted)
    else:
        check_same_tensors(model, original)
    updates = updates_by_tensor(model, weighted, sign=-1.0, reference=original)
    same = check_base(original, weighted, is_other_allowed=allow_other_base)
    changed = {file for file, _ in updates}
    remaining = {file: _without(model, file, weighted, is_other_allowed=allow_other_base) for file in changed}
    headers = {file: with_adapters(model.files[file][1], entries) for file, (entries, _) in remaining.items()}
    measure = None if original is None else _DistanceMeasure(original)
    cast = Rounding(rounding, seed)
    files = write_model(model, output, partial(_write, model, updates, headers, measure, cast))
    return replace(
        _report(files, updates, weighted, same, cast),
        recorded=all(was_named for _, was_named in remaining.values()),
        difference=None if measure is None else measure.largest,
    )


class _DistanceMeasure:
    """Measures the largest absolute difference between written tensors and those of another model."""

    def __init__(self, model: StoredModel) -> None:
        self._stored: dict[str, StoredTensor] = {
            location.name: location.stored for location in model.locations.values()
        }
        self.largest = 0.0

    def __call__(self, name: str, first: int, block: Tensor) -> None:
        stored = self._stored[name]
        source = os.open(stored.path, os.O_RDONLY)
        try:
            other = read_rows(source, stored, first, len(block))
        finally:
            os.close(source)
        self.largest = max(self.largest, float((block.double() - other.double()).abs().max()))


def _write(
    model: StoredModel,
    updates: Updates,
    headers: Mapping[Path, Mapping[str, str]],
    watch: Watch | None,
    rounding: Rounding,
    source: Path,
    target: Path,
) -> None:
    changes = {name: partial(open_updates, parts) for (file, name), parts in updates.items() if file == source}
    if changes:
        rewrite(model.files[source][0], target, headers[source], changes, watch, rounding)
    else:
        refuse_not_finite(model.files[source][0].items())
        copy_whole(source, target)


def _without(
    model: StoredModel, file: Path, weighted: list[WeightedAdapter], *, is_other_allowed: bool
) -> tuple[list[FusedAdapter], bool]:
    """Returns the header's adapters without these, and True if the header named all of these."""
    remaining = fused_adapters(model.files[file][1], file)
    has_list, was_named = bool(remaining), True
    for item in weighted:
        entry = item.entry
        match = next((e for e in remaining if (e.sha256, e.weight) == (entry.sha256, entry.weight)), None)
        if match is not None:
            remaining.remove(match)
            continue
        was_named = False
        if has_list and not is_other_allowed:
            named = ", ".join(f"{e.sha256[:16]}... with weight {e.weight:g}" for e in remaining) or "no other"
            raise AdapterError(
                f"the header does not name the adapter {entry.sha256[:16]}... with weight {item.weight:g}",
                where=str(file),
                allowed=named,
                remedy="use the adapter and the weight that were fused, or allow another one",
            )
    return remaining, was_named


def _report(
    files: list[Path], updates: Updates, weighted: list[WeightedAdapter], same: Sameness, rounding: Rounding
) -> FuseReport:
    return FuseReport(
        files,
        len({name for item in weighted if item.weight for name in item.adapter.modules}),
        len(updates),
        [item.entry for item in weighted],
        same,
        survived=rounding.survived,
        raised_scales=rounding.raised,
    )

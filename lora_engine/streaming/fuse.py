"""Adapters fused into a whole model, and taken out of it again, file by file and block by block."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lora_engine.checkpoints.tensor_files import StoredTensor
from lora_engine.errors import AdapterError
from lora_engine.streaming.blocks import FLOATS, as_bytes
from lora_engine.streaming.direct_writer import read_bytes
from lora_engine.streaming.inputs import (
    Given,
    Sameness,
    Terms,
    Weighted,
    check_base,
    check_removable,
    check_same,
    read_given,
    terms_of,
)
from lora_engine.streaming.model import StoredModel, open_model
from lora_engine.streaming.output import check_output, copy_whole, write_model
from lora_engine.streaming.provenance import FusedAdapter, fused_adapters, with_adapters
from lora_engine.streaming.rewrite import Watch, rewrite
from lora_engine.streaming.updates import open_terms


@dataclass(frozen=True)
class FuseReport:
    """What was done.

    Attributes:
        files: The files that were written.
        modules: How many modules were changed.
        tensors: How many tensors of the files were changed.
        adapters: The adapters, by digest, with the weights that they were asked for.
        fingerprint: Whether the base is the one that the adapters name: `same`, `other` (which had to be allowed), or
            `unknown` where one of the two has no fingerprint.
        recorded: When taking out: whether the model's header named these adapters.
        difference: When taking out, with a base: the largest difference of an element of a changed tensor to the base;
            None without one.
    """

    files: list[Path]
    modules: int
    tensors: int
    adapters: list[FusedAdapter]
    fingerprint: Sameness = "unknown"
    recorded: bool = False
    difference: float | None = None


def fuse(
    base: Path,
    adapters: Weighted,
    output: Path,
    *,
    component: str | None = None,
    architecture: str | None = None,
    allow_other_base: bool = False,
) -> FuseReport:
    """Adds adapters into the weights of a model and writes it as a new one of the same layout.

    The sum is formed in float32 (float64 for float64 weights) and cast to the weight's dtype once. Every adapter refers
    to the weights as they are in the base, whatever the others do. All other tensors keep their bytes.

    Args:
        base: A diffusers folder, a component's folder or file, or an original single file; see `open_model`.
        adapters: Files (or folders) of adapters of any format and kind, each with its weight.
        output: Where the new model goes; a folder where the base is one. It appears whole or not at all.
        component: What a component's file is, where nothing else tells it.
        architecture: Of an original single file, where nothing else tells it.
        allow_other_base: Whether adapters may name another base by fingerprint.

    Raises:
        AdapterError: An adapter does not fit (a module that is missing, a shape); nothing is written.
        BaseModelError: The base cannot be read, or is not the one that an adapter names; nothing is written.
        SettingsError: No adapter, a weight that is not finite, or an output that cannot be; nothing is written.
    """
    model = open_model(base, component=component, architecture=architecture)
    check_output(model, output)
    given = read_given(model, adapters)
    terms = terms_of(model, given, sign=1.0)
    same = check_base(model, given, is_other_allowed=allow_other_base)
    entries = [one.entry for one in given]
    headers = {
        file: with_adapters(model.files[file][1], [*fused_adapters(model.files[file][1], file), *entries])
        for file in {file for file, _ in terms}
    }
    files = write_model(model, output, partial(_write, model, terms, headers, None))
    return _report(files, terms, given, same)


def unfuse(
    fused: Path,
    adapters: Weighted,
    output: Path,
    *,
    base: Path | None = None,
    component: str | None = None,
    architecture: str | None = None,
    allow_other_base: bool = False,
) -> FuseReport:
    """Takes adapters out of a model that they were fused into.

    Exact up to the rounding of the weights' dtype: the fused weights were rounded, and what that took cannot come back.
    With a base, the report's `difference` tells how far from it the result is.

    Args:
        fused: The model; see `open_model`.
        adapters: The adapters with the weights that they were fused with.
        output: Where the new model goes.
        base: The model before; needed by kinds whose delta depends on the weight (DoRA, OFT, IA3).
        component: See `fuse`.
        architecture: See `fuse`.
        allow_other_base: Whether to go on where the header names other adapters, or an adapter another base.

    Raises:
        AdapterError: An adapter does not fit, its kind needs the base, or the header does not name it.
        BaseModelError: A model cannot be read, or the base is another one; nothing is written.
        SettingsError: As `fuse`.
    """
    model = open_model(fused, component=component, architecture=architecture)
    check_output(model, output)
    original = None if base is None else open_model(base, component=component, architecture=architecture)
    given = read_given(model, adapters)
    if original is None:
        check_removable(given)
    else:
        check_same(model, original)
    terms = terms_of(model, given, sign=-1.0, reference=original)
    same = check_base(original, given, is_other_allowed=allow_other_base)
    changed = {file for file, _ in terms}
    remaining = {file: _without(model, file, given, is_other_allowed=allow_other_base) for file in changed}
    headers = {file: with_adapters(model.files[file][1], left) for file, (left, _) in remaining.items()}
    gauge = None if original is None else _Gauge(original)
    files = write_model(model, output, partial(_write, model, terms, headers, gauge))
    return replace(
        _report(files, terms, given, same),
        recorded=all(was_named for _, was_named in remaining.values()),
        difference=None if gauge is None else gauge.largest,
    )


class _Gauge:
    """Measures how far the tensors that are written are from those of another model."""

    def __init__(self, model: StoredModel) -> None:
        self._stored: dict[str, StoredTensor] = {place.name: place.stored for place in model.places.values()}
        self.largest = 0.0

    def __call__(self, name: str, first: int, block: Tensor) -> None:
        stored = self._stored[name]
        other = torch.empty(block.shape, dtype=FLOATS[stored.dtype])
        source = os.open(stored.path, os.O_RDONLY)
        try:
            read_bytes(source, as_bytes(other), stored.offset + first * block.shape[1] * other.element_size())
        finally:
            os.close(source)
        self.largest = max(self.largest, float((block.double() - other.double()).abs().max()))


def _write(
    model: StoredModel,
    terms: Terms,
    headers: Mapping[Path, Mapping[str, str]],
    watch: Watch | None,
    source: Path,
    target: Path,
) -> None:
    changes = {name: partial(open_terms, found) for (file, name), found in terms.items() if file == source}
    if changes:
        rewrite(model.files[source][0], target, headers[source], changes, watch)
    else:
        copy_whole(source, target)


def _without(
    model: StoredModel, file: Path, given: list[Given], *, is_other_allowed: bool
) -> tuple[list[FusedAdapter], bool]:
    """The adapters that a file's header names without these, and whether it named them all."""
    left = fused_adapters(model.files[file][1], file)
    has_list, was_named = bool(left), True
    for one in given:
        match = next((e for e in left if (e.sha256, e.weight) == (one.entry.sha256, one.entry.weight)), None)
        if match is not None:
            left.remove(match)
            continue
        was_named = False
        if has_list and not is_other_allowed:
            named = ", ".join(f"{entry.sha256[:16]}... with weight {entry.weight:g}" for entry in left) or "no other"
            raise AdapterError(
                f"the header does not name the adapter {one.entry.sha256[:16]}... with weight {one.weight:g}",
                where=str(file),
                allowed=named,
                remedy="give the adapter and the weight that were fused, or allow another one",
            )
    return left, was_named


def _report(files: list[Path], terms: Terms, given: list[Given], same: Sameness) -> FuseReport:
    modules = {name for one in given if one.weight for name in one.adapter.modules}
    return FuseReport(files, len(modules), len(terms), [one.entry for one in given], same)

"""Approximates modules that a file format cannot hold by the nearest LoRA, and measures the loss."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lora_engine.adapters import Adapter, Delta, LoraDelta
from lora_engine.adapters.adapted import innermost
from lora_engine.adapters.tree import ModuleTree
from lora_engine.errors import AdapterError
from lora_engine.formats.codec import Codec, Names, codecs
from lora_engine.merging.resize import to_lora

ENERGY = 0.99
"""Default share of the squared Frobenius norm to keep."""
_BLOCK = re.compile(r".*?\.\d+(?=\.)")


@dataclass(frozen=True)
class Approximation:
    """An adapter that a format can hold, and its accuracy.

    Attributes:
        adapter: The adapter to write; modules that the format can hold are the same objects.
        retained: Module to the share of the squared Frobenius norm of its difference that was kept, in [0, 1]; 0 for a
            module that was left out. Empty if nothing was approximated.
        total: The share over all modules, including exact ones.
    """

    adapter: Adapter
    retained: Mapping[str, float]
    total: float


def approximate(
    adapter: Adapter,
    format: str,  # noqa: A002 (as in `write_adapter`)
    *,
    rank: int | None = None,
    energy: float | None = None,
    base: ModuleTree | None = None,
    module_names: Names | None = None,
) -> Approximation:
    """Returns the nearest adapter that a format can hold; the same object if the format can hold every module.

    Args:
        adapter: The adapter.
        format: Name of a codec.
        rank: Maximum rank of an approximation; None sets no limit.
        energy: Share of the squared norm to keep; None means `ENERGY`, or no bound if a rank is given.
        base: The base with its weights; DoRA, OFT and (IA)3 need it.
        module_names: Module names with shapes; LoHa and LoKr need them if there is no base.

    Raises:
        AdapterError: A module needs the base, or no module can be approximated.
        SettingsError: No such format, or an invalid rank or share.
    """
    codec = codecs[format]
    shapes = module_names if isinstance(module_names, Mapping) else {}
    share = ENERGY if energy is None and rank is None else energy
    done, retained, sizes = adapter, {}, {}
    # The new LoRA modules may not be allowed together with the remaining ones, so check again until nothing is refused.
    while refused := _refused(done, codec, module_names):
        modules = dict(done.modules)
        for name in refused:
            approximation, retained[name], sizes[name] = _nearest(
                name, modules.pop(name), _layer(base, name), shapes.get(name), rank, share
            )
            if approximation is not None:
                modules[name] = approximation
        if not modules:
            problem = "no module of the adapter can be approximated by LoRA: all weights are vectors"
            raise AdapterError(problem, where=refused[0], remedy="choose another format")
        done = replace(adapter, modules={name: modules[name] for name in adapter.modules if name in modules})
    if done is adapter:
        return Approximation(adapter, {}, 1.0)
    for name, delta in adapter.modules.items():
        if name not in retained:
            sizes[name] = _size(delta, _layer(base, name), shapes.get(name))
    after, before = sum(size * retained.get(name, 1.0) for name, size in sizes.items()), sum(sizes.values())
    return Approximation(done, retained, after / before if before else 1.0)


def _refused(adapter: Adapter, codec: Codec, names: Names | None) -> list[str]:
    """Returns the modules that a format refuses, without those that are LoRA already.

    Some formats fuse modules of a block, and some need one kind for all modules. If a block or the whole adapter is
    refused, although its modules are accepted one by one, returns all of its modules.
    """
    others = {name for name, delta in adapter.modules.items() if delta.kind != LoraDelta.kind}
    refused = {name for name in others if not _accepts(codec, adapter, {name}, names)}
    blocks: dict[str, set[str]] = {}
    for name in adapter.modules:
        if name not in refused and (start := _BLOCK.match(name)):
            blocks.setdefault(start[0], set()).add(name)
    for block in blocks.values():
        if block & others and len(block) > 1 and not _accepts(codec, adapter, block, names):
            refused |= block & others
    if not refused and others and not _accepts(codec, adapter, set(adapter.modules), names):
        refused = others
    return [name for name in adapter.modules if name in refused]


def _accepts(codec: Codec, adapter: Adapter, chosen: set[str], names: Names | None) -> bool:
    modules = {name: delta for name, delta in adapter.modules.items() if name in chosen}
    try:
        codec.encode(replace(adapter, modules=modules), None, names)
    except AdapterError:
        return False
    return True


def _nearest(
    name: str, delta: Delta, layer: nn.Module | None, shape: Sequence[int] | None, rank: int | None, share: float | None
) -> tuple[Delta | None, float, float]:
    """Returns the nearest LoRA (None for a vector), the share that it keeps, and the squared norm before."""
    weight, bias = _parameter(layer, "weight"), _parameter(layer, "bias")
    known = tuple(shape) if weight is None and shape is not None else None
    if len(_shape(delta, weight, known)) < 2:
        return None, 0.0, _size(delta, layer, shape)
    try:
        lora, retained = to_lora(
            delta,
            weight,
            shape=known,
            base_bias=bias,
            rank=rank,
            energy=share,
            generator=torch.Generator().manual_seed(0),
        )
    except AdapterError as error:
        remedy = "name the base with its weights" if layer is None else error.remedy
        raise AdapterError(error.problem, where=error.where or name, allowed=error.allowed, remedy=remedy) from error
    size = _size(lora, None, None) / retained if retained else 0.0
    dtype = next(iter(delta.factors().values())).dtype
    return lora.with_factors({key: factor.to(dtype) for key, factor in lora.factors().items()}), retained, size


def _layer(base: ModuleTree | None, name: str) -> nn.Module | None:
    return None if base is None else innermost(base.get_module(name))


def _parameter(layer: nn.Module | None, name: str) -> Tensor | None:
    parameter = getattr(layer, name, None)
    return parameter.detach() if isinstance(parameter, Tensor) else None


def _shape(delta: Delta, weight: Tensor | None, known: Sequence[int] | None) -> Sequence[int]:
    if weight is not None:
        return weight.shape
    diff = delta.factors().get("diff")
    return known or (diff.shape if diff is not None else (1, 1))


def _size(delta: Delta, layer: nn.Module | None, shape: Sequence[int] | None) -> float:
    """Returns the squared norm of the difference; a LoRA needs no weight for it."""
    weight = _parameter(layer, "weight")
    if weight is None and isinstance(delta, LoraDelta):
        plain = delta.without_core()
        weight = torch.zeros(plain.up.shape[0], plain.down.flatten(1).shape[1])
        delta = plain
    if weight is None:
        known = _shape(delta, None, shape)
        weight = torch.zeros(tuple(known)) if shape is not None or "diff" in delta.factors() else None
    return 0.0 if weight is None else float(delta.delta_weight(weight).double().square().sum())

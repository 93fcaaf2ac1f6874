"""Making an adapter fit a format that cannot hold all of it: each module that it refuses becomes the nearest LoRA.

The compression itself is `lora_engine.merging`'s; here is which modules need it, and what is lost by it.
"""

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

ENERGY = 0.99
"""Share of the squared Frobenius norm that is kept where nothing else is asked for."""
_BLOCK = re.compile(r".*?\.\d+(?=\.)")


@dataclass(frozen=True)
class Approximation:
    """An adapter that a format can hold, and how near it is.

    Attributes:
        adapter: What can be written; modules that the format holds as they are are the very same.
        retained: Module to the share of the squared Frobenius norm of its difference that was kept, in [0, 1]; 0 for a
            module that had to be left out. Empty where nothing had to be approximated.
        total: The share over all modules, those among them that are exact.
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
    """The adapter as near as a format can hold it; exact, and the same object, where it holds every module.

    Args:
        adapter: The adapter.
        format: Name of a codec.
        rank: Largest rank of an approximation; None sets no limit.
        energy: Share of the squared norm to keep; None stands for `ENERGY` unless a rank is given.
        base: The base with its weights, which DoRA, OFT and (IA)3 say nothing without.
        module_names: With shapes, where no base is given: what LoHa and LoKr need.

    Raises:
        AdapterError: A module needs the base; or no module of the adapter can be in the format.
        SettingsError: No such format, or an impossible rank or share.
    """
    codec = codecs[format]
    shapes = module_names if isinstance(module_names, Mapping) else {}
    share = ENERGY if energy is None and rank is None else energy
    done, retained, sizes = adapter, {}, {}
    # What stays as it was may not go together with what became LoRA, so the format is asked again.
    while wanted := _refused(done, codec, module_names):
        modules = dict(done.modules)
        for name in wanted:
            found, retained[name], sizes[name] = _nearest(
                name, modules.pop(name), _layer(base, name), shapes.get(name), rank, share
            )
            if found is not None:
                modules[name] = found
        if not modules:
            problem = "no module of the adapter can be approximated by LoRA: all are differences of vectors"
            raise AdapterError(problem, where=wanted[0], remedy="choose another format")
        done = replace(adapter, modules={name: modules[name] for name in adapter.modules if name in modules})
    if done is adapter:
        return Approximation(adapter, {}, 1.0)
    for name, delta in adapter.modules.items():
        if name not in retained:
            sizes[name] = _size(delta, _layer(base, name), shapes.get(name))
    kept, before = sum(size * retained.get(name, 1.0) for name, size in sizes.items()), sum(sizes.values())
    return Approximation(done, retained, kept / before if before else 1.0)


def _refused(adapter: Adapter, codec: Codec, names: Names | None) -> list[str]:
    """The modules that a format does not take as they are, those that are LoRA already left out.

    Some formats put modules of one block together, and some want one kind throughout. Where that is refused, and none
    of the modules alone, it is all of the block, or all.
    """
    others = {name for name, delta in adapter.modules.items() if delta.kind != LoraDelta.kind}
    found = {name for name in others if not _takes(codec, adapter, {name}, names)}
    blocks: dict[str, set[str]] = {}
    for name in adapter.modules:
        if name not in found and (start := _BLOCK.match(name)):
            blocks.setdefault(start[0], set()).add(name)
    for block in blocks.values():
        if block & others and len(block) > 1 and not _takes(codec, adapter, block, names):
            found |= block & others
    if not found and others and not _takes(codec, adapter, set(adapter.modules), names):
        found = others
    return [name for name in adapter.modules if name in found]


def _takes(codec: Codec, adapter: Adapter, chosen: set[str], names: Names | None) -> bool:
    modules = {name: delta for name, delta in adapter.modules.items() if name in chosen}
    try:
        codec.encode(replace(adapter, modules=modules), None, names)
    except AdapterError:
        return False
    return True


def _nearest(
    name: str, delta: Delta, layer: nn.Module | None, shape: Sequence[int] | None, rank: int | None, share: float | None
) -> tuple[Delta | None, float, float]:
    """The nearest LoRA (None for a vector, which has no rank), the share that it keeps, and the squared norm before."""
    # Merging reads adapter files, so it is imported when it is needed.
    from lora_engine.merging.resize import to_lora

    weight, bias = _of(layer, "weight"), _of(layer, "bias")
    known = tuple(shape) if weight is None and shape is not None else None
    if len(_shape(delta, weight, known)) < 2:
        return None, 0.0, _size(delta, layer, shape)
    try:
        found, retained = to_lora(
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
    size = _size(found, None, None) / retained if retained else 0.0
    dtype = next(iter(delta.factors().values())).dtype
    return found.with_factors({key: factor.to(dtype) for key, factor in found.factors().items()}), retained, size


def _layer(base: ModuleTree | None, name: str) -> nn.Module | None:
    return None if base is None else innermost(base.get_module(name))


def _of(layer: nn.Module | None, name: str) -> Tensor | None:
    found = getattr(layer, name, None)
    return found.detach() if isinstance(found, Tensor) else None


def _shape(delta: Delta, weight: Tensor | None, known: Sequence[int] | None) -> Sequence[int]:
    if weight is not None:
        return weight.shape
    diff = delta.factors().get("diff")
    return known or (diff.shape if diff is not None else (1, 1))


def _size(delta: Delta, layer: nn.Module | None, shape: Sequence[int] | None) -> float:
    """The squared norm of the difference; of an exact LoRA from its factors, whose weight need not be known."""
    weight = _of(layer, "weight")
    if weight is None and isinstance(delta, LoraDelta):
        plain = delta.without_core()
        weight = torch.zeros(plain.up.shape[0], plain.down.flatten(1).shape[1])
        delta = plain
    if weight is None:
        known = _shape(delta, None, shape)
        weight = torch.zeros(tuple(known)) if shape is not None or "diff" in delta.factors() else None
    return 0.0 if weight is None else float(delta.delta_weight(weight).double().square().sum())

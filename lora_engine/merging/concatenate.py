"""Combines LoRA adapters exactly, by concatenating their ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lora_engine.adapters import Adapter, Delta, LoraDelta
from lora_engine.errors import AdapterError, SettingsError
from lora_engine.merging.compress import plain_factors
from lora_engine.merging.deltas import common_shape, content_digest
from lora_engine.merging.spec import Weight


def concatenate(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """Returns the adapter whose delta is exactly the weighted sum of the deltas.

    In each module the ranks add up, and alpha is the rank of the result, for scale 1. `down` and `up` are both
    multiplied by the square root of weight times scale, which keeps both in range. Modules may differ between the
    adapters. A module of one adapter only, with weight 1, does not change.

    Args:
        adapters: At least one.
        weights: One finite number per adapter.

    Returns:
        Factors in the widest of the dtypes; at least float32 if several are combined.

    Raises:
        SettingsError: No adapter, a wrong number of weights, or a weight that is not finite.
        AdapterError: Families, bases or shapes differ, or a kind has no factors to concatenate.
    """
    check_bases(adapters, weights)
    names = sorted({name for adapter in adapters for name in adapter.modules})
    modules = {}
    for name in names:
        deltas = [(a.modules[name], float(w)) for a, w in zip(adapters, weights, strict=True) if name in a.modules]
        modules[name] = combine_exactly(name, deltas)
    bases = {adapter.base for adapter in adapters if adapter.base}
    fingerprints = {adapter.fingerprint for adapter in adapters if adapter.fingerprint}
    return Adapter(modules, next(iter(bases), ""), next(iter(fingerprints), None))


def combine_exactly(name: str, weighted_deltas: Sequence[tuple[Delta, float]]) -> Delta:
    """Returns the weighted sum in one module: concatenated LoRA factors, or a single delta of weight 1 unchanged.

    The order of the deltas does not change the result, bit for bit. Biases are summed.

    Raises:
        AdapterError: A kind has no rank, or shapes differ.
    """
    if len(weighted_deltas) == 1 and weighted_deltas[0][1] == 1.0:
        return weighted_deltas[0][0]
    loras = require_lora(name, [delta for delta, _ in weighted_deltas])
    shape = common_shape(name, loras)
    weights = [weight for _, weight in weighted_deltas]
    downs: list[Tensor] = []
    ups: list[Tensor] = []
    biases: list[Tensor] = []
    # Sorted by content: the order of the adapters must not change a byte.
    for delta, weight in sorted(zip(loras, weights, strict=True), key=_order):
        size = weight * delta.scale
        root = math.sqrt(abs(size))
        down, up = plain_factors(delta)
        downs.append(down * math.copysign(root, size))
        ups.append(up * root)
        if delta.bias is not None:
            biases.append(weight * delta.bias.to(torch.promote_types(delta.bias.dtype, torch.float32)))
    dtype = torch.float64 if any(part.dtype == torch.float64 for part in downs + ups) else torch.float32
    down = torch.cat([part.to(dtype) for part in downs])
    up = torch.cat([part.to(dtype) for part in ups], dim=1)
    ones = [1 for _ in shape[2:]]
    bias = torch.stack(biases).sum(0) if biases else None
    rank = down.shape[0]
    return LoraDelta(down.reshape(rank, *shape[1:]), up.reshape(shape[0], rank, *ones), float(rank), bias=bias)


def check_bases(adapters: Sequence[Adapter], weights: Sequence[Weight]) -> None:
    """Raises if adapters and weights cannot be merged.

    Raises:
        SettingsError: No adapter, a wrong number of weights, or a weight that is not finite.
        AdapterError: The adapters are for different families or bases.
    """
    if not adapters or len(adapters) != len(weights):
        raise SettingsError(
            f"{len(weights)} weights for {len(adapters)} adapters",
            allowed="one weight for each adapter, and at least one adapter",
            remedy="pass one weight per adapter",
        )
    for weight in weights:
        for number in weight.values() if isinstance(weight, Mapping) else (weight,):
            if not math.isfinite(number):
                raise SettingsError(f"the weight {number!r}", allowed="a finite number", remedy="choose another weight")
    for noun, values in (
        ("families of base models", {adapter.base for adapter in adapters if adapter.base}),
        ("base models", {adapter.fingerprint for adapter in adapters if adapter.fingerprint}),
    ):
        if len(values) > 1:
            raise AdapterError(
                f"the adapters are for different {noun}: {', '.join(sorted(values))}",
                allowed="adapters for one base",
                remedy="merge adapters that were trained for one base",
            )


def require_lora(name: str, deltas: Sequence[Delta]) -> list[LoraDelta]:
    """Returns the deltas, all of kind LoRA.

    Raises:
        AdapterError: A delta is of another kind.
    """
    for delta in deltas:
        if not isinstance(delta, LoraDelta):
            raise AdapterError(
                f"an adapter of kind {delta.kind!r} has no ranks to concatenate",
                where=name,
                allowed="lora",
                remedy="choose method linear, which is also exact, or another method for dense deltas",
            )
    return [delta for delta in deltas if isinstance(delta, LoraDelta)]


def _order(weighted_delta: tuple[LoraDelta, float]) -> tuple[str, float]:
    return content_digest(weighted_delta[0]), weighted_delta[1]

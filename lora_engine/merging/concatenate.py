"""The exact linear combination of adapters, by putting their ranks side by side."""

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
    """The adapter whose delta is the weighted sum of the deltas, exactly: no averaging of factors, no compression.

    In each module the ranks add up and alpha is the rank of the result, so its scale is 1. A weight and a scale go into
    `down` and `up` by equal parts (square roots), which keeps both in range. Modules may differ between the adapters.
    Where one adapter alone has a module, with weight 1, the module stays as it is.

    Args:
        adapters: At least one.
        weights: One for each; any finite number.

    Returns:
        Factors in the widest of the dtypes; at least float32 where several are combined.

    Raises:
        SettingsError: No adapter, another number of weights, or a weight that is not finite.
        AdapterError: Another family, base, shape, or a kind that has no factors to put side by side.
    """
    check_bases(adapters, weights)
    names = sorted({name for adapter in adapters for name in adapter.modules})
    modules = {}
    for name in names:
        terms = [(a.modules[name], float(w)) for a, w in zip(adapters, weights, strict=True) if name in a.modules]
        modules[name] = combine_exactly(name, terms)
    bases = {adapter.base for adapter in adapters if adapter.base}
    fingerprints = {adapter.fingerprint for adapter in adapters if adapter.fingerprint}
    return Adapter(modules, next(iter(bases), ""), next(iter(fingerprints), None))


def combine_exactly(name: str, terms: Sequence[tuple[Delta, float]]) -> Delta:
    """One module's weighted sum: a single delta with weight 1 as it is, else LoRA factors side by side.

    The order of the terms does not matter, bit for bit; biases are summed.

    Raises:
        AdapterError: A kind without ranks, or shapes that differ.
    """
    if len(terms) == 1 and terms[0][1] == 1.0:
        return terms[0][0]
    plain = refuse_others(name, [delta for delta, _ in terms])
    shape = common_shape(name, plain)
    weights = [weight for _, weight in terms]
    downs: list[Tensor] = []
    ups: list[Tensor] = []
    biases: list[Tensor] = []
    # In an order of their own, so that the order of the adapters does not change a byte.
    for delta, weight in sorted(zip(plain, weights, strict=True), key=_order):
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
    """Does nothing where adapters and weights can be merged at all.

    Raises:
        SettingsError: No adapter, another number of weights, or a weight that is not finite.
        AdapterError: The adapters are for different families or bases.
    """
    if not adapters or len(adapters) != len(weights):
        raise SettingsError(
            f"{len(weights)} weights for {len(adapters)} adapters",
            allowed="one weight for each adapter, and at least one adapter",
            remedy="give every adapter its weight",
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
                remedy="merge adapters that were made for one base",
            )


def refuse_others(name: str, deltas: Sequence[Delta]) -> list[LoraDelta]:
    """The deltas, which are all LoRA.

    Raises:
        AdapterError: One is not.
    """
    for delta in deltas:
        if not isinstance(delta, LoraDelta):
            raise AdapterError(
                f"an adapter of kind {delta.kind!r} has no ranks to put side by side",
                where=name,
                allowed="lora",
                remedy="choose method linear, which is as exact, or another that works on dense deltas",
            )
    return [delta for delta in deltas if isinstance(delta, LoraDelta)]


def _order(term: tuple[LoraDelta, float]) -> tuple[str, float]:
    return content_digest(term[0]), term[1]

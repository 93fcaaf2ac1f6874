"""The exact linear combination of adapters, by putting their ranks side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lora_engine.adapters import Adapter, Delta, LoraDelta
from lora_engine.errors import AdapterError, SettingsError
from lora_engine.files import sha256_bytes


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
    _check(adapters, weights)
    names = sorted({name for adapter in adapters for name in adapter.modules})
    modules = {}
    for name in names:
        terms = [(a.modules[name], float(w)) for a, w in zip(adapters, weights, strict=True) if name in a.modules]
        modules[name] = _combine(name, terms)
    bases = {adapter.base for adapter in adapters if adapter.base}
    fingerprints = {adapter.fingerprint for adapter in adapters if adapter.fingerprint}
    return Adapter(modules, next(iter(bases), ""), next(iter(fingerprints), None))


def _combine(name: str, terms: list[tuple[Delta, float]]) -> Delta:
    if len(terms) == 1 and terms[0][1] == 1.0:
        return terms[0][0]
    downs: list[Tensor] = []
    ups: list[Tensor] = []
    # In an order of their own, so that the order of the adapters does not change a byte.
    for delta, weight in sorted(((_plain(name, delta), weight) for delta, weight in terms), key=_order):
        size = weight * delta.scale
        root = math.sqrt(abs(size))
        downs.append(_wide(delta.down) * math.copysign(root, size))
        ups.append(_wide(delta.up) * root)
    downs, ups = _aligned(downs), _aligned(ups)
    shapes = {(tuple(down.shape[1:]), up.shape[0]) for down, up in zip(downs, ups, strict=True)}
    if len(shapes) > 1:
        shown = ", ".join(f"{list(inner)} -> {out}" for inner, out in sorted(shapes))
        raise AdapterError(
            f"the adapters' factors have different shapes: {shown}",
            where=name,
            allowed="adapters for the same base",
            remedy="merge adapters that were made for one base",
        )
    dtype = torch.float64 if any(part.dtype == torch.float64 for part in downs + ups) else torch.float32
    down = torch.cat([part.to(dtype) for part in downs])
    up = torch.cat([part.to(dtype) for part in ups], dim=1)
    return LoraDelta(down, up, float(down.shape[0]))


def _plain(name: str, delta: Delta) -> LoraDelta:
    if not isinstance(delta, LoraDelta):
        raise AdapterError(
            f"an adapter of kind {delta.kind!r} has no ranks to put side by side",
            where=name,
            allowed="lora",
            remedy="choose a merge method that works on dense deltas",
        )
    return delta.without_core()


def _order(term: tuple[LoraDelta, float]) -> tuple[float, float, str]:
    delta, weight = term
    content = b"".join(_wide(factor).contiguous().cpu().numpy().tobytes() for factor in (delta.down, delta.up))
    return weight, delta.alpha, sha256_bytes(content)


def _wide(factor: Tensor) -> Tensor:
    return factor.to(torch.promote_types(factor.dtype, torch.float32))


def _aligned(factors: list[Tensor]) -> list[Tensor]:
    """All with four dimensions where one has (a 1x1 convolution's factors may come with two)."""
    dims = max(factor.dim() for factor in factors)
    return [factor.reshape(*factor.shape, *(1 for _ in range(dims - factor.dim()))) for factor in factors]


def _check(adapters: Sequence[Adapter], weights: Sequence[float]) -> None:
    if not adapters or len(adapters) != len(weights):
        raise SettingsError(
            f"{len(weights)} weights for {len(adapters)} adapters",
            allowed="one weight for each adapter, and at least one adapter",
            remedy="give every adapter its weight",
        )
    for weight in weights:
        if not math.isfinite(weight):
            raise SettingsError(f"the weight {weight!r}", allowed="a finite number", remedy="choose another weight")
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

"""One module of a merge: the deltas that meet there, their shape, and their dense form.

What a method makes of them is the method's affair; how the whole adapter is merged, `merge`'s.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_engine.adapters import Delta, LoraDelta, as_tree, innermost
from lora_engine.adapters.attach import Base
from lora_engine.adapters.full import FullDelta
from lora_engine.adapters.layer import bias_of
from lora_engine.adapters.loha import LohaDelta
from lora_engine.adapters.lokr import LokrDelta
from lora_engine.errors import AdapterError, EngineError
from lora_engine.files import sha256_bytes
from lora_engine.merging.compress import plain_factors, shape_of

_MEAN_THEMSELVES = frozenset({"lora", "loha", "lokr", "full"})
"""Kinds whose delta does not depend on the values of the base's weight; a law test holds the list to the kinds."""


def needs_base_values(delta: Delta) -> bool:
    """Whether a delta says what it adds only together with the base's weight (DoRA, OFT, (IA)3)."""
    return delta.kind not in _MEAN_THEMSELVES


def content_digest(delta: Delta) -> str:
    """SHA-256 over the kind, alpha and factors: what orders the deltas of a merge, whatever order they came in."""
    parts = [f"{delta.kind}:{delta.alpha!r}".encode()]
    for name, factor in sorted(delta.factors().items()):
        raw = factor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        parts += [f"{name}:{factor.dtype}:{list(factor.shape)}".encode(), raw.numpy().tobytes()]
    return sha256_bytes(b"\0".join(parts))


@dataclass(frozen=True)
class ModuleDeltas:
    """Where deltas meet.

    Attributes:
        name: Canonical name of the module.
        shape: Of its weight.
        weight: The base's, where it is given.
        bias: The base's, where it is given and there is one.
    """

    name: str
    shape: tuple[int, ...]
    weight: Tensor | None = None
    bias: Tensor | None = None

    @classmethod
    def of(
        cls,
        name: str,
        deltas: Sequence[Delta],
        base: Base | None = None,
        *,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> ModuleDeltas:
        """The site of some deltas, with the base's weight from a base model or as it is given.

        Raises:
            AdapterError: The deltas do not fit the base or each other, the shape cannot be told, or a delta needs the
                base and none is given.
        """
        if base is not None:
            layer = innermost(as_tree(base).get_module(name))
            weight, bias = layer.weight.detach(), bias_of(layer)  # type: ignore[operator]
        needy = [delta for delta in deltas if needs_base_values(delta)]
        if needy and weight is None:
            raise AdapterError(
                f"an adapter of kind {needy[0].kind!r} says what it adds only together with the base's weight",
                where=name,
                allowed=", ".join(sorted(_MEAN_THEMSELVES)),
                remedy="give the base that it was made for",
            )
        known = tuple(weight.shape) if weight is not None else shape
        found = known if known is not None else common_shape(name, deltas)
        for delta in deltas:
            for fault in delta.faults(found):
                where = f"{name}, factor {fault.factor!r}" if name else f"factor {fault.factor!r}"
                raise AdapterError(fault.problem, where=where, allowed=fault.allowed, remedy=fault.remedy)
        return cls(name, found, weight, None if bias is None else bias.detach())

    def dense(self, delta: Delta) -> tuple[Tensor, Tensor | None]:
        """What a delta adds to the weight and to the bias, at least float32."""
        weight = torch.zeros(()).expand(self.shape) if self.weight is None else self.weight
        with torch.no_grad():
            return delta.delta_weight(weight), delta.delta_bias(self.bias)

    def gram(self, deltas: Sequence[Delta]) -> Tensor:
        """Inner products of the deltas with their biases, `[n, n]` in float64; of LoRA without forming a delta."""
        if all(isinstance(delta, LoraDelta) for delta in deltas):
            return _gram_of_factors([delta for delta in deltas if isinstance(delta, LoraDelta)])
        dense = [self.dense(delta) for delta in deltas]
        inner = _products([weight.flatten().double() for weight, _ in dense])
        return inner + _products([None if bias is None else bias.double() for _, bias in dense])


def _gram_of_factors(deltas: Sequence[LoraDelta]) -> Tensor:
    # <U1 D1, U2 D2> = sum((U1' U2) * (D1 D2'))
    factors = [tuple(factor.double() for factor in plain_factors(delta)) for delta in deltas]
    inner = torch.zeros(len(deltas), len(deltas), dtype=torch.float64)
    for i, (down, up) in enumerate(factors):
        for j, (other_down, other_up) in enumerate(factors[: i + 1]):
            product = ((up.T @ other_up) * (down @ other_down.T)).sum() * (deltas[i].scale * deltas[j].scale)
            inner[i, j] = inner[j, i] = float(product)
    return inner + _products([None if delta.bias is None else delta.bias.double() for delta in deltas])


@contextmanager
def located(name: str) -> Iterator[None]:
    """Adds the module's name to the errors of what works on its tensors alone."""
    try:
        yield
    except EngineError as error:
        if error.where:
            raise
        raise error.at(name) from error


def full_delta(weight: Tensor, bias: Tensor | None) -> FullDelta:
    """The dense difference as a delta; a weight's difference of zero beside one of the bias is left out."""
    diff = None if bias is not None and not bool(weight.any()) else weight.float().contiguous()
    return FullDelta(diff, None if bias is None else bias.float().contiguous())


def _products(vectors: Sequence[Tensor | None]) -> Tensor:
    inner = torch.zeros(len(vectors), len(vectors), dtype=torch.float64)
    for i, first in enumerate(vectors):
        for j, second in enumerate(vectors[: i + 1]):
            if first is not None and second is not None:
                inner[i, j] = inner[j, i] = float(first @ second)
    return inner


def common_shape(name: str, deltas: Sequence[Delta]) -> tuple[int, ...]:
    """The shape of the weight that all deltas are for, as far as their factors tell.

    Raises:
        AdapterError: It cannot be told, or they disagree.
    """
    told = [shape for shape in map(_own_shape, deltas) if shape is not None]
    if not told:
        raise AdapterError(
            f"the shape of the weight does not follow from an adapter of kind {deltas[0].kind!r}",
            where=name,
            remedy="give the base that it was made for",
        )
    # Factors may leave a kernel out, in the shape of a linear layer of the same size.
    kernels = {shape for shape in told if math.prod(shape[2:]) > 1}
    if len(kernels) > 1 or len({(shape[0], math.prod(shape[1:])) for shape in told}) > 1:
        shown = ", ".join(str(list(shape)) for shape in sorted(set(told)))
        raise AdapterError(
            f"the adapters' factors have different shapes, for weights {shown}",
            where=name,
            allowed="adapters for the same base",
            remedy="merge adapters that were made for one base",
        )
    return kernels.pop() if kernels else max(told, key=len)


def _own_shape(delta: Delta) -> tuple[int, ...] | None:
    if isinstance(delta, LoraDelta):
        return shape_of(delta)
    if isinstance(delta, LohaDelta | LokrDelta):
        core = delta.core1 if isinstance(delta, LohaDelta) else delta.right_core
        return delta.sides if core is None else (*delta.sides, *core.shape[2:])
    if isinstance(delta, FullDelta) and delta.diff is not None:
        return tuple(delta.diff.shape)
    return None

"""One module of a merge: checks the deltas of several adapters against it, and computes their dense form.

`methods` combine the deltas of a module; `merge` merges whole adapters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_engine.adapters import Delta, LoraDelta, as_tree, innermost, kinds
from lora_engine.adapters.full import FullDelta
from lora_engine.adapters.layer import bias_of
from lora_engine.adapters.tree import Base
from lora_engine.errors import AdapterError, EngineError
from lora_engine.files import sha256_bytes
from lora_engine.merging.compress import plain_factors


def content_digest(delta: Delta) -> str:
    """Returns the SHA-256 of kind, alpha and factors; it defines the order of the deltas in a merge."""
    parts = [f"{delta.kind}:{delta.alpha!r}".encode()]
    for name, factor in sorted(delta.factors().items()):
        raw = factor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        parts += [f"{name}:{factor.dtype}:{list(factor.shape)}".encode(), raw.numpy().tobytes()]
    return sha256_bytes(b"\0".join(parts))


@dataclass(frozen=True)
class ModuleDeltas:
    """One module, in which deltas of several adapters are merged.

    Attributes:
        name: Canonical name of the module.
        shape: Shape of its weight.
        weight: Weight of the base; None means unknown.
        bias: Bias of the base; None means unknown or no bias.
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
        """Checks the deltas of one module; takes weight and bias from `base` or from the arguments.

        Raises:
            AdapterError: The deltas do not fit the base or each other, the shape is unknown, or a delta needs the base
                and there is none.
        """
        if base is not None:
            layer = innermost(as_tree(base).get_module(name))
            weight, bias = layer.weight.detach(), bias_of(layer)  # type: ignore[operator]
        dependent = [delta for delta in deltas if delta.reads_base]
        if dependent and weight is None:
            raise AdapterError(
                f"the delta of an adapter of kind {dependent[0].kind!r} depends on the base's weight",
                where=name,
                allowed=", ".join(name for name, kind in kinds.items() if not kind.reads_base),
                remedy="pass the base that the adapter was trained for",
            )
        shape = tuple(weight.shape) if weight is not None else shape
        shape = shape if shape is not None else common_shape(name, deltas)
        for delta in deltas:
            for issue in delta.issues(shape):
                where = f"{name}, factor {issue.factor!r}" if name else f"factor {issue.factor!r}"
                raise AdapterError(issue.problem, where=where, allowed=issue.allowed, remedy=issue.remedy)
        return cls(name, shape, weight, None if bias is None else bias.detach())

    def dense(self, delta: Delta) -> tuple[Tensor, Tensor | None]:
        """Returns what a delta adds to the weight and to the bias, in float32 or wider."""
        weight = torch.zeros(()).expand(self.shape) if self.weight is None else self.weight
        with torch.no_grad():
            return delta.delta_weight(weight), delta.delta_bias(self.bias)

    def gram(self, deltas: Sequence[Delta]) -> Tensor:
        """Returns inner products of the deltas with biases, `[n, n]` in float64; for LoRA without dense deltas."""
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


def norm_of(delta: Delta) -> float | None:
    """Returns the Frobenius norm of a delta with its bias; None if it depends on the base's weight or its shape."""
    if delta.reads_base or delta.weight_shape is None:
        return None
    module = ModuleDeltas.of("", [delta])
    return math.sqrt(max(0.0, float(module.gram([delta]))))


@contextmanager
def located(name: str) -> Iterator[None]:
    """Adds the module's name to engine errors without a location."""
    try:
        yield
    except EngineError as error:
        if error.where:
            raise
        raise error.at(name) from error


def full_delta(weight: Tensor, bias: Tensor | None) -> FullDelta:
    """Returns a dense difference as a `FullDelta`; omits a weight difference of zero if there is one of the bias."""
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
    """Returns the weight shape that follows from the factors of all deltas.

    Raises:
        AdapterError: No factor determines the shape, or the deltas disagree.
    """
    shapes = [shape for delta in deltas if (shape := delta.weight_shape) is not None]
    if not shapes:
        raise AdapterError(
            f"an adapter of kind {deltas[0].kind!r} does not determine the shape of the weight",
            where=name,
            remedy="pass the base that the adapter was trained for",
        )
    # Factors may omit a 1 x 1 kernel, or flatten a kernel into the columns.
    kernels = {shape for shape in shapes if math.prod(shape[2:]) > 1}
    if len(kernels) > 1 or len({(shape[0], math.prod(shape[1:])) for shape in shapes}) > 1:
        shown = ", ".join(str(list(shape)) for shape in sorted(set(shapes)))
        raise AdapterError(
            f"the adapters' factors have different shapes, for weights {shown}",
            where=name,
            allowed="adapters for the same base",
            remedy="merge adapters that were trained for one base",
        )
    return kernels.pop() if kernels else max(shapes, key=len)

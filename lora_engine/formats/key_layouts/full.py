"""Factor keys of full differences: of weights and biases, of norms, and of a low rank with a sparse remainder."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_engine.adapters import Delta, FullDelta, LoraDelta
from lora_engine.errors import AdapterError
from lora_engine.formats.key_layout import LYCORIS_KEYS, TableFactorKeys
from lora_engine.formats.mapped_tensor import as_torch
from lora_engine.formats.validate import SPARSE_INDICES, SPARSE_SIZE
from lora_engine.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

_NORM = {"diff": "w_norm", "bias": "b_norm"}


_LOW_RANK = {"down": "lora_down.weight", "up": "lora_up.weight", "mid": "lora_mid.weight"}
_GROWTH = 1000
"""Largest ratio of the values of a difference to those in the file; LyCORIS' extraction keeps one in 50 by default."""


@dataclass(frozen=True)
class FullKeys(TableFactorKeys):
    """`diff` and `diff_b`; for norms, whose weight is a vector, `w_norm` and `b_norm`. Both are read for any layer."""

    def missing(self, suffixes: Collection[str]) -> str | None:
        """Returns None if either suffix is present, else the suffix of the weight."""
        return None if suffixes else self.names["diff"]

    def write(self, delta: Delta) -> dict[str, Tensor]:
        """Returns tensors by suffix; norms get their own suffixes, which other programs look for."""
        is_norm = isinstance(delta, FullDelta) and delta.diff is not None and delta.diff.dim() == 1
        names = _NORM if is_norm else self.names
        return {names[factor]: tensor for factor, tensor in delta.factors().items()}


@dataclass(frozen=True)
class RemainderKeys(TableFactorKeys):
    """LoRA and the largest values of what it leaves out, as LyCORIS extracts it with `--use_sparse_bias`.

    The difference is (up @ down + remainder) * alpha / rank, as A1111 computes it. No kind holds both parts, so it is
    read as a full difference in float32.
    """

    def read(self, tensors: Mapping[str, Tensor], alpha: float | None) -> Delta:
        """Returns the full difference of tensors by suffix.

        Raises:
            AdapterError: The parts do not fit together, or the difference is far larger than they are.
        """
        parts = {self.factor(name): as_torch(tensor) for name, tensor in tensors.items()}
        lora = LoraDelta.from_factors({name: parts[name] for name in _LOW_RANK if name in parts}, alpha)
        for issue in lora.issues():
            where = repr(_LOW_RANK.get(issue.factor, issue.factor))
            raise AdapterError(issue.problem, where=where, allowed=issue.allowed, remedy=issue.remedy)
        shape = lora.weight_shape
        if math.prod(shape) > _GROWTH * sum(part.numel() for part in parts.values()):
            raise AdapterError(
                f"the difference {list(shape)} has more than {_GROWTH} times the values of its tensors",
                remedy="extract the adapter again, without a sparse remainder",
            )
        low_rank = lora.delta_weight(torch.zeros(()).expand(shape))
        remainder = _remainder(parts, (shape[0], math.prod(shape[1:]))).reshape(shape)
        return FullDelta(low_rank + lora.scale * remainder, parts.get("bias"))


def _remainder(parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
    """Returns the remainder [out, in], dense and in float32."""
    indices, values = parts["indices"].long(), parts["values"].float()
    stated = tuple(parts["size"].long().tolist()) if parts["size"].dim() == 1 else tuple(parts["size"].shape)
    if stated != shape or indices.shape != (2, values.numel()) or values.dim() != 1:
        stored = f"{SPARSE_INDICES!r} {list(indices.shape)} and 'bias_values' {list(values.shape)}"
        raise AdapterError(
            f"{stored} of a matrix {list(stated)}",
            allowed=f"[2, n] and [n] of {list(shape)}",
            remedy="download the adapter again",
        )
    sizes = torch.tensor(shape).unsqueeze(1)
    if not bool(((indices >= 0) & (indices < sizes)).all()):
        raise AdapterError(
            f"an index of {SPARSE_INDICES!r} is outside of the matrix",
            allowed=f"0 to {shape[0] - 1} and 0 to {shape[1] - 1}",
            remedy="download the adapter again",
        )
    return torch.zeros(shape).index_put((indices[0], indices[1]), values, accumulate=True)


LYCORIS_KEYS.add(
    FullKeys(
        "full",
        {"diff": "diff", "bias": "diff_b"},
        aliases={"w_norm": "diff", "b_norm": "bias"},
        optional=("diff", "bias"),
    )
)
LYCORIS_KEYS.read_only.append(
    RemainderKeys(
        "full",
        {
            **_LOW_RANK,
            "indices": SPARSE_INDICES,
            "values": "bias_values",
            "size": SPARSE_SIZE,
            "bias": "diff_b",
        },
        optional=("mid", "bias"),
    )
)

"""What a model is conditioned on, whatever the family: named tensors, one row a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """Text embeddings and whatever else a family's `predict` needs.

    Attributes:
        tensors: By name, such as `states` [n, tokens, width] and `pooled` [n, width]; the first dimension is always n.
    """

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        return next(iter(self.tensors.values())).shape[0]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def index(self, rows: Sequence[int] | Tensor) -> Conditioning:
        """The given rows, in that order; a row may be taken more than once."""
        chosen = torch.as_tensor(rows)
        return Conditioning({name: value[chosen.to(value.device)] for name, value in self.tensors.items()})

    def to(self, device: torch.device | str) -> Conditioning:
        """The same on another device."""
        return Conditioning({name: value.to(device) for name, value in self.tensors.items()})

    def detach(self) -> Conditioning:
        """The same values, cut off from any graph."""
        return Conditioning({name: value.detach() for name, value in self.tensors.items()})

    def with_tensors(self, other: Conditioning) -> Conditioning:
        """The same rows, told more: all tensors of both; those of the other replace ones of the same name."""
        return Conditioning({**self.tensors, **other.tensors})

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """The rows of all parts, one after another."""
        return Conditioning({name: torch.cat([part[name] for part in parts]) for name in parts[0].tensors})

"""Defines the conditioning of all families: named tensors, one row per image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """Text embeddings and the other inputs of a family's `predict`.

    Attributes:
        tensors: Tensors by name, such as `states` [n, tokens, width] and `pooled` [n, width]; the first dimension is n.
    """

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        return next(iter(self.tensors.values())).shape[0]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def index(self, rows: Sequence[int] | Tensor) -> Conditioning:
        """Returns the given rows, in that order; a row may occur more than once."""
        chosen = torch.as_tensor(rows)
        return Conditioning({name: value[chosen.to(value.device)] for name, value in self.tensors.items()})

    def to(self, device: torch.device | str) -> Conditioning:
        """Returns a copy on another device."""
        return Conditioning({name: value.to(device) for name, value in self.tensors.items()})

    def detach(self) -> Conditioning:
        """Returns the same values without their autograd graph."""
        return Conditioning({name: value.detach() for name, value in self.tensors.items()})

    def with_tensors(self, other: Conditioning) -> Conditioning:
        """Returns the same rows with the tensors of both; those of `other` replace ones of the same name."""
        return Conditioning({**self.tensors, **other.tensors})

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Concatenates the rows of all parts."""
        return Conditioning({name: torch.cat([part[name] for part in parts]) for name in parts[0].tensors})

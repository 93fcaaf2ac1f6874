"""The merge methods by name: each a pure function of adapters and weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from lora_engine.adapters import Adapter
from lora_engine.merging.concatenate import concatenate
from lora_engine.registries import Registry


class MergeMethod(Protocol):
    """Gives one adapter that stands for several, each with its weight; changes none of them."""

    def __call__(self, adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
        """The merged adapter."""
        ...


METHODS: Registry[MergeMethod] = Registry("merge method")
METHODS.add("concatenate", concatenate)

"""Adapters whose weights change over the denoising steps: each layer merges them or adds their products.

A merge costs multiply-adds per change of the weights, whatever the size of the image; products cost multiply-adds per
row of the layer's input. So large weights of few rows get products, small weights of many rows are merged. All layers
start merged; at the first change, the rows that each layer computed since then decide.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn

from lora_engine.adapters.adapter import Adapter
from lora_engine.adapters.layer import meta_weight
from lora_engine.adapters.merged_weights import MergedWeights
from lora_engine.adapters.rows import RowAdapter, RowAdapters, RowFactors, find_row_obstacle
from lora_engine.adapters.tree import Base, as_tree

_PASS = 12
"""Multiply-adds in the time in which one value is read, changed and written, on a CPU."""
_CALLS = 400_000
"""Multiply-adds in the time that the calls of a product take, beside its arithmetic, on a CPU."""


class ScheduledWeights:
    """Adapters on a base with multipliers that change, until `remove`. A context manager; see `MergedWeights`.

    Args:
        base: See `MergedWeights`.
        adapters: The adapters; their multipliers are 0 until `set_multipliers`. One without modules changes nothing.

    Raises:
        AdapterError: See `MergedWeights`.
    """

    def __init__(self, base: Base, adapters: Sequence[Adapter]) -> None:
        self._base, self._adapters = base, list(adapters)
        self._merged = MergedWeights(base, adapters)
        self._tree = as_tree(base, sorted({component for adapter in adapters for component in adapter.components}))
        self._own: dict[int, RowAdapter] = {}
        self._rows: RowAdapters | None = None
        self._counts: dict[str, int] = {}
        self._handles: list[Any] = []

    def set_multipliers(self, multiplier_of: Callable[[int, str], float]) -> None:
        """Sets the strengths; see `MergedWeights.set_multipliers`."""
        if self._rows is None and self._counts:
            self._choose()
        self._merged.set_multipliers(multiplier_of)
        if self._rows is None:
            self._count()
            return
        for index, adapter in self._own.items():
            adapter.set_multipliers(partial(multiplier_of, index))
        self._rows.set_rows([(1, list(self._own.values()))])

    @property
    def products(self) -> frozenset[str]:
        """The modules that add products."""
        return frozenset(name for adapter in self._own.values() for name in adapter.factors.modules)

    def remove(self) -> None:
        """Puts the original layers and parameters back. A second call does nothing."""
        self._stop_counting()
        if self._rows is not None:
            self._rows.remove()
        self._merged.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    def _names(self) -> list[str]:
        return list(dict.fromkeys(name for adapter in self._adapters for name in adapter.modules))

    def _count(self) -> None:
        if self._handles:
            return
        for name in self._names():
            if name.startswith("text_encoder"):
                continue  # texts are encoded once
            layer = self._tree.get_module(name)
            self._handles.append(layer.register_forward_hook(partial(self._add_rows, name)))

    def _add_rows(self, name: str, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        del inputs
        self._counts[name] = self._counts.get(name, 0) + output.numel() // meta_weight(layer).shape[0]

    def _stop_counting(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _choose(self) -> None:
        """Takes the layers for which products cost less out of the merged weights."""
        self._stop_counting()
        chosen = {name for name, rows in self._counts.items() if self._adds_products(name, rows)}
        parts = [_part(adapter, chosen) for adapter in self._adapters]
        self._merged.drop(chosen)
        self._rows = RowAdapters(self._base)
        self._own = {
            index: RowAdapter(RowFactors.of(self._base, part)) for index, part in enumerate(parts) if part.modules
        }

    def _adds_products(self, name: str, rows: int) -> bool:
        parts = [_part(adapter, {name}) for adapter in self._adapters if name in adapter.modules]
        if any(find_row_obstacle(self._tree, part) for part in parts):
            return False
        rank = sum(part.modules[name].to_export().rank or 0 for part in parts)
        weight = meta_weight(self._tree.get_module(name))
        outputs, inputs = weight.shape[0], weight[0].numel()
        merge = (rank + _PASS) * outputs * inputs
        return rows * (rank * (inputs + outputs) + _PASS * outputs) + _CALLS < merge


def _part(adapter: Adapter, names: Collection[str]) -> Adapter:
    return replace(adapter, modules={name: delta for name, delta in adapter.modules.items() if name in names})

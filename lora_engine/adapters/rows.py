"""Applies a different adapter to each row of a batch, in one pass of the network. For inference.

The low-rank products of all rows are batched: `bmm` for linear layers, a convolution grouped by row for others. Ranks
are padded with zeros, which is exact. Only LoRA deltas have such products; see `row_factors`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_engine.adapters.adapted import LayerWrapper
from lora_engine.adapters.layer import LayerOp, meta_weight
from lora_engine.adapters.row_factors import RowAdapter
from lora_engine.adapters.tree import Base, as_tree
from lora_engine.errors import AdapterError


class ArrangementError(AdapterError):
    """A layer gets its rows in another arrangement than one per row of the batch, as networks of packed tokens do."""


BatchRows = Sequence[tuple[int, Sequence[RowAdapter]]]
"""Number of rows and their adapters, in the order of the batch."""


class RowAdapters:
    """The adapters on the rows of batches, until `remove`. A context manager.

    Args:
        base: See `attach`. Without attached adapters on the layers of the adapters.
        modules: Modules that are wrapped at once and always compute a product, for a network that is compiled; None
            wraps those that adapters change when they come.
        rank: Rank of all products; None is the largest of the batch.
    """

    def __init__(self, base: Base, *, modules: Sequence[str] | None = None, rank: int | None = None) -> None:
        self._tree = as_tree(base)
        self._is_fixed, self._rank = modules is not None, rank
        self._layers: dict[str, RowLayer] = {}
        self._rows: list[tuple[int, tuple[RowAdapter, ...]]] = []
        self._versions: dict[RowAdapter, int] = {}
        for name in modules or ():
            self._wrap(name)

    @torch.no_grad()
    def set_rows(self, rows: BatchRows) -> None:
        """Sets the adapters of the next batches; equal ones as before copy nothing.

        Args:
            rows: The rows. The products of neighbors with the same adapters are one product.

        Raises:
            AdapterError: A layer has an attached adapter, or the products do not fit the modules and the rank that were
                chosen at first; the rows are then as before.
        """
        chosen = [(count, tuple(adapters)) for count, adapters in rows]
        adapters = list(dict.fromkeys(adapter for _, own in chosen for adapter in own))
        if chosen != self._rows:
            self._place(chosen, adapters)
            self._rows, self._versions = chosen, {}
        for adapter in adapters:
            if self._versions.get(adapter) != adapter.version:
                for name in adapter.factors.modules:
                    self._layers[name].scale(adapter, adapter.multipliers.get(name, 1.0))
                self._versions[adapter] = adapter.version

    def _place(self, rows: Sequence[tuple[int, tuple[RowAdapter, ...]]], adapters: Sequence[RowAdapter]) -> None:
        names = list(dict.fromkeys(name for adapter in adapters for name in adapter.factors.modules))
        for name in names:
            if name not in self._layers:
                if self._is_fixed:
                    raise AdapterError("the compiled network has no products for the module", where=name)
                self._wrap(name)
        slots = {name: [(count, _slots(name, own)) for count, own in rows] for name in self._layers}
        ranks = {name: max((sum(rank for _, rank in own) for _, own in slots[name]), default=0) for name in slots}
        largest = max(ranks.values(), default=0)
        if self._rank is not None and largest > self._rank:
            raise AdapterError(
                f"the adapters of a row have rank {largest} together",
                allowed=f"at most {self._rank}",
                remedy="start the engine with that rank",
            )
        for name, layer in self._layers.items():
            rank = self._rank or ranks[name]
            layer.place(name, slots[name], rank) if rank else layer.clear()

    def _wrap(self, name: str) -> None:
        layer = self._tree.get_module(name)
        if isinstance(layer, LayerWrapper):
            raise AdapterError("an adapter is attached to the layer", where=name, remedy="detach it")
        self._layers[name] = RowLayer(layer)
        self._tree.set_module(name, self._layers[name])

    def suspend(self) -> None:
        """Puts the original layers back until `resume`; the products stay in memory."""
        for name, layer in self._layers.items():
            self._tree.set_module(name, layer.base)

    def resume(self) -> None:
        """Wraps the layers again after `suspend`."""
        for name, layer in self._layers.items():
            self._tree.set_module(name, layer)

    def remove(self) -> None:
        """Puts the original layers back. A second call does nothing."""
        self.suspend()
        self._layers, self._rows, self._versions = {}, [], {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


_Slots = list[tuple[RowAdapter, int]]


def _slots(name: str, adapters: Sequence[RowAdapter]) -> _Slots:
    own = [(adapter, adapter.factors.modules.get(name)) for adapter in adapters]
    return [(adapter, len(factors[1])) for adapter, factors in own if factors is not None]


class RowLayer(LayerWrapper):
    """A linear layer or convolution that adds a low-rank product of its own to each block of rows.

    Args:
        base: The layer.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self._op, self.training = base, LayerOp.of(base), base.training
        self.down: Tensor | None = None
        self.up: Tensor | None = None
        self.rows = 0
        self._scaled: dict[RowAdapter, list[tuple[Tensor, Tensor]]] = {}

    def place(self, name: str, rows: Sequence[tuple[int, _Slots]], rank: int) -> None:
        """Copies the factors of all rows into place; `scale` must follow for each adapter.

        Args:
            name: Canonical name of the layer.
            rows: Number of rows, and the adapters with their ranks.
            rank: Rank of the products.
        """
        # A convolution is grouped by row; the rows of a linear layer that follow each other are one matrix.
        size = 1 if self._op.dims else math.gcd(*(count for count, _ in rows))
        self.rows = sum(count for count, _ in rows)
        blocks = [slots for count, slots in rows for _ in range(count // size)]
        weight = meta_weight(self.base)
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        shape = (len(blocks), rank)
        if self.down is None or self.up is None or tuple(self.down.shape[:2]) != shape:
            self.down = torch.zeros(*shape, *weight.shape[1:], dtype=dtype, device=weight.device)
            self.up = torch.zeros(*shape, weight.shape[0], dtype=dtype, device=weight.device)
        else:
            self.down.zero_()
            self.up.zero_()
        self._scaled = {}
        for index, slots in enumerate(blocks):
            first = 0
            for adapter, own in slots:
                down, up = adapter.factors.modules[name]
                self.down[index, first : first + own] = down
                self._scaled.setdefault(adapter, []).append((up, self.up[index, first : first + own]))
                first += own

    def scale(self, adapter: RowAdapter, multiplier: float) -> None:
        """Sets the strength of an adapter in all its rows."""
        for up, place in self._scaled.get(adapter, ()):
            torch.mul(up, multiplier, out=place)

    def clear(self) -> None:
        """Drops all products: the layer computes what the base computes."""
        self.down, self.up, self._scaled = None, None, {}

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the output of the layer with the products of the rows.

        Raises:
            ArrangementError: The first dimension of the input is not that of the batch.
        """
        out: Tensor = self.base(x, *args, **kwargs)
        down, up = self.down, self.up
        if down is None or up is None:
            return out
        if len(down) > 1 and len(x) != self.rows:
            raise ArrangementError(f"a layer computes {len(x)} rows, and the batch has {self.rows}")
        x = x if x.dtype == down.dtype else x.to(down.dtype)
        if self._op.dims == 0:
            low = torch.bmm(x.reshape(len(down), -1, x.shape[-1]), down.transpose(1, 2))
            flat = out.reshape(len(down), -1, out.shape[-1])
            return flat.baddbmm_(low.to(out.dtype), up.to(out.dtype)).view(out.shape)
        return self._convolve(x, out, down, up)

    def _convolve(self, x: Tensor, out: Tensor, down: Tensor, up: Tensor) -> Tensor:
        op, (rows, rank) = self._op, down.shape[:2]
        if op.pad:
            x = F.pad(x, op.pad, mode=op.padding_mode)
        if len(x) != rows:  # one block of several rows
            low = F.conv2d(x, down[0], None, op.stride, 0 if op.pad else op.padding, op.dilation)
            up = up.expand(len(x), -1, -1)
        else:
            joined = x.reshape(1, -1, *x.shape[2:])
            kernels = down.flatten(0, 1)
            low = F.conv2d(joined, kernels, None, op.stride, 0 if op.pad else op.padding, op.dilation, rows)
        low = low.reshape(len(x), rank, -1)
        flat = out.reshape(len(x), out.shape[1], -1)
        return flat.baddbmm_(up.transpose(1, 2).to(out.dtype), low.to(out.dtype)).view(out.shape)

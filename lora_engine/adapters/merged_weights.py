"""Merges several adapters into the weights of a base for a while, with multipliers that can change.

Each change computes the weights from kept originals, never from merged ones: sums and differences of rounded weights
would drift. Removal puts the original parameters back, bit for bit.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from lora_engine.adapters.adapted import LayerWrapper, innermost
from lora_engine.adapters.adapter import Adapter
from lora_engine.adapters.attachment import check_fit
from lora_engine.adapters.delta import Delta
from lora_engine.adapters.layer import bias_of, meta_weight
from lora_engine.adapters.lora import LoraDelta
from lora_engine.adapters.tree import Base, ModuleTree, as_tree
from lora_engine.errors import AdapterError

_MAX_SETS = 16


class MergedWeights:
    """Adapters in the weights of a base, until `remove`. A context manager.

    Args:
        base: See `attach`. Without attached adapters on the layers that the adapters change.
        adapters: The adapters; their multipliers are 0 until `set_multipliers`. One without modules changes nothing.
        kept_bytes: Bytes for the weights of earlier multipliers, beside the current ones, so that returning to these
            computes nothing.

    Raises:
        AdapterError: An adapter does not fit, a layer has an attached adapter, or a layer is quantized. The base is
            unchanged.
    """

    def __init__(self, base: Base, adapters: Sequence[Adapter], *, kept_bytes: int = 0) -> None:
        for adapter in adapters:
            if adapter.modules:
                check_fit(as_tree(base, adapter.components), adapter)
        tree = as_tree(base, sorted({component for adapter in adapters for component in adapter.components}))
        deltas: dict[str, dict[int, Delta]] = {}
        for index, adapter in enumerate(adapters):
            for name, delta in adapter.modules.items():
                deltas.setdefault(name, {})[index] = delta
        layers = {name: _plain_layer(tree, name) for name in deltas}
        size = sum(_bytes(_parameter(layer.weight)) for layer in layers.values())
        sets = 1 + min(kept_bytes // max(size, 1), _MAX_SETS)
        self._layers = {name: _MergedLayer(layers[name], own, sets) for name, own in deltas.items()}

    @torch.no_grad()
    def set_multipliers(self, multiplier_of: Callable[[int, str], float]) -> None:
        """Sets the weights for other multipliers.

        Args:
            multiplier_of: Takes the number of an adapter and the name of a module; returns the strength there.
        """
        for name, layer in self._layers.items():
            layer.set({index: multiplier_of(index, name) for index in layer.adapters})

    @property
    def held_bytes(self) -> int:
        """Bytes of merged weights and of what they are computed from, without the base's own."""
        return sum(layer.held_bytes for layer in self._layers.values())

    def is_removed(self) -> bool:
        """Returns True if the base has its own parameters, unchanged, so that it can be merged into again."""
        return all(layer.has_originals() for layer in self._layers.values())

    def remove(self) -> None:
        """Puts the original parameters back; `set_multipliers` merges again. A second call does nothing."""
        for layer in self._layers.values():
            layer.restore()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


def can_merge(layer: nn.Module) -> bool:
    """Returns True for a layer with plain floating-point weights of at least 16 bits, without attached adapters."""
    weight = meta_weight(innermost(layer))
    is_plain = innermost(layer) is layer and type(layer.weight) is nn.Parameter and weight is layer.weight
    return is_plain and weight.is_floating_point() and weight.element_size() >= 2


def _plain_layer(tree: ModuleTree, name: str) -> nn.Module:
    layer = tree.get_module(name)
    if not can_merge(layer):
        problem = "an adapter is attached to it" if isinstance(layer, LayerWrapper) else "its weight is quantized"
        raise AdapterError(
            f"nothing can be merged into the layer: {problem}",
            where=name,
            remedy="detach that adapter, or attach instead of merging",
        )
    return layer


class _MergedLayer:
    """One layer, its original parameters, and what each adapter adds to them."""

    def __init__(self, layer: nn.Module, deltas: Mapping[int, Delta], sets: int) -> None:
        self._layer, self._weight = layer, _parameter(layer.weight)
        bias = bias_of(layer)
        self._bias = None if bias is None else _parameter(bias)
        self._version = self._weight._version
        self._merged: OrderedDict[tuple[float, ...], nn.Parameter] = OrderedDict()  # the current one is the last
        self._sets, self._last = sets, {}  # type: int, dict[int, float]
        self.adapters = tuple(deltas)
        low = {index: delta for index, delta in deltas.items() if _is_low_rank(delta, self._weight)}
        self._factors = _concatenate(low, self._weight) if low else None
        moved = {index: _on(delta, self._weight.device) for index, delta in deltas.items()}
        self._changes = {index: delta.delta_weight(self._weight) for index, delta in moved.items() if index not in low}
        changes = {index: delta.delta_bias(self._bias) for index, delta in moved.items()}
        self._bias_changes = {index: change for index, change in changes.items() if change is not None}

    def set(self, multipliers: Mapping[int, float]) -> None:
        """Merges with these multipliers; equal ones as before compute nothing."""
        if multipliers == self._last:
            return
        self._last = dict(multipliers)
        if not any(multipliers.values()):
            self._put_originals()
            return
        key = tuple(multipliers.values())
        if key in self._merged:
            self._merged.move_to_end(key)
        else:
            self._merged[key] = self._merge(multipliers)
        self._layer.weight = self._merged[key]
        if self._bias_changes:
            self._layer.bias = self._merged_bias(multipliers)

    def _merge(self, multipliers: Mapping[int, float]) -> nn.Parameter:
        """Returns the weight for these multipliers, in the memory of the oldest one if there are too many."""
        if len(self._merged) >= self._sets:
            _, merged = self._merged.popitem(last=False)
        else:
            merged = nn.Parameter(torch.empty_like(self._weight), requires_grad=False)
        wide = torch.promote_types(self._weight.dtype, torch.float32)
        same_dtype = self._weight.dtype == wide
        target = merged.detach() if same_dtype else torch.empty_like(self._weight, dtype=wide)
        self._add_changes(self._weight.detach().to(wide), target, multipliers)
        if not same_dtype:
            merged.copy_(target)
        return merged

    @property
    def held_bytes(self) -> int:
        """Bytes of merged weights and changes."""
        tensors = [*self._merged.values(), *self._changes.values(), *self._bias_changes.values()]
        return sum(map(_bytes, [*tensors, *(self._factors[:2] if self._factors else ())]))

    def has_originals(self) -> bool:
        """Returns True if the layer has its original parameters, whose values did not change."""
        is_same = self._layer.weight is self._weight and bias_of(self._layer) is self._bias
        return is_same and self._weight._version == self._version

    def restore(self) -> None:
        """Puts the original parameters back."""
        self._last = {}
        self._put_originals()

    def _put_originals(self) -> None:
        self._layer.weight = self._weight
        if self._bias_changes:
            setattr(self._layer, "bias", self._bias)  # noqa: B010  # a tensor or None, for which torch has no type

    def _add_changes(self, weight: Tensor, target: Tensor, multipliers: Mapping[int, float]) -> None:
        if self._factors is None:
            target.copy_(weight)
        else:
            up, down, owners = self._factors
            scales = torch.tensor([multipliers[index] for index in owners], dtype=up.dtype, device=up.device)
            torch.addmm(weight.flatten(1), up * scales, down, out=target.flatten(1))
        for index, change in self._changes.items():
            target.add_(change, alpha=multipliers[index])

    def _merged_bias(self, multipliers: Mapping[int, float]) -> nn.Parameter:
        total = sum(multipliers[index] * change for index, change in self._bias_changes.items())
        assert isinstance(total, Tensor)
        old = torch.zeros_like(total) if self._bias is None else self._bias.detach().to(total.dtype)
        return nn.Parameter((old + total).to(self._weight.dtype), requires_grad=False)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _parameter(value: object) -> nn.Parameter:
    assert isinstance(value, nn.Parameter)
    return value


def _is_low_rank(delta: Delta, weight: Tensor) -> bool:
    """Returns True if a delta is `scale * up @ down` of a weight that can be written as a matrix in place."""
    return type(delta) is LoraDelta and delta.mid is None and weight.dim() > 1 and weight.is_contiguous()


def _concatenate(low: Mapping[int, Delta], weight: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """Returns scaled `up` [out, ranks] and `down` [ranks, in] of all LoRAs, and the adapter of each rank."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    ups, downs, owners = [], [], []
    for index, delta in low.items():
        assert isinstance(delta, LoraDelta)
        ups.append(delta.up.detach().flatten(1).to(weight.device, wide) * delta.scale)
        downs.append(delta.down.detach().flatten(1).to(weight.device, wide))
        owners += [index] * delta.rank
    return torch.cat(ups, dim=1), torch.cat(downs), owners


def _on(delta: Delta, device: torch.device) -> Delta:
    return delta.with_factors({name: factor.detach().to(device) for name, factor in delta.factors().items()})

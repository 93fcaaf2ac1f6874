"""The form of an adapter that rows of a batch need: low-rank factors of each layer, which only LoRA deltas have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lora_engine.adapters.adapted import innermost
from lora_engine.adapters.adapter import Adapter
from lora_engine.adapters.attachment import check_fit
from lora_engine.adapters.delta import Delta
from lora_engine.adapters.layer import LayerOp, meta_weight
from lora_engine.adapters.lora import LoraDelta
from lora_engine.adapters.tree import Base, as_tree
from lora_engine.errors import AdapterError


@dataclass(frozen=True)
class RowFactors:
    """An adapter in the form that rows need.

    Attributes:
        modules: Canonical name to `down` `[r, in, *kernel]` and `up` `[r, out]`, which includes the scale; in the dtype
            and on the device of the layer.
    """

    modules: Mapping[str, tuple[Tensor, Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes of all factors."""
        return sum(factor.nbytes for factors in self.modules.values() for factor in factors)

    @classmethod
    def of(cls, base: Base, adapter: Adapter) -> RowFactors:
        """Returns the factors of an adapter for a base.

        Raises:
            AdapterError: The adapter does not fit the base, or a delta has no products by row.
        """
        tree = as_tree(base, adapter.components)
        check_fit(tree, adapter)
        if obstacle := find_row_obstacle(tree, adapter):
            raise AdapterError(obstacle, remedy="draw images with this adapter in a batch of its own")
        return cls({name: _factors(tree.get_module(name), delta) for name, delta in adapter.modules.items()})


def find_row_obstacle(base: Base, adapter: Adapter) -> str | None:
    """Returns why an adapter cannot be applied to single rows, with the module; None if it can."""
    tree = as_tree(base, adapter.components)
    for name, delta in adapter.modules.items():
        lora, layer = delta.to_export(), innermost(tree.get_module(name))
        if not isinstance(lora, LoraDelta):
            return f"an adapter of kind {delta.kind!r} has no products by row ({name})"
        if lora.bias is not None:
            return f"the adapter changes a bias ({name})"
        op = LayerOp.of(layer)
        if op.other is not None or op.groups > 1:
            return f"a layer of type {type(layer).__name__!r} has no products by row ({name})"
    return None


@torch.no_grad()
def _factors(layer: nn.Module, delta: Delta) -> tuple[Tensor, Tensor]:
    weight, lora = meta_weight(innermost(layer)), delta.to_export()
    assert isinstance(lora, LoraDelta)
    lora = lora.without_core()
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    up = (lora.up.flatten(1).to(weight.device, torch.promote_types(dtype, torch.float32)) * lora.scale).t().to(dtype)
    down = lora.down.reshape(lora.rank, *weight.shape[1:]).to(weight.device, dtype)
    return down.contiguous(), up.contiguous()


@dataclass(eq=False)
class RowAdapter:
    """An adapter on some rows, whose strength can change between predictions.

    Attributes:
        factors: The factors.
        multipliers: Strength by module; a module that is missing has 1.
        version: Increases with each change of the strengths.
    """

    factors: RowFactors
    multipliers: dict[str, float] = field(default_factory=dict)
    version: int = 0

    def set_multipliers(self, multiplier_of: Callable[[str], float]) -> None:
        """Sets the strength of each module by its name; counts from the next `RowAdapters.set_rows` on."""
        self.multipliers = {name: multiplier_of(name) for name in self.factors.modules}
        self.version += 1

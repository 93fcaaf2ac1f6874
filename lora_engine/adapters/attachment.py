"""Attaches adapters to a base, detaches them, and collapses them into its weights.

Attaching wraps layers and changes no weight. Collapsing adds the deltas to the weights in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from lora_engine.adapters.adapted import AdaptedLayer, innermost
from lora_engine.adapters.adapter import Adapter
from lora_engine.adapters.delta import Delta
from lora_engine.adapters.layer import ADAPTABLE, bias_of, is_adaptable, meta_weight
from lora_engine.adapters.regularization import draw_rank_mask, draw_skipped, limit_norms, mask_first_ranks
from lora_engine.adapters.shared_input import share_inputs
from lora_engine.adapters.tree import Base, ModuleTree, as_tree, weight_shape
from lora_engine.errors import AdapterError
from lora_engine.seeds import generator


class Attachment:
    """An adapter that is attached to a base until `detach`. A context manager; `attach` creates it.

    Attachments stack, and can be detached in any order.
    """

    def __init__(self, tree: ModuleTree, adapter: Adapter, layers: dict[str, AdaptedLayer]) -> None:
        self._tree, self._adapter, self._layers = tree, adapter, layers
        self.attached = True

    @property
    def multiplier(self) -> float:
        """Strength of the adapter (of its first module); can be set while attached. 0 is the base, bit for bit."""
        return next(layer.multiplier for layer in self._layers.values())

    @multiplier.setter
    def multiplier(self, value: float) -> None:
        for layer in self._layers.values():
            layer.multiplier = value

    def set_multipliers(self, multiplier_of: Callable[[str], float]) -> None:
        """Sets the strength of each module by its name, such as `unet.mid_block...`."""
        for name, layer in self._layers.items():
            layer.multiplier = multiplier_of(name)

    @contextmanager
    def adapter_dropout(self, share: float, seed: int, *, ranks: float = 0.0, modules: float = 0.0) -> Iterator[None]:
        """Applies dropout to the deltas while the context is open.

        Args:
            share: Dropout rate of the input of every delta, from 0 to below 1; the remaining values are scaled by
                `1 / (1 - share)`.
            seed: Equal seeds drop the same elements. The state of the global generators is restored at the end.
            ranks: Share of the ranks of every LoRA delta that are dropped, from 0 to below 1; the others are scaled.
            modules: Share of the deltas that are skipped, from 0 to below 1; at least one is not.
        """
        devices = {parameter.device for layer in self._layers.values() for parameter in layer.factors.values()}
        draw = generator(seed, "ranks and modules")
        skipped = draw_skipped(list(self._layers), modules, draw) if modules else set[str]()
        with torch.random.fork_rng([device for device in devices if device.type == "cuda"]):
            torch.manual_seed(seed)
            for name, layer in self._layers.items():
                layer.dropout, layer.is_skipped = share, name in skipped
                layer.rank_mask = draw_rank_mask(layer.delta, ranks, draw) if ranks else None
            try:
                yield
            finally:
                for layer in self._layers.values():
                    layer.dropout, layer.is_skipped, layer.rank_mask = 0.0, False, None

    @contextmanager
    def first_ranks(self, rank: int) -> Iterator[None]:
        """Computes LoRA deltas with their first ranks only while the context is open; `cut_ranks` makes it permanent.

        Args:
            rank: Number of ranks; deltas of fewer ranks are whole.
        """
        before = {name: layer.rank_mask for name, layer in self._layers.items()}
        for layer in self._layers.values():
            layer.rank_mask = mask_first_ranks(layer.delta, rank)
        try:
            yield
        finally:
            for name, layer in self._layers.items():
                layer.rank_mask = before[name]

    def limit_norms(self, limit: float) -> None:
        """Scales the factors of LoRA deltas so that none has a larger Frobenius norm; see `regularization`."""
        limit_norms({name: layer.delta for name, layer in self._layers.items()}, limit)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields `<module>.<factor>` and its parameter, sorted by module; skips the factors that a kind freezes."""
        for name, layer in self._layers.items():
            for factor, parameter in layer.factors.items():
                if factor not in layer.delta.frozen:
                    yield f"{name}.{factor}", parameter

    def parameters(self) -> list[nn.Parameter]:
        """Returns the trainable factors, in the order of `named_parameters`."""
        return [parameter for _, parameter in self.named_parameters()]

    def adapter(self) -> Adapter:
        """Returns the adapter with copies of the current factors, without gradients."""
        modules: dict[str, Delta] = {}
        for name, layer in self._layers.items():
            factors = {key: factor.detach().clone() for key, factor in layer.factors.items()}
            modules[name] = layer.delta.with_factors(factors)
        return Adapter(modules, self._adapter.base, self._adapter.fingerprint)

    def detach(self) -> None:
        """Restores the original module objects. A second call does nothing.

        Raises:
            AdapterError: Other code replaced a module while the adapter was attached.
        """
        if not self.attached:
            return
        for name, layer in self._layers.items():
            _unwrap(self._tree, name, layer)
        self.attached = False

    def __repr__(self) -> str:
        state = f"multiplier {self.multiplier:g}" if self.attached else "detached"
        return f"<Attachment of {self._adapter!r}, {state}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()


def attach(base: Base, adapter: Adapter, multiplier: float = 1.0, *, trainable: bool = False) -> Attachment:
    """Attaches an adapter to a base by wrapping its layers. Changes no weight, and copies the factors.

    Args:
        base: A base model, a diffusers pipeline, torch modules by component name, or the one torch module that the
            adapter changes.
        adapter: The adapter; its factors move to the layers' devices and keep their dtype.
        multiplier: Strength of the adapter.
        trainable: True gives the factors gradients; `requires_grad` of the base does not change.

    Raises:
        AdapterError: A module is missing in the base, its type cannot carry an adapter, or its shape differs. The base
            is unchanged.
    """
    tree = as_tree(base, adapter.components)
    check_fit(tree, adapter)
    layers = {
        name: AdaptedLayer(tree.get_module(name), delta, multiplier, trainable=trainable)
        for name, delta in adapter.modules.items()
    }
    share_inputs(layers, tree.get_module)
    for name, layer in layers.items():
        tree.set_module(name, layer)
    return Attachment(tree, adapter, layers)


@torch.no_grad()
def collapse(base: Base, adapter: Adapter, multiplier: float = 1.0) -> None:
    """Adds an adapter to the weights of a base in place, in float32 or wider; casts to the weight's dtype last.

    Raises:
        AdapterError: The adapter does not fit, or a layer is quantized. The base is unchanged.
    """
    tree = as_tree(base, adapter.components)
    check_fit(tree, adapter)
    for name in adapter.modules:
        layer = innermost(tree.get_module(name))
        if meta_weight(layer) is not layer.weight:
            raise AdapterError(
                "a quantized weight cannot be changed in place",
                where=name,
                allowed="a base in full precision",
                remedy="load the base without quantization, or attach the adapter instead",
            )
    if multiplier == 0.0:
        return
    for name, delta in adapter.modules.items():
        layer = innermost(tree.get_module(name))
        weight: Tensor = layer.weight  # type: ignore[assignment]
        bias = bias_of(layer)
        moved = delta.with_factors({key: factor.to(weight.device) for key, factor in delta.factors().items()})
        change, bias_change = moved.delta_weight(weight), moved.delta_bias(bias)
        weight.copy_(weight.to(change.dtype).add(change, alpha=multiplier))
        if bias_change is not None:
            old = torch.zeros_like(bias_change) if bias is None else bias.to(bias_change.dtype)
            new = old.add(bias_change, alpha=multiplier)
            layer.bias = nn.Parameter(new.to(weight.dtype), requires_grad=weight.requires_grad)


def check_fit(base: Base, adapter: Adapter) -> None:
    """Raises `AdapterError` if an adapter does not fit a base.

    Raises:
        AdapterError: The adapter is empty, or a module is missing, cannot carry an adapter, or has another shape.
    """
    tree = as_tree(base, adapter.components)
    if not adapter.modules:
        raise AdapterError("the adapter has no modules", remedy="check the file that it was read from")
    for name, delta in adapter.modules.items():
        layer = innermost(tree.get_module(name))
        if not is_adaptable(layer):
            raise AdapterError(
                f"a layer of type {type(layer).__name__!r} cannot carry an adapter",
                where=name,
                allowed=", ".join(kind.__name__ for kind in ADAPTABLE),
                remedy="check that the adapter was trained for this base",
            )
        for issue in delta.issues(weight_shape(layer)):
            where = f"{name}, factor {issue.factor!r}"
            raise AdapterError(issue.problem, where=where, allowed=issue.allowed, remedy=issue.remedy)


def _unwrap(tree: ModuleTree, name: str, layer: AdaptedLayer) -> None:
    current = tree.get_module(name)
    if current is layer:
        tree.set_module(name, layer.base)
        return
    while isinstance(current, AdaptedLayer):
        if current.base is layer:
            current.base = layer.base
            return
        current = current.base
    raise AdapterError(
        "the layer under the adapter was replaced while it was attached",
        where=name,
        remedy="detach the adapter before you change the base's modules",
    )

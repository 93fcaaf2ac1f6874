"""Putting adapters on a base and taking them off: create, attach, detach, collapse.

Attaching wraps layers and touches no weight; collapsing adds the deltas into the weights for good.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from lora_engine.adapters.adapted import AdaptedLayer, innermost
from lora_engine.adapters.adapter import Adapter
from lora_engine.adapters.delta import Delta, kinds
from lora_engine.adapters.layer import ADAPTABLE, bias_of, is_adaptable, meta_weight
from lora_engine.adapters.select import select_modules
from lora_engine.adapters.shared_input import share_inputs
from lora_engine.adapters.tree import ModuleTree, as_tree, module_shapes, weight_shape
from lora_engine.errors import AdapterError, SettingsError

Base = ModuleTree | Mapping[str, nn.Module]


@dataclass(frozen=True)
class LayerSettings:
    """What a fresh delta is like.

    Attributes:
        kind: Name of an adapter kind.
        rank: Inner dimension.
        alpha: The scale is `alpha / rank` for most kinds; None stands for the kind's default, a scale of 1.
        options: The kind's own; see `lora_engine.training.specs.kinds`.
    """

    kind: str = "lora"
    rank: int = 8
    alpha: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def create(self, layer: nn.Module, generator: torch.Generator | None) -> Delta:
        """A fresh delta for a layer.

        Raises:
            SettingsError: An unknown kind, or a setting that does not suit the layer.
        """
        weight: Tensor = layer.weight  # type: ignore[assignment]
        bias = bias_of(layer)
        return kinds[self.kind].create(
            weight.detach(), bias if bias is None else bias.detach(), self.rank, self.alpha, generator, **self.options
        )


def create_adapter(
    base: Base,
    targets: str | Sequence[str] = "attention",
    kind: str = "lora",
    rank: int = 8,
    alpha: float | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    overrides: Mapping[str, LayerSettings] | None = None,
    generator: torch.Generator | None = None,
) -> Adapter:
    """A fresh adapter for a base: factors in float32 on the CPU, zero in effect.

    Args:
        base: A base model, or plain modules by component name.
        targets: See `select_modules`.
        kind: Name of an adapter kind.
        rank: Inner dimension.
        alpha: Scale is `alpha / rank`; None stands for the rank, so that the scale is 1.
        options: The kind's own.
        overrides: Targets (as for `targets`) to other settings for those of the chosen modules that they mean; where
            several mean a module, the last one counts.
        generator: Where the random factors come from; one generator gives the same adapter again.

    Raises:
        SettingsError: An unknown kind or target, a setting that a target cannot have (named), or an override that
            means none of the chosen modules.
    """
    tree = as_tree(base)
    shapes = module_shapes(tree)
    plain = LayerSettings(kind, rank, alpha, options or {})
    settings = dict.fromkeys(select_modules(shapes, targets), plain)
    for pattern, special in (overrides or {}).items():
        meant = settings.keys() & select_modules(shapes, pattern)
        if not meant:
            raise SettingsError(
                f"the override {pattern!r} means none of the {len(settings)} modules that the targets mean",
                remedy="add them to the targets, or mend the pattern",
            )
        settings |= dict.fromkeys(meant, special)
    modules: dict[str, Delta] = {}
    for name, wanted in settings.items():
        try:
            modules[name] = wanted.create(innermost(tree.get_module(name)), generator)
        except SettingsError as error:
            if error.where:
                raise
            raise error.at(name) from error
    return Adapter(modules, tree.family, tree.fingerprint)


class Attachment:
    """An adapter on a base, until `detach`. Made by `attach`; a context manager that detaches at its end.

    Attachments stack, and may be detached in any order.
    """

    def __init__(self, tree: ModuleTree, adapter: Adapter, layers: dict[str, AdaptedLayer]) -> None:
        self._tree, self._adapter, self._layers = tree, adapter, layers
        self.attached = True

    @property
    def multiplier(self) -> float:
        """Strength of the adapter; may be set while attached. 0 gives the base's output, bit for bit."""
        return next(layer.multiplier for layer in self._layers.values())

    @multiplier.setter
    def multiplier(self, value: float) -> None:
        for layer in self._layers.values():
            layer.multiplier = value

    @contextmanager
    def adapter_dropout(self, share: float, seed: int) -> Iterator[None]:
        """While it is open, each layer's delta sees its input without a random share of it.

        Args:
            share: From 0 to below 1; what is left is scaled up to make good for it.
            seed: The same seed leaves out the same; the global generators are as before afterwards.
        """
        devices = {parameter.device for layer in self._layers.values() for parameter in layer.factors.values()}
        with torch.random.fork_rng([device for device in devices if device.type == "cuda"]):
            torch.manual_seed(seed)
            for layer in self._layers.values():
                layer.dropout = share
            try:
                yield
            finally:
                for layer in self._layers.values():
                    layer.dropout = 0.0

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """`<module>.<factor>` and the parameter, sorted by module; without the factors that a kind freezes."""
        for name, layer in self._layers.items():
            for factor, parameter in layer.factors.items():
                if factor not in layer.delta.frozen:
                    yield f"{name}.{factor}", parameter

    def parameters(self) -> list[nn.Parameter]:
        """The factors that training moves, in the order of `named_parameters`."""
        return [parameter for _, parameter in self.named_parameters()]

    def adapter(self) -> Adapter:
        """The adapter as it is now: copies of the factors, without gradients."""
        modules: dict[str, Delta] = {}
        for name, layer in self._layers.items():
            factors = {key: factor.detach().clone() for key, factor in layer.factors.items()}
            modules[name] = layer.delta.with_factors(factors)
        return Adapter(modules, self._adapter.base, self._adapter.fingerprint)

    def detach(self) -> None:
        """Puts the very same module objects back. A second call does nothing.

        Raises:
            AdapterError: Somebody else replaced a module in the meantime.
        """
        if not self.attached:
            return
        for name, layer in self._layers.items():
            _unwrap(self._tree, name, layer)
        self.attached = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()


def attach(base: Base, adapter: Adapter, multiplier: float = 1.0, *, trainable: bool = False) -> Attachment:
    """Puts an adapter on a base by wrapping its layers; no weight is touched. Factors are copied, so the adapter stays.

    Args:
        base: A base model, or plain modules by component name.
        adapter: The adapter; its factors go to the layers' devices and keep their dtype.
        multiplier: Strength.
        trainable: Whether the factors take gradients; the base's own settings of gradients are left alone.

    Raises:
        AdapterError: A module that the base lacks, of a type that cannot carry an adapter, or of another shape; the
            base is then untouched.
    """
    tree = as_tree(base)
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
    """Adds an adapter into the weights of a base, in place: in float32 (or better), cast to the weight's dtype last.

    Raises:
        AdapterError: The adapter does not fit, or a layer is quantised; the base is then untouched.
    """
    tree = as_tree(base)
    check_fit(tree, adapter)
    for name in adapter.modules:
        layer = innermost(tree.get_module(name))
        if meta_weight(layer) is not layer.weight:
            raise AdapterError(
                "a quantised weight cannot take a difference in",
                where=name,
                allowed="a base in full precision",
                remedy="load the base without quantisation, or attach the adapter instead",
            )
    if multiplier == 0.0:
        return
    for name, delta in adapter.modules.items():
        layer = innermost(tree.get_module(name))
        weight: Tensor = layer.weight  # type: ignore[assignment]
        bias = bias_of(layer)
        here = delta.with_factors({key: factor.to(weight.device) for key, factor in delta.factors().items()})
        change, bias_change = here.delta_weight(weight), here.delta_bias(bias)
        weight.copy_(weight.to(change.dtype).add(change, alpha=multiplier))
        if bias_change is not None:
            old = torch.zeros_like(bias_change) if bias is None else bias.to(bias_change.dtype)
            new = old.add(bias_change, alpha=multiplier)
            layer.bias = nn.Parameter(new.to(weight.dtype), requires_grad=weight.requires_grad)


def check_fit(base: Base, adapter: Adapter) -> None:
    """Does nothing where an adapter fits a base.

    Raises:
        AdapterError: The adapter is empty, or a module is missing, cannot carry an adapter, or has another shape.
    """
    tree = as_tree(base)
    if not adapter.modules:
        raise AdapterError("the adapter has no modules", remedy="check the file that it came from")
    for name, delta in adapter.modules.items():
        layer = innermost(tree.get_module(name))
        if not is_adaptable(layer):
            raise AdapterError(
                f"a layer of type {type(layer).__name__!r} cannot carry an adapter",
                where=name,
                allowed=", ".join(kind.__name__ for kind in ADAPTABLE),
                remedy="check that the adapter was made for this base",
            )
        for fault in delta.faults(weight_shape(layer)):
            where = f"{name}, factor {fault.factor!r}"
            raise AdapterError(fault.problem, where=where, allowed=fault.allowed, remedy=fault.remedy)


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
        remedy="detach before the base's modules are changed",
    )

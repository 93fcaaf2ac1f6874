"""Where layers hang: the `ModuleTree` protocol, and `DictTree`, which gives it to plain modules.

Canonical names are `<component>.<path>`. A text encoder's path always begins with `text_model.`, whether or not the
installed transformers has that level (version 5 dropped it from `CLIPTextModel`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

from torch import nn

from lora_engine.adapters.adapted import AdaptedLayer, innermost
from lora_engine.adapters.layer import is_adaptable, meta_weight
from lora_engine.errors import AdapterError

_LEVEL = "text_model."
_BELOW_LEVEL = ("embeddings.", "encoder.layers.", "final_layer_norm")


class ModuleTree(Protocol):
    """What an adapter needs of a base model."""

    @property
    def family(self) -> str:
        """Family of the base, such as `sdxl`; empty where unknown."""
        ...

    @property
    def fingerprint(self) -> str | None:
        """Digest of the base's weights, None where unknown."""
        ...

    def module_names(self) -> list[str]:
        """Canonical names of the adaptable layers."""
        ...

    def get_module(self, name: str) -> nn.Module:
        """The module of a canonical name."""
        ...

    def set_module(self, name: str, module: nn.Module) -> None:
        """Puts a module in the place of the one of that name."""
        ...


class DictTree:
    """Plain modules by component name, as a `ModuleTree`.

    Args:
        modules: Component name (`unet`, `text_encoder`) to module.
        family: Family of the base.
        fingerprint: Digest of the base.
    """

    def __init__(self, modules: Mapping[str, nn.Module], family: str = "", fingerprint: str | None = None) -> None:
        self._modules = dict(modules)
        self.family = family
        self.fingerprint = fingerprint

    def module_names(self) -> list[str]:
        """Canonical names of the adaptable layers, in the order of the modules."""
        names = ((part, path) for part, module in self._modules.items() for path, _ in adaptable_layers(module))
        return [canonical_name(part, path) for part, path in names]

    def get_module(self, name: str) -> nn.Module:
        """The module of a canonical name.

        Raises:
            AdapterError: There is none.
        """
        parent, leaf = self._parent(name)
        return parent.get_submodule(leaf)

    def set_module(self, name: str, module: nn.Module) -> None:
        """Puts a module in the place of the one of that name; the order of its siblings stays."""
        parent, leaf = self._parent(name)
        setattr(parent, leaf, module)

    def _parent(self, name: str) -> tuple[nn.Module, str]:
        component, _, path = name.partition(".")
        root = self._modules.get(component)
        if root is not None:
            flat = path.removeprefix(_LEVEL) if component.startswith("text_encoder") else path
            for candidate in (path, flat):
                above, _, leaf = candidate.rpartition(".")
                parent = _submodule(root, above)
                if parent is not None and leaf and _submodule(parent, leaf) is not None:
                    return parent, leaf
        raise AdapterError(
            f"the base has no module {name!r}",
            allowed=near_names(name, self.module_names()),
            remedy="check that the adapter was made for this base",
        )


def as_tree(base: ModuleTree | Mapping[str, nn.Module]) -> ModuleTree:
    """The base itself, or a `DictTree` around plain modules."""
    return DictTree(base) if isinstance(base, Mapping) else base


def adaptable_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and layer of every layer that can carry an adapter; one that is under an adapter keeps its path."""
    below: tuple[str, ...] = ()
    for path, child in module.named_modules():
        if below and path.startswith(below):
            continue
        if isinstance(child, AdaptedLayer):
            below = (*below, f"{path}.")
            yield path, innermost(child)
        elif is_adaptable(child):
            yield path, child


def canonical_name(component: str, path: str) -> str:
    """`<component>.<path>`, with the `text_model` level of text encoders put back where transformers dropped it."""
    if component.startswith("text_encoder") and path.startswith(_BELOW_LEVEL):
        return f"{component}.{_LEVEL}{path}"
    return f"{component}.{path}"


def module_shapes(base: ModuleTree | Mapping[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    """Canonical name to shape of the weight, for every adaptable layer of a base."""
    tree = as_tree(base)
    return {name: weight_shape(tree.get_module(name)) for name in tree.module_names()}


def weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """Shape of the weight of a layer, below its wrappers."""
    return tuple(meta_weight(innermost(layer)).shape)


def near_names(name: str, names: Iterable[str]) -> str:
    """The nearest of the names, for an error message."""
    known = list(names)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
    return f"{len(known)} modules, such as {', '.join(near or known[:3])}"


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None

"""Defines access to layers by canonical name: the `ModuleTree` protocol, and `DictTree` for plain modules.

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
    """The interface of a base model that adapters need."""

    @property
    def family(self) -> str:
        """Family of the base, such as `sdxl`; empty means unknown."""
        ...

    @property
    def fingerprint(self) -> str | None:
        """Digest of the base's weights; None means unknown."""
        ...

    def module_names(self) -> list[str]:
        """Returns the canonical names of the adaptable layers."""
        ...

    def get_module(self, name: str) -> nn.Module:
        """Returns the module of a canonical name."""
        ...

    def set_module(self, name: str, module: nn.Module) -> None:
        """Replaces the module of a canonical name."""
        ...


class DictTree:
    """Plain modules by component name, as a `ModuleTree`.

    Args:
        modules: Component name (`unet`, `text_encoder`) to module.
        family: Family of the base; empty means unknown.
        fingerprint: Digest of the base; None means unknown.
    """

    def __init__(self, modules: Mapping[str, nn.Module], family: str = "", fingerprint: str | None = None) -> None:
        self._modules = dict(modules)
        self.family = family
        self.fingerprint = fingerprint

    def module_names(self) -> list[str]:
        """Returns the canonical names of the adaptable layers, in the order of the modules."""
        names = ((part, path) for part, module in self._modules.items() for path, _ in adaptable_layers(module))
        return [canonical_name(part, path) for part, path in names]

    def get_module(self, name: str) -> nn.Module:
        """Returns the module of a canonical name.

        Raises:
            AdapterError: The base has no such module.
        """
        parent, leaf = self._parent(name)
        return parent.get_submodule(leaf)

    def set_module(self, name: str, module: nn.Module) -> None:
        """Replaces the module of a canonical name; the order of its siblings does not change."""
        parent, leaf = self._parent(name)
        setattr(parent, leaf, module)

    def _parent(self, name: str) -> tuple[nn.Module, str]:
        component, _, path = name.partition(".")
        root = self._modules.get(component)
        if root is not None:
            flat = path.removeprefix(_LEVEL) if component.startswith("text_encoder") else path
            for candidate in (path, flat):
                parent_path, _, leaf = candidate.rpartition(".")
                parent = _submodule(root, parent_path)
                if parent is not None and leaf and _submodule(parent, leaf) is not None:
                    return parent, leaf
        raise AdapterError(
            f"the base has no module {name!r}",
            allowed=near_names(name, self.module_names()),
            remedy="check that the adapter was trained for this base",
        )


def as_tree(base: ModuleTree | Mapping[str, nn.Module]) -> ModuleTree:
    """Returns the base, with plain modules wrapped in a `DictTree`."""
    return DictTree(base) if isinstance(base, Mapping) else base


def adaptable_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields path and layer of every layer that can carry an adapter, also of those that carry one."""
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
    """Returns `<component>.<path>`, with the `text_model` level of text encoders that transformers dropped."""
    if component.startswith("text_encoder") and path.startswith(_BELOW_LEVEL):
        return f"{component}.{_LEVEL}{path}"
    return f"{component}.{path}"


def module_shapes(base: ModuleTree | Mapping[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    """Returns canonical name to weight shape for every adaptable layer of a base."""
    tree = as_tree(base)
    return {name: weight_shape(tree.get_module(name)) for name in tree.module_names()}


def weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """Returns the weight shape of the layer inside all wrappers."""
    return tuple(meta_weight(innermost(layer)).shape)


def near_names(name: str, names: Iterable[str]) -> str:
    """Returns the names most similar to `name`, for an error message."""
    candidates = list(names)
    near = difflib.get_close_matches(name, candidates, n=3, cutoff=0.3)
    return f"{len(candidates)} modules, such as {', '.join(near or candidates[:3])}"


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None

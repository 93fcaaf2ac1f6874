"""Defines access to layers by canonical name: the `ModuleTree` protocol, and `DictTree` for plain modules.

`module_names` defines canonical names.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Protocol, cast

from torch import nn

from lora_engine.adapters.adapted import LayerWrapper, innermost
from lora_engine.adapters.layer import is_adaptable, meta_weight
from lora_engine.adapters.module_names import LEVEL, canonical_name, near_names
from lora_engine.errors import AdapterError

_COMPONENTS = {
    "diffusers.models.unets.": "unet",
    "diffusers.models.transformers.": "transformer",
    "transformers.models.": "text_encoder",
}
"""Component by the package that defines the class of a module."""


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
            flat = path.removeprefix(LEVEL) if component.startswith("text_encoder") else path
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


class HasComponents(Protocol):
    """A diffusers pipeline: models, tokenizers and schedulers by component name."""

    @property
    def components(self) -> Mapping[str, Any]:
        """The parts by name."""
        ...


Base = ModuleTree | HasComponents | nn.Module | Mapping[str, nn.Module]
"""A base model, a diffusers pipeline, one torch module, or torch modules by component name."""


def as_tree(base: Base, components: Collection[str] = ()) -> ModuleTree:
    """Returns a base as a tree of named modules.

    Args:
        base: The base. One torch module is the component that its class says.
        components: The components that the caller needs; empty means all that there are.

    Raises:
        AdapterError: One torch module is not the needed component, or it may be several; or the object has no modules.
    """
    if isinstance(base, nn.Module):
        return DictTree({_component_of(base, components): base})
    if isinstance(base, Mapping):
        return DictTree(base)
    if hasattr(base, "module_names"):
        return cast(ModuleTree, base)
    if isinstance(parts := getattr(base, "components", None), Mapping):
        return DictTree({name: part for name, part in parts.items() if isinstance(part, nn.Module)})
    raise AdapterError(
        f"an object of type {type(base).__name__!r} has no modules for an adapter",
        allowed="a Loraline base, a diffusers pipeline, a torch module, or torch modules by component name",
        remedy="pass one of these",
    )


def _component_of(module: nn.Module, needed: Collection[str]) -> str:
    """Returns the component that one torch module is; `needed` decides where the class leaves a choice."""
    name = type(module).__name__
    modules = (f"{cls.__module__}." for cls in type(module).__mro__)
    role = next((_COMPONENTS[package] for path in modules for package in _COMPONENTS if path.startswith(package)), "")
    if len(needed) > 1:
        raise AdapterError(
            f"the adapter changes {', '.join(sorted(needed))}, and one {name!r} is one of them at most",
            allowed="a pipeline, or modules by component name",
            remedy=f"pass the pipeline, or take a part of the adapter: `adapter.only({(role or max(needed))!r})`",
        )
    for component in needed:
        if component.startswith(role):
            return component
        raise AdapterError(
            f"the adapter changes {component!r}, and a {name!r} is {role!r}",
            remedy=f"pass the module that is {component!r}, or the pipeline",
        )
    # Pipelines have up to three text encoders; only `CLIPTextModel` is the first one in all of them.
    if not role or (role == "text_encoder" and name != "CLIPTextModel"):
        raise AdapterError(
            f"the class {name!r} does not say which component of a base it is",
            allowed="a UNet or transformer of diffusers, a `CLIPTextModel`, or torch modules by component name",
            remedy=f"name it, as in {{{role or 'unet'!r}: module}}, or pass the pipeline",
        )
    return role


def adaptable_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields path and layer of every layer that can carry an adapter, also of those that carry one."""
    below: tuple[str, ...] = ()
    for path, child in module.named_modules():
        if below and path.startswith(below):
            continue
        if isinstance(child, LayerWrapper):
            below = (*below, f"{path}.")
            yield path, innermost(child)
        elif is_adaptable(child):
            yield path, child


def module_shapes(base: Base) -> dict[str, tuple[int, ...]]:
    """Returns canonical name to weight shape for every adaptable layer of a base."""
    tree = as_tree(base)
    return {name: weight_shape(tree.get_module(name)) for name in tree.module_names()}


def weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """Returns the weight shape of the layer inside all wrappers."""
    return tuple(meta_weight(innermost(layer)).shape)


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None

"""Returns the names and shapes of the layers of published bases, without their weights.

The layers of Stable Diffusion are listed by `families`. Other networks are built on torch's meta device from the
settings there.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lora_engine.building import BUILDING
from lora_engine.families import ComponentConfig, published
from lora_engine.families.sd.layers import layers_of
from lora_engine.lazy_torch import torch

if TYPE_CHECKING:
    from torch import nn


def published_module_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Returns the weight shape by canonical name for every adaptable layer of a published architecture.

    Args:
        name: A name among `families.published`.

    Raises:
        SettingsError: The name is unknown; lists the known ones.
    """
    return dict(_module_shapes(name))


@functools.cache
def _module_shapes(name: str) -> dict[str, tuple[int, ...]]:
    architecture = published[name]
    components = {part: architecture.components[part] for part in architecture.adaptable}
    listed = {part: layers_of(component) for part, component in components.items()}
    if None not in listed.values():
        return {f"{part}.{path}": shape for part, layers in listed.items() for path, shape in (layers or {}).items()}
    from lora_engine.adapters.tree import DictTree, module_shapes  # imports torch

    modules = {part: empty_module(component) for part, component in components.items()}
    return module_shapes(DictTree(modules, architecture.family))


def empty_module(component: ComponentConfig) -> nn.Module:
    """Builds the network of a component on the meta device: names and shapes without memory.

    Args:
        component: A component with weights (not a tokenizer, not a scheduler).
    """
    cls: Any = getattr(importlib.import_module(component.library), component.class_name)
    # Initialization draws random numbers even on the meta device; restore the global generator.
    with BUILDING, torch.random.fork_rng(devices=[]), torch.device("meta"):
        module: nn.Module = _build(cls, component)
    return module.requires_grad_(False)


def _build(cls: Any, component: ComponentConfig) -> Any:
    if component.library == "transformers":
        return cls(cls.config_class(**component.config))
    return cls(**_plain(component.config))


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    # Metadata keys (`_class_name`, ...) are not arguments of the class.
    return {name: value for name, value in config.items() if not name.startswith("_")}

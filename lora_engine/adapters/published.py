"""Returns the names and shapes of the layers of published bases, without their weights.

The layers of Stable Diffusion are listed by `families`. Other networks are built on torch's meta device from the
settings there.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lora_engine.building import BUILDING
from lora_engine.errors import BaseModelError
from lora_engine.families import ComponentConfig, published
from lora_engine.families.sd.layers import layers_of
from lora_engine.lazy_torch import nn, torch

if TYPE_CHECKING:
    from torch import nn

_COUNTED = re.compile(r"layers|depth|labels|num_\w*block")
_MOST_LAYERS, _LARGEST = 1000, 1 << 24
"""Bounds on counts of layers, which become loops, and on other whole numbers in the settings of a network."""
_REFUSALS = (
    *(TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RuntimeError, AssertionError),
    ImportError,
)
"""What the constructors of diffusers and transformers raise for settings that they do not accept."""


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
        component: A component with weights (not a tokenizer, not a scheduler); class and settings may be a stranger's.

    Raises:
        BaseModelError: The library has no such network, a number in the settings is too large, or the class does not
            accept them.
    """
    from huggingface_hub.errors import StrictDataclassError

    cls: Any = getattr(importlib.import_module(component.library), component.class_name, None)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise BaseModelError(
            f"{component.library} has no network {component.class_name[:80]!r}",
            allowed="a class of a network, such as UNet2DConditionModel",
            remedy="correct the settings of the model, or download it again",
        )
    _check_numbers(component.config, component.class_name)
    # Initialization draws random numbers even on the meta device; restore the global generator.
    try:
        with BUILDING, torch.random.fork_rng(devices=[]), torch.device("meta"):
            module: nn.Module = _build(cls, component)
    except (*_REFUSALS, StrictDataclassError) as error:
        problem = f"{component.class_name} does not accept its settings: {type(error).__name__}: {error}"
        raise BaseModelError(problem, remedy="correct the settings of the model, or download it again") from error
    return module.requires_grad_(False)


def _check_numbers(value: Any, where: str) -> None:
    """Raises an error for a number of layers or a size that would take the network's constructor without end.

    Raises:
        BaseModelError: Names the setting and its bound.
    """
    if isinstance(value, Mapping):
        for key, entry in value.items():
            _check_numbers(entry, f"{where}, {key}")
        return
    entries = value if isinstance(value, list | tuple) else [value]
    most = _MOST_LAYERS if _COUNTED.search(where.rpartition(", ")[2]) else _LARGEST
    for entry in entries[: _MOST_LAYERS + 1]:
        if isinstance(entry, list | tuple | Mapping):
            _check_numbers(entry, where)
        elif isinstance(entry, int) and abs(entry) > most:
            raise BaseModelError(f"{entry} is too large", where=where, allowed=f"at most {most}")
    if len(entries) > _MOST_LAYERS:
        raise BaseModelError(f"a list of {len(entries)} values", where=where, allowed=f"at most {_MOST_LAYERS}")


def _build(cls: Any, component: ComponentConfig) -> Any:
    if component.library == "transformers":
        return cls(cls.config_class(**component.config))
    return cls(**_plain(component.config))


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    # Metadata keys (`_class_name`, ...) are not arguments of the class.
    return {name: value for name, value in config.items() if not name.startswith("_")}

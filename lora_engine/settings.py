"""Keeps cache keys stable when a spec gets new settings. Must not import torch.

Specs of all layers mark settings with `AddedLater`; `tasks.job` makes cache keys of what `without_later` returns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel


@dataclass(frozen=True)
class AddedLater:
    """Marks a setting that was added to a released spec: `quality: Annotated[int, AddedLater()] = 3`.

    Its default must mean what releases without it did. At its default it is not part of cache keys, so earlier results
    stay cached.
    """


def without_later(model: BaseModel, dumped: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a dump of a model without the settings `AddedLater` that have their defaults, at every level.

    Args:
        model: The model.
        dumped: `model.model_dump(mode="json")`, or a part of its fields.
    """
    stable = {}
    for name, value in dumped.items():
        setting, declared = getattr(model, name), type(model).model_fields[name]
        later = any(isinstance(item, AddedLater) for item in declared.metadata)
        if not later or setting != declared.get_default(call_default_factory=True):
            stable[name] = _without_later(setting, value)
    return stable


def _without_later(setting: Any, dumped: Any) -> Any:
    if isinstance(setting, BaseModel) and isinstance(dumped, dict):
        return without_later(setting, dumped)
    if isinstance(setting, Mapping) and isinstance(dumped, dict):
        return {name: _without_later(setting[name], value) for name, value in dumped.items()}
    if isinstance(setting, list | tuple) and isinstance(dumped, list):
        return [_without_later(item, value) for item, value in zip(setting, dumped, strict=True)]
    return dumped

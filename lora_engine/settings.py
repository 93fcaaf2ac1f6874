"""Keeps cache keys stable when a spec gets new settings, or has some without effect. Must not import torch.

Specs of all layers mark settings with `AddedLater` and `NoEffect`; `tasks.job` makes cache keys of what `key_form`
returns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

PredictionTarget = Literal["epsilon", "v_prediction"]
"""What a network predicts: a setting of trainings and of bases."""


@dataclass(frozen=True)
class AddedLater:
    """Marks a setting that was added to a released spec: `quality: Annotated[int, AddedLater()] = 3`.

    Its default must mean what releases without it did. At its default it is not part of cache keys, so earlier results
    stay cached.
    """


@dataclass(frozen=True)
class NoEffect:
    """Marks a setting that changes no byte of the adapter, such as `validate_every`.

    Cache keys hold its default whatever its value, so a change of it neither repeats nor restarts a step.

    Attributes:
        is_visible: True if the result has something that the setting asks for, such as a curve.
    """

    is_visible: bool = True


def key_form(model: BaseModel, dumped: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a dump of a model for a cache key, at every level.

    Settings marked `AddedLater` are left out at their defaults; those marked `NoEffect` have their defaults.

    Args:
        model: The model.
        dumped: `model.model_dump(mode="json")`, or a part of its fields.
    """
    defaults = {
        name: field.get_default(call_default_factory=True)
        for name, field in type(model).model_fields.items()
        if name in dumped and _is_marked(model, name, NoEffect)
    }
    neutral = model.model_copy(update=defaults)
    return without_later(neutral, {**dumped, **neutral.model_dump(mode="json", include=set(defaults))})


def without_later(model: BaseModel, dumped: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a dump of a model without the settings `AddedLater` that have their defaults, at every level.

    Args:
        model: The model.
        dumped: `model.model_dump(mode="json")`, or a part of its fields.
    """
    stable = {}
    for name, value in dumped.items():
        setting, declared = getattr(model, name), type(model).model_fields[name]
        if not _is_marked(model, name, AddedLater) or setting != declared.get_default(call_default_factory=True):
            stable[name] = _without_later(setting, value)
    return stable


def names_without_effect(model: type[BaseModel], *, visible: bool = False) -> set[str]:
    """Returns the names of the settings marked `NoEffect`; with `visible`, of those that ask for something."""
    marks = {
        name: [item for item in field.metadata if isinstance(item, NoEffect)]
        for name, field in model.model_fields.items()
    }
    return {name for name, found in marks.items() if found and (found[0].is_visible or not visible)}


def _is_marked(model: BaseModel, name: str, mark: type) -> bool:
    return any(isinstance(item, mark) for item in type(model).model_fields[name].metadata)


def _without_later(setting: Any, dumped: Any) -> Any:
    if isinstance(setting, BaseModel) and isinstance(dumped, dict):
        return without_later(setting, dumped)
    if isinstance(setting, Mapping) and isinstance(dumped, dict):
        return {name: _without_later(setting[name], value) for name, value in dumped.items()}
    if isinstance(setting, list | tuple) and isinstance(dumped, list):
        return [_without_later(item, value) for item, value in zip(setting, dumped, strict=True)]
    return dumped

"""Reads and writes the configuration of PEFT's adapter types, and maps each type to adapter kinds.

LORA is defined here. A kind with its own PEFT type adds it beside its factor keys. PEFT allows one type per component.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_engine.adapters import Delta
from lora_engine.errors import AdapterError
from lora_engine.formats.lora_config import check_one_kind, lora_config
from lora_engine.registries import Registry

PeftSettings = Callable[[Mapping[str, Delta]], dict[str, Any]]
Finish = Callable[[Delta, Mapping[str, Any], str, str], Delta]


def _unchanged(delta: Delta, config: Mapping[str, Any], path: str, where: str) -> Delta:
    return delta


@dataclass(frozen=True)
class PeftType:
    """One of PEFT's adapter types.

    Attributes:
        kinds: Adapter kinds that a folder of this type may hold.
        alpha: Key of alpha in the configuration; empty if the type has none.
        settings: From one component's deltas by path to the type's part of the configuration.
        finish: Applies the configuration: from (delta, configuration, path, where) to the resulting delta. Raises
            `AdapterError` if the two disagree.
    """

    kinds: Sequence[str]
    alpha: str
    settings: PeftSettings
    finish: Finish = _unchanged


def _add_types_of_kinds() -> None:
    from lora_engine.formats.key_layout import load_factor_keys

    load_factor_keys()


PEFT_TYPES: Registry[PeftType] = Registry("PEFT adapter type", source=_add_types_of_kinds)


def type_of(config: Mapping[str, Any], where: str) -> PeftType:
    """Returns the type that a configuration names; LORA if it names none.

    Raises:
        AdapterError: The type is not supported.
    """
    name = str(config.get("peft_type") or "LORA").upper()
    if name not in PEFT_TYPES:
        problem = f"adapters of PEFT's type {name!r} are not supported"
        raise AdapterError(problem, where=where, allowed=", ".join(PEFT_TYPES), remedy="convert it with PEFT first")
    return PEFT_TYPES[name]


def with_config(delta: Delta, config: Mapping[str, Any], path: str, where: str) -> Delta:
    """Returns the delta with a configuration applied.

    Raises:
        AdapterError: The kind of the tensors does not match the type in the configuration.
    """
    peft_type = type_of(config, where)
    if delta.kind not in peft_type.kinds:
        raise AdapterError(
            f"the tensors of the module {path!r} are of kind {delta.kind!r}, the type is {config.get('peft_type')!r}",
            where=where,
            allowed=f"tensors of kind {' or '.join(peft_type.kinds)}",
            remedy="put the configuration and the tensors of one adapter into the folder",
        )
    return peft_type.finish(delta, config, path, where)


def settings_for(modules: Mapping[str, Delta], component: str) -> dict[str, Any]:
    """Returns the configuration of one component's modules (by path).

    Raises:
        AdapterError: The modules are of several kinds.
    """
    check_one_kind(modules, component)
    kind = next(iter(modules.values())).kind
    name, peft_type = next((name, entry) for name, entry in PEFT_TYPES.items() if kind in entry.kinds)
    return {**peft_type.settings(modules), "peft_type": name}


def _check_magnitude(delta: Delta, config: Mapping[str, Any], path: str, where: str) -> Delta:
    if bool(config.get("use_dora")) != (delta.kind == "dora"):
        has = "has a magnitude" if delta.kind == "dora" else "has no magnitude"
        problem = f"use_dora is {config.get('use_dora')!r}, and the module {path!r} {has}"
        remedy = "put the configuration and the tensors of one adapter into the folder"
        raise AdapterError(problem, where=where, allowed="magnitudes where use_dora is true", remedy=remedy)
    return delta


PEFT_TYPES.add("LORA", PeftType(("lora", "dora"), "lora_alpha", lora_config, _check_magnitude))

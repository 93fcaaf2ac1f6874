"""PEFT's adapter types: which kinds a folder of each type holds, and its configuration, both ways.

LORA is here; a kind that has a type of its own adds it beside its spelling. PEFT has one type for each component.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_engine.adapters import Delta
from lora_engine.errors import AdapterError
from lora_engine.formats.lora_config import check_one_kind, lora_config
from lora_engine.registries import Registry

Settings = Callable[[Mapping[str, Delta]], dict[str, Any]]
Finish = Callable[[Delta, Mapping[str, Any], str, str], Delta]


def _as_it_is(delta: Delta, config: Mapping[str, Any], path: str, where: str) -> Delta:
    return delta


@dataclass(frozen=True)
class PeftType:
    """One of PEFT's adapter types.

    Attributes:
        kinds: The kinds that a folder of this type holds.
        alpha: What the configuration calls alpha; empty where there is none.
        settings: The type's part of the configuration, of one component's deltas by path.
        finish: What the configuration makes of a delta: from (delta, configuration, path, where) to the delta that is
            meant. Raises `AdapterError` where the two disagree.
    """

    kinds: Sequence[str]
    alpha: str
    settings: Settings
    finish: Finish = _as_it_is


PEFT_TYPES: Registry[PeftType] = Registry("adapter type of PEFT")


def type_of(config: Mapping[str, Any], where: str) -> PeftType:
    """The type that a configuration names; LORA where it names none.

    Raises:
        AdapterError: A type that is not read.
    """
    name = str(config.get("peft_type") or "LORA").upper()
    if name not in PEFT_TYPES:
        problem = f"adapters of PEFT's type {name!r} are not read"
        raise AdapterError(problem, where=where, allowed=", ".join(PEFT_TYPES), remedy="convert it with PEFT first")
    return PEFT_TYPES[name]


def finished(delta: Delta, config: Mapping[str, Any], path: str, where: str) -> Delta:
    """What a delta means under a configuration.

    Raises:
        AdapterError: The tensors are of another kind than the configuration says.
    """
    told = type_of(config, where)
    if delta.kind not in told.kinds:
        raise AdapterError(
            f"the tensors of the module {path!r} are of kind {delta.kind!r}, the type is {config.get('peft_type')!r}",
            where=where,
            allowed=f"tensors of kind {' or '.join(told.kinds)}",
            remedy="put the configuration and the tensors of one adapter into the folder",
        )
    return told.finish(delta, config, path, where)


def settings_for(modules: Mapping[str, Delta], component: str) -> dict[str, Any]:
    """The configuration of one component's modules (by path).

    Raises:
        AdapterError: They are of several kinds.
    """
    check_one_kind(modules, component)
    kind = next(iter(modules.values())).kind
    name, told = next((name, told) for name, told in PEFT_TYPES.items() if kind in told.kinds)
    return {**told.settings(modules), "peft_type": name}


def _with_or_without_magnitude(delta: Delta, config: Mapping[str, Any], path: str, where: str) -> Delta:
    if bool(config.get("use_dora")) != (delta.kind == "dora"):
        has = "has a magnitude" if delta.kind == "dora" else "has no magnitude"
        problem = f"use_dora is {config.get('use_dora')!r}, and the module {path!r} {has}"
        remedy = "put the configuration and the tensors of one adapter into the folder"
        raise AdapterError(problem, where=where, allowed="magnitudes where use_dora is true", remedy=remedy)
    return delta


PEFT_TYPES.add("LORA", PeftType(("lora", "dora"), "lora_alpha", lora_config, _with_or_without_magnitude))

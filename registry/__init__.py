"""The registry: versions of adapters, their aliases, their lineage, and the policies of promotion.

    from registry import Registry

    with Registry.open(".loraline") as reg:
        version = reg.register("zorb", "zorb.safetensors", license="MIT")
        reg.promote(version, "production", reason="approved")  # where the policy of the alias allows it
        print(reg["zorb@production"].lineage().to_mermaid())

Bytes are stored by digest (`store`), artifacts are linked in one graph (`lineage`), versions have numbers and aliases
(`versions`), aliases have policies (`policy`), versions have cards and bills of materials (`documents`), and checks
compare all of it (`maintenance`). The registry knows no tensors and no workflow engine. Names are imported when they
are first used, so `import registry` is cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from registry.client import RegisteredVersion, Registry
    from registry.entities import AdapterVersion, ArtifactRef, Decision, Event, Execution, Run
    from registry.errors import (
        Conflict,
        HomeError,
        LineageError,
        PromotionError,
        Refused,
        RegistryError,
        StoreError,
        UnknownName,
        UnknownVersion,
        VersionError,
    )
    from registry.home import Home
    from registry.lineage.record import Lineage
    from registry.lineage.walk import Walk
    from registry.policy.alias_policy import AliasPolicy
    from registry.store.artifacts import Store
    from registry.versions.versions import Versions

_MODULES = {
    "registry.client": "RegisteredVersion Registry",
    "registry.entities": "AdapterVersion ArtifactRef Decision Event Execution Run",
    "registry.errors": "Conflict HomeError LineageError PromotionError Refused RegistryError StoreError UnknownName "
    "UnknownVersion VersionError",
    "registry.home": "Home",
    "registry.lineage.record": "Lineage",
    "registry.lineage.walk": "Walk",
    "registry.policy.alias_policy": "AliasPolicy",
    "registry.store.artifacts": "Store",
    "registry.versions.versions": "Versions",
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = [
    "AdapterVersion",
    "AliasPolicy",
    "ArtifactRef",
    "Conflict",
    "Decision",
    "Event",
    "Execution",
    "Home",
    "HomeError",
    "Lineage",
    "LineageError",
    "PromotionError",
    "Refused",
    "RegisteredVersion",
    "Registry",
    "RegistryError",
    "Run",
    "Store",
    "StoreError",
    "UnknownName",
    "UnknownVersion",
    "VersionError",
    "Versions",
    "Walk",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Finds the registry entries that a step uses; their revisions enter its cache key and lineage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lora_engine.bases.source import BaseSource
from lora_engine.catalog.kinds import KINDS
from lora_engine.families import families
from lora_engine.registries import Plugin, Registry
from registry.entities import Execution
from registry.lineage.record import Lineage
from tasks.spec import StepSpec
from tasks.step import STEPS, Inputs


@dataclass(frozen=True)
class UsedEntry:
    """An entry of a registry that a step uses.

    Attributes:
        noun: The registry's noun, such as `adapter kind`.
        name: The entry's name.
        revision: Its revision; 0 if it declares none.
        plugin: The plug-in that it is from; None for a built-in entry.
    """

    noun: str
    name: str
    revision: int = 0
    plugin: Plugin | None = None


def find_used(spec: StepSpec, base: BaseSource | None) -> tuple[UsedEntry, ...]:
    """Returns the entries that a step uses: its own, those in its settings, and the family of its base."""
    kind = STEPS[spec.uses]
    used: list[tuple[Registry[Any], str]] = [(STEPS, kind.name)]
    used += kind.entries(spec) if kind.entries else ()
    used += [(families, base.family)] if base and base.family in families else []
    return tuple(dict.fromkeys(_use(registry, name) for registry, name in used))


def use_kinds(names: Iterable[str]) -> tuple[UsedEntry, ...]:
    """Returns the entries of adapter kinds."""
    return tuple(_use(KINDS, name) for name in sorted(set(names)))


def find_input_kinds(inputs: Inputs, lineage: Lineage) -> tuple[UsedEntry, ...]:
    """Returns the kinds of the input adapters: they compute what the adapters mean.

    Leaves out built-in kinds without a revision, which change no key.
    """
    kinds = [entry for entry in use_kinds(KINDS) if entry.plugin or entry.revision]
    adapters = {ref.sha256 for refs in inputs.values() for ref in refs if ref.kind == "adapter"} if kinds else ()
    makers = [maker for digest in adapters for maker in lineage.executions(output=digest) if maker.status != "CACHED"]
    return tuple(entry for entry in kinds if any(_has_kind(maker, entry) for maker in makers))


def _has_kind(maker: Execution, entry: UsedEntry) -> bool:
    recorded = maker.settings.get("entries")
    if recorded is not None:
        return entry.name in recorded.get(entry.noun, {})
    # Releases before 0.3 recorded plug-ins only: any built-in kind is possible.
    return entry.plugin is None or entry.plugin.name in maker.settings.get("plugins", {})


def to_record(entries: Iterable[UsedEntry]) -> dict[str, Any]:
    """Returns what lineage records: revisions by noun and name, and the versions of plug-ins."""
    revisions: dict[str, dict[str, int]] = {}
    for entry in entries:
        revisions.setdefault(entry.noun, {})[entry.name] = entry.revision
    plugins = {entry.plugin.name: entry.plugin.version for entry in entries if entry.plugin}
    return {"entries": revisions} | ({"plugins": plugins} if plugins else {})


def to_key(entries: Iterable[UsedEntry]) -> dict[str, Any]:
    """Returns the parts of a cache key: declared revisions, and the version of a plug-in for an entry without one.

    Leaves out the revision of the step, which is a part of its own, and is empty for built-in entries without one.
    """
    revisions = {f"{entry.noun} {entry.name}": entry.revision for entry in _others(entries) if entry.revision}
    plugins = undeclared_plugins(entries)
    return ({"revisions": revisions} if revisions else {}) | ({"plugins": plugins} if plugins else {})


def undeclared_plugins(entries: Iterable[UsedEntry]) -> dict[str, str]:
    """Returns name and version of each plug-in with an entry that declares no revision."""
    return {entry.plugin.name: entry.plugin.version for entry in entries if entry.plugin and not entry.revision}


def changed_revisions(entries: Iterable[UsedEntry], recorded: Mapping[str, Any]) -> Iterator[str]:
    """Yields the changes from the revisions that lineage recorded of a step; a missing one is 0."""
    before = recorded.get("entries", {})
    for entry in _others(entries):
        revision = before.get(entry.noun, {}).get(entry.name, 0)
        if revision != entry.revision:
            yield f"revision of {entry.noun} {entry.name} changed {revision} -> {entry.revision}"


def _others(entries: Iterable[UsedEntry]) -> list[UsedEntry]:
    return [entry for entry in entries if entry.noun != STEPS.noun]


def _use(registry: Registry[Any], name: str) -> UsedEntry:
    return UsedEntry(registry.noun, name, registry[name].revision, registry.plugin(name))

"""Promotion: gates decide, the log remembers, rollback undoes. The rules themselves are `registry.versions.promotion`'s."""

from __future__ import annotations

import tempfile
from pathlib import Path

from lora_engine.errors import EngineError
from registry.entities import AdapterVersion, Event
from registry.errors import StoreError
from registry.home import Home
from registry.identity import current_user
from registry.versions.promotion import promote, rollback
from registry.versions.versions import Versions


def promote_version(home: Home, ref: str, alias: str, reason: str, *, override: bool = False) -> Event:
    """Points the alias at `name@version` if its bytes are whole, its structure is sound and its policy is met.

    Args:
        home: Where all state lives.
        ref: `name@version` or `name@alias`.
        alias: The alias.
        reason: Why; kept in the log.
        override: Sets reasons aside, where the policy lets it; they are kept in the log.

    Raises:
        Refused: With all reasons at once.
        GoneVersion: It was withdrawn or deleted.
        Conflict: Somebody else moved the alias meanwhile.
    """
    versions = Versions(home)
    version = versions.require_active(find_version(versions, ref))
    return promote(
        versions,
        version.name,
        version.version,
        alias,
        reason=reason,
        actor=current_user(),
        structure=find_structure(versions, version),
        override=override,
    )


def roll_back(home: Home, name: str, alias: str, to: int | None, reason: str, *, to_event: int | None = None) -> Event:
    """Points the alias back at what it pointed at before, at a version that it once had, or as an event left it."""
    return rollback(Versions(home), name, alias, to=to, to_event=to_event, reason=reason, actor=current_user())


def find_structure(versions: Versions, version: AdapterVersion) -> tuple[str, ...]:
    """What the engine finds wrong with a version's file; empty where it reads as a sound adapter.

    Bytes that are gone or damaged are not looked at: the registry finds those by itself.
    """
    from lora_engine.formats import read_bundle

    with tempfile.TemporaryDirectory(dir=versions.home.work) as name:
        path = Path(name) / "adapter.safetensors"
        try:
            versions.store.checkout_file(version.artifact, version.adapter_path, path)
            read_bundle(path)
        except StoreError:
            return ()
        except EngineError as error:
            return (error.problem,)
    return ()


def find_version(versions: Versions, ref: str) -> AdapterVersion:
    """The version that `name@version` or `name@alias` names; `name` alone is its latest.

    Raises:
        UnknownName: No such adapter.
        UnknownVersion: No such version or alias.
    """
    name, _, version = ref.partition("@")
    return versions.show(name, version or "latest")

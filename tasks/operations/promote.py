"""Promotes and rolls back versions, with the engine's check of the adapter file. See `registry.versions.promotion`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from lora_engine.errors import EngineError
from registry.entities import AdapterVersion, Event
from registry.errors import StoreError, UnknownName, UnknownVersion
from registry.home import Home
from registry.refs import split_ref
from registry.store.chain import read_head
from registry.store.tables import EventRow
from registry.versions.expected_version import require_expected
from registry.versions.promotion import promote, rollback
from registry.versions.versions import Versions


def promote_version(
    home: Home,
    ref: str,
    alias: str,
    reason: str,
    *,
    expect: str | None = None,
    override: bool = False,
    expected: int | Literal["now"] | None = "now",
    actor: str | None = None,
) -> tuple[AdapterVersion, Event, bool]:
    """Points an alias at a version if its bytes and structure are valid and the alias's policy allows it.

    Args:
        home: The home with all state.
        ref: `name@version` or `name@alias`.
        alias: The alias.
        reason: The reason, stored in the log.
        expect: Number or digest of the version that `ref` must be; None accepts any.
        override: True overrides refusals that the policy lets the user override; logged.
        expected: The number that the alias must point at, or None for none; `now` accepts any.
        actor: The user; None means this process's user.

    Returns:
        The version that `ref` is, the event, and False if the alias pointed at the version before.

    Raises:
        Refused: The promotion is refused; has all reasons.
        GoneVersion: The version was withdrawn or deleted.
        Conflict: Another process moved the alias meanwhile, or `ref` is not the expected version.
    """
    versions = Versions(home)
    name, source = split_ref(ref)
    version = find_version(versions, ref)
    with versions.lineage.database.read() as session:
        require_expected(session, version, source, expect)
        newest = read_head(session, EventRow.__table__)
    versions.require_active(version)
    event = promote(
        versions,
        name,
        source,
        alias,
        reason=reason,
        expected_source=version.version,
        structure=find_structure(versions, version),
        override=override,
        expected=expected,
        actor=actor,
    )
    return version, event, newest is None or event.seq > newest.seq


def roll_back(home: Home, name: str, alias: str, to: int | None, reason: str, *, to_event: int | None = None) -> Event:
    """Points an alias back at its previous version, at an earlier version, or at its version after an event."""
    return rollback(Versions(home), name, alias, to=to, to_event=to_event, reason=reason)


def find_structure(versions: Versions, version: AdapterVersion) -> tuple[str, ...]:
    """Returns the engine's problems with a version's file; empty if it is a valid adapter.

    Ignores missing or damaged bytes, which the registry reports itself.
    """
    from lora_engine.formats.files import read_bundle
    from lora_engine.formats.safetensors_io import map_safetensors

    with versions.home.temporary_folder(version.size) as folder:
        path = folder / "adapter.safetensors"
        try:
            versions.store.checkout_file(version.artifact, version.adapter_path, path)
            read_bundle(path, read=map_safetensors)  # without torch, whose import takes seconds
        except StoreError:
            return ()
        except EngineError as error:
            return (error.problem,)
    return ()


def find_version(versions: Versions, ref: str) -> AdapterVersion:
    """Returns the version of `name@version` or `name@alias`; `name` alone means the latest.

    Raises:
        UnknownName: The adapter does not exist.
        UnknownVersion: The version or alias does not exist.
    """
    return versions.show(*split_ref(ref))


def find_usable(versions: Versions, ref: str) -> AdapterVersion:
    """Returns the version of `name@version` or `name@alias` for a use; an alias's policy must be met now.

    Raises:
        Refused: The version does not meet the policy of the alias; has all reasons.
        UnknownName: The adapter does not exist.
        UnknownVersion: The version or alias does not exist.
    """
    return versions.use(*split_ref(ref))


def compare_metrics(
    versions: Versions, version: AdapterVersion, alias: str | int
) -> dict[str, tuple[float | None, float | None]]:
    """Returns, per metric, the value of the version of an alias or number (None without one) and of this version.

    Values of different embedders are not comparable: the first is None then.
    """
    try:
        current: Mapping[str, Any] = versions.show(version.name, alias).metrics
    except (UnknownName, UnknownVersion):
        current = {}
    comparable = {name for name in current if not differ_in_embedder(current, version.metrics, name)}
    old, new = _adapter_values(current), _adapter_values(version.metrics)
    return {name: (old.get(name) if name in comparable else None, value) for name, value in new.items()}


def differ_in_embedder(before: Mapping[str, Any], after: Mapping[str, Any], name: str) -> bool:
    """Returns True if a metric of two versions was measured with different embedders, as far as both recorded them."""
    embedders = [metrics.get(name, {}).get("embedders") for metrics in (before, after)]
    return None not in embedders and embedders[0] != embedders[1]


def _adapter_values(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    return {name: metric["adapter"] for name, metric in metrics.items() if "adapter" in metric}

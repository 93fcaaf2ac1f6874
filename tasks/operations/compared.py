"""Finds the registered version that an evaluation compares an adapter with."""

from __future__ import annotations

from registry import event_log, queries
from registry.entities import AdapterVersion, ArtifactRef
from registry.errors import GoneVersion, Refused, UnknownName, UnknownVersion
from registry.home import Home
from registry.refs import split_ref, version_number
from registry.versions.projections import stack
from registry.versions.versions import Versions


def find_compared(target: str, home: Home, candidate: ArtifactRef | None) -> ArtifactRef | str:
    """Returns the adapter of `name@version` or `name@alias`, or why there is none to compare with.

    If an alias points at the candidate itself, the version that had the alias before counts: promoting a version does
    not change what it is compared with.

    Args:
        target: The reference.
        home: The home with all state.
        candidate: The adapter that is evaluated; None if it does not exist yet.

    Raises:
        UnknownName: An explicit version of an unknown adapter.
        UnknownVersion: An explicit version that never existed.
        RegistryError: The version is damaged, or the home cannot be read.
    """
    name, ref = split_ref(target)
    is_alias = version_number(ref) is None
    versions = Versions(home)
    try:
        version = versions.show(name, ref)
        if is_alias and candidate is not None and version.artifact.sha256 == candidate.sha256:
            earlier = _find_earlier(versions, version, ref, candidate)
            if earlier is None:
                return f"{target} is the evaluated adapter itself"
            ref = str(earlier.version)
            version = earlier
        versions.require_active(version)
        return versions.get(name, ref).artifact
    except (UnknownName, UnknownVersion):
        if not is_alias:
            raise
        return f"there is no {target}"
    except (GoneVersion, Refused) as error:
        return f"{target} cannot be used: {error.problem}"
    finally:
        versions.close()


def _find_earlier(
    versions: Versions, version: AdapterVersion, alias: str, candidate: ArtifactRef
) -> AdapterVersion | None:
    """Returns the last version with another adapter that had the alias."""
    with versions.lineage.database.read() as session:
        for number in reversed(stack(event_log.read_events(session, version.name, alias))):
            earlier = queries.read_version(session, version.name, number)
            if earlier.artifact.sha256 != candidate.sha256:
                return earlier
    return None

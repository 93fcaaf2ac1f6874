"""Combines license terms, which form a lattice. Pure: reads no files and no rows.

`registry.policy.terms` gathers the terms of a version. `registry.policy.licenses` reads the terms of each license from
`registry/policy/licenses.yaml`.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass
from functools import reduce
from graphlib import CycleError, TopologicalSorter
from typing import TypeVar

COMMERCIAL = "commercial"
NON_COMMERCIAL = "non-commercial"
DERIVATIVES = "derivatives"
NO_DERIVATIVES = "no-derivatives"
PERMISSIONS = frozenset({COMMERCIAL, "redistribute", DERIVATIVES, "train-from-outputs"})
TAINTS = {NON_COMMERCIAL: COMMERCIAL, NO_DERIVATIVES: DERIVATIVES}
"""Restriction -> the permission that it removes, from any source."""

_USES = {COMMERCIAL: "commercial use", "redistribute": "redistribution", DERIVATIVES: "derivatives"}
"""Permission -> its use in a phrase."""
_NOTHING: frozenset[str] = frozenset()
Key = TypeVar("Key", bound=Hashable)


NO_ASSERTION = "NOASSERTION"
"""SPDX's identifier of a license that nobody states."""


@dataclass(frozen=True)
class LicenseTerms:
    """License terms: one point of the lattice.

    Args:
        permissions: Allowed uses; a subset of `PERMISSIONS`.
        obligations: Required actions.
        restrictions: Forbidden uses.
        licenses: Ids of the licenses that contributed.
        share_alike: Ids of the licenses that require the same terms.
        unknown: Descriptions of sources without a known license; any entry removes all permissions.
    """

    permissions: frozenset[str] = PERMISSIONS
    obligations: frozenset[str] = _NOTHING
    restrictions: frozenset[str] = _NOTHING
    licenses: frozenset[str] = _NOTHING
    share_alike: frozenset[str] = _NOTHING
    unknown: frozenset[str] = _NOTHING

    @property
    def expression(self) -> str:
        """The licenses that apply together, as one SPDX expression; `NO_ASSERTION` marks unknown ones."""
        return " AND ".join([*sorted(self.licenses - {NO_ASSERTION}), *([NO_ASSERTION] if self.unknown else [])])

    def __post_init__(self) -> None:
        # Applied here, because no caller may build terms that ignore a taint.
        removed = {permission for restriction, permission in TAINTS.items() if restriction in self.restrictions}
        allowed = _NOTHING if self.unknown else self.permissions - removed
        object.__setattr__(self, "permissions", allowed)


UNRESTRICTED = LicenseTerms()
"""The top of the lattice: every permission, no obligation, no restriction."""


def unknown(source: str) -> LicenseTerms:
    """Returns the terms of a source without a known license, which allow nothing."""
    return LicenseTerms(unknown=frozenset({source}))


def combine(*terms: LicenseTerms) -> LicenseTerms:
    """Returns the terms of something made from all sources: the intersection of permissions, the union of the rest.

    Idempotent, commutative and associative. `UNRESTRICTED` is the neutral element and the result for no arguments.
    """
    return reduce(_combine, terms, UNRESTRICTED)


def is_at_least_as_strict(tighter: LicenseTerms, looser: LicenseTerms) -> bool:
    """Returns True if the first terms allow no more than the second and require at least as much."""
    return _combine(tighter, looser) == tighter


def inherit(own: Mapping[Key, LicenseTerms], parents: Mapping[Key, Collection[Key]]) -> dict[Key, LicenseTerms]:
    """Returns the terms of every node of a graph: its own combined with those of everything upstream.

    Args:
        own: Terms that each node adds; a node without an entry adds none.
        parents: Direct upstream nodes of each node; a node without an entry has none.
    """
    nodes = {**dict.fromkeys(own, ()), **parents}
    try:
        order, is_acyclic = list(TopologicalSorter(nodes).static_order()), True
    except CycleError:
        # Two versions may each declare the other as a parent; both then have the terms of both.
        order = list({*nodes, *(parent for sources in parents.values() for parent in sources)})
        is_acyclic = False
    resolved = {node: own.get(node, UNRESTRICTED) for node in order}
    while True:
        before = dict(resolved)
        for node in order:
            resolved[node] = combine(resolved[node], *(resolved[parent] for parent in parents.get(node, ())))
        if is_acyclic or resolved == before:
            return resolved


def conflicts(terms: LicenseTerms) -> tuple[str, ...]:
    """Returns every reason why these terms forbid any release; empty if none does."""
    reasons = [f"no license is known for {source}" for source in sorted(terms.unknown)]
    if len(terms.share_alike) > 1:
        listed = " and ".join(sorted(terms.share_alike))
        reasons.append(f"{listed} each require their own terms, which cannot be met together")
    if NO_DERIVATIVES in terms.restrictions:
        reasons.append(f"no adapter may be made from it: {NO_DERIVATIVES} ({', '.join(sorted(terms.licenses))})")
    return tuple(reasons)


def allows_commercial(terms: LicenseTerms) -> bool:
    """Returns True if commercial use is allowed; other restrictions, such as a revenue limit, may still apply."""
    return COMMERCIAL in terms.permissions


def forbidden_uses(terms: LicenseTerms) -> tuple[str, ...]:
    """Returns the forbidden uses as phrases for readers, sorted; a restriction without a phrase as it is."""
    removed = () if terms.unknown else _USES.keys() - terms.permissions
    return tuple(sorted({*(_USES[use] for use in removed), *map(_forbidden_use, terms.restrictions)}))


def _forbidden_use(restriction: str) -> str:
    if restriction in TAINTS:
        return _USES[TAINTS[restriction]]
    kind, _, what = restriction.partition(":")
    phrases = {
        "uses": f"uses that {what} forbids",
        "revenue-limit": f"use by organizations with a yearly revenue of {what.replace('-', ' ')} or more",
        "no-foundation-models-from-outputs": "training of foundation models on its outputs",
        "no-competing-models-from-outputs": "training of competing models on its outputs",
    }
    return phrases.get(kind, restriction)


def _combine(left: LicenseTerms, right: LicenseTerms) -> LicenseTerms:
    return LicenseTerms(
        left.permissions & right.permissions,
        left.obligations | right.obligations,
        left.restrictions | right.restrictions,
        left.licenses | right.licenses,
        left.share_alike | right.share_alike,
        left.unknown | right.unknown,
    )

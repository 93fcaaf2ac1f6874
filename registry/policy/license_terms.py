"""What may be done with an adapter: terms as a lattice, computed by pure functions. No files, no rows, no law.

Where the terms of a version come from is gathered in `registry.policy.terms`; which licence says what is data
(`registry/policy/licenses.yaml`, read by `registry.policy.licenses`).
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
"""Restrictions that take a permission away wherever they come from."""

_NOTHING: frozenset[str] = frozenset()
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class LicenseTerms:
    """A point of the lattice.

    Args:
        permissions: What is allowed; a part of `PERMISSIONS`.
        obligations: What has to be done.
        restrictions: What is forbidden.
        licenses: Ids of the licences that took part.
        share_alike: Those of them that ask for their very own terms.
        unknown: What has no known licence, worded; anything here allows nothing.
    """

    permissions: frozenset[str] = PERMISSIONS
    obligations: frozenset[str] = _NOTHING
    restrictions: frozenset[str] = _NOTHING
    licenses: frozenset[str] = _NOTHING
    share_alike: frozenset[str] = _NOTHING
    unknown: frozenset[str] = _NOTHING

    def __post_init__(self) -> None:
        # A taint is part of the state, so that it cannot be forgotten by whoever builds one.
        taken = {permission for restriction, permission in TAINTS.items() if restriction in self.restrictions}
        allowed = _NOTHING if self.unknown else self.permissions - taken
        object.__setattr__(self, "permissions", allowed)


UNRESTRICTED = LicenseTerms()
"""The top of the lattice: nothing is known that would ask for anything."""


def unknown(what: str) -> LicenseTerms:
    """Terms of something whose licence nobody knows: nothing is allowed."""
    return LicenseTerms(unknown=frozenset({what}))


def combine(*terms: LicenseTerms) -> LicenseTerms:
    """What holds for something that was made from all of these: permissions intersect, everything else unites.

    Idempotent, commutative and associative, with `UNRESTRICTED` as its neutral element; of no terms at all it gives `UNRESTRICTED`.
    """
    return reduce(_combine, terms, UNRESTRICTED)


def is_at_least_as_strict(tighter: LicenseTerms, looser: LicenseTerms) -> bool:
    """Whether the first allows nothing that the second does not allow, and asks for all that the second asks for."""
    return _combine(tighter, looser) == tighter


def inherit(own: Mapping[Key, LicenseTerms], parents: Mapping[Key, Collection[Key]]) -> dict[Key, LicenseTerms]:
    """The terms of every node of a graph: its own, and those of all that it was made from.

    Args:
        own: What each node brings in by itself; a node without an entry brings nothing.
        parents: What each node was made from; a node without an entry was made from nothing known.
    """
    nodes = {**dict.fromkeys(own, ()), **parents}
    try:
        order, to_export = list(TopologicalSorter(nodes).static_order()), True
    except CycleError:
        # Two versions may each claim to come from the other; each then has the terms of both.
        order, to_export = list({*nodes, *(parent for each in parents.values() for parent in each)}), False
    resolved = {node: own.get(node, UNRESTRICTED) for node in order}
    while True:
        before = dict(resolved)
        for node in order:
            resolved[node] = combine(resolved[node], *(resolved[parent] for parent in parents.get(node, ())))
        if to_export or resolved == before:
            return resolved


def conflicts(terms: LicenseTerms) -> tuple[str, ...]:
    """Why these terms stand in the way of any release, all reasons at once; empty where nothing does."""
    reasons = [f"no licence is known for {what}" for what in sorted(terms.unknown)]
    if len(terms.share_alike) > 1:
        listed = " and ".join(sorted(terms.share_alike))
        reasons.append(f"{listed} each ask for their very own terms, which cannot be met together")
    if NO_DERIVATIVES in terms.restrictions:
        reasons.append(f"no adapter may be made from it: {NO_DERIVATIVES} ({', '.join(sorted(terms.licenses))})")
    return tuple(reasons)


def allows_commercial(terms: LicenseTerms) -> bool:
    """Whether the result may be used commercially; other restrictions, such as a limit of revenue, may still apply."""
    return COMMERCIAL in terms.permissions


def _combine(one: LicenseTerms, other: LicenseTerms) -> LicenseTerms:
    return LicenseTerms(
        one.permissions & other.permissions,
        one.obligations | other.obligations,
        one.restrictions | other.restrictions,
        one.licenses | other.licenses,
        one.share_alike | other.share_alike,
        one.unknown | other.unknown,
    )

"""The terms of a version: from bases, declared licences and pictures over all of its lineage, each with its place."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from registry.context import RegistryContext
from registry.entities import AdapterVersion, ArtifactRef
from registry.errors import StoreError
from registry.lineage.walk import NodeId
from registry.policy.ancestry import Ancestry, trace
from registry.policy.license_terms import NON_COMMERCIAL, UNRESTRICTED, LicenseTerms, combine, inherit, unknown
from registry.policy.licenses import Licenses, read_licenses
from registry.store.artifacts import Store

Entry = Mapping[str, Any]
_BASE = "base:"
_DATASET = "dataset"


@dataclass(frozen=True)
class Source:
    """One reason why the terms are what they are.

    Args:
        where: The version, step, dataset or origin that it comes with.
        what: What is stated there.
        terms: What that means.
    """

    where: str
    what: str
    terms: LicenseTerms


@dataclass(frozen=True)
class ResolvedTerms:
    """The terms of a version, and where each part is from."""

    terms: LicenseTerms
    sources: tuple[Source, ...]


def terms_of(context: RegistryContext, version: AdapterVersion) -> ResolvedTerms:
    """What may be done with a version, by everything that it was made from.

    Raises:
        PolicyError: The home's table of licences cannot be used.
    """
    with context.lineage.database.read() as session:
        ancestry = trace(session, version.artifact)
    datasets = read_datasets(context.store, ancestry.datasets)
    return resolve_terms(ancestry, datasets, read_licenses(context.home.path))


def resolve_terms(
    ancestry: Ancestry, datasets: Mapping[ArtifactRef, tuple[Entry, ...] | None], licenses: Licenses
) -> ResolvedTerms:
    """The terms of what was traced; pure.

    Args:
        ancestry: Where it comes from.
        datasets: The pictures of each dataset, as its manifest has them; None for one that cannot be read.
        licenses: The table.
    """
    stated: dict[NodeId, list[Source]] = {}
    for digest, registered in ancestry.versions.items():
        stated.setdefault(NodeId("artifact", digest), []).extend(
            source for version in registered for source in _of_card(version, licenses)
        )
    for step, settings in ancestry.settings.items():
        stated.setdefault(NodeId("execution", step), []).extend(_of_step(settings, licenses))
    for node in ancestry.nodes:
        if node.kind == "origin" and node.id.startswith(_BASE):
            name = node.id.removeprefix(_BASE).strip()
            stated.setdefault(node, []).append(Source("parents", f"base {name}", licenses.terms_of_base(name)))
    for dataset, entries in datasets.items():
        stated.setdefault(NodeId("artifact", dataset.sha256), []).extend(_of_images(dataset, entries, licenses))
    sources = _distinct(source for node in sorted(stated) for source in stated[node])
    if all(source.where.startswith(_DATASET) for source in sources):
        nothing = Source(
            "version", "neither base nor licence is recorded", unknown("it: neither base nor licence is recorded")
        )
        stated.setdefault(ancestry.root, []).append(nothing)
        sources = (*sources, nothing)
    own = {node: combine(*(source.terms for source in each)) for node, each in stated.items()}
    return ResolvedTerms(inherit(own, ancestry.parents).get(ancestry.root, UNRESTRICTED), sources)


def read_datasets(store: Store, datasets: Iterable[ArtifactRef]) -> dict[ArtifactRef, tuple[Entry, ...] | None]:
    """The pictures of datasets, as their manifests have them; None where the bytes are gone or damaged."""
    found: dict[ArtifactRef, tuple[Entry, ...] | None] = {}
    for dataset in datasets:
        try:
            found[dataset] = tuple(json.loads(store.read(dataset, "manifest.json")).get("pictures", ()))
        except (StoreError, ValueError):
            found[dataset] = None
    return found


def rights_of(picture: Entry) -> Entry:
    """What a manifest states about a picture; nothing, for datasets of before such statements."""
    return picture.get("rights") or {}


def _of_card(version: AdapterVersion, licenses: Licenses) -> Iterator[Source]:
    declared, base = version.card.get("license"), version.card.get("base")
    if declared:
        terms = licenses.terms_of_license(str(declared), f"{version.ref} itself")
        yield Source(version.ref, f"licence {declared} as declared", terms)
    if base:
        yield Source(
            version.ref, f"base {base}", licenses.terms_of_base(str(base), version.card.get("base_fingerprint"))
        )


def _of_step(settings: Entry, licenses: Licenses) -> Iterator[Source]:
    described = settings.get("base") or {}
    name = described.get("label") or (settings.get("settings") or {}).get("base")
    if name:
        yield Source("step", f"base {name}", licenses.terms_of_base(str(name), described.get("fingerprint")))


def _of_images(dataset: ArtifactRef, entries: tuple[Entry, ...] | None, licenses: Licenses) -> Iterator[Source]:
    where = f"{_DATASET} {dataset.sha256[:12]}"
    if entries is None:
        yield Source(where, "cannot be read", unknown(f"{where}, which cannot be read"))
        return
    stated = Counter((rights_of(each).get("license"), rights_of(each).get("rights")) for each in entries)
    for (named, basis), count in sorted(stated.items(), key=str):
        pictures = f"{count} picture{'s' if count > 1 else ''}"
        if named:
            yield Source(where, f"{pictures} under {named}", licenses.terms_of_license(named, pictures))
        elif basis == "licence":
            yield Source(where, f"{pictures} under an unnamed licence", unknown(f"{pictures} used by a licence"))
    alone = sum(rights_of(each).get("scope") == "train" for each in entries)
    if alone:
        tainted = LicenseTerms(restrictions=frozenset({NON_COMMERCIAL}))
        yield Source(where, f"{alone} picture{'s' if alone > 1 else ''} for training alone, not for commerce", tainted)


def _distinct(sources: Iterable[Source]) -> tuple[Source, ...]:
    """Each statement once: every step of a line names the same base."""
    seen: dict[tuple[str, LicenseTerms], Source] = {}
    for source in sources:
        key = (source.what, source.terms)
        if key not in seen or seen[key].where == "step":
            seen[key] = source
    return tuple(seen.values())

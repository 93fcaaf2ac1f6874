"""Derives license terms from the bases, declared licenses and images of an upstream graph."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from lora_engine.files import canonical_json
from registry.entities import AdapterVersion, ArtifactRef
from registry.errors import StoreError
from registry.lineage.graph import NodeId
from registry.policy.ancestry import Ancestry
from registry.policy.consent import Entry, rights_of
from registry.policy.license_terms import UNRESTRICTED, LicenseTerms, combine, inherit, unknown
from registry.policy.licenses import CONSENT_TO_TRAIN, Licenses
from registry.store.artifacts import Store

_BASE = "base:"
_DATASET = "dataset"
_STATEMENTS = ("license", "rights", "scope")
"""What the terms of an image follow from."""


@dataclass(frozen=True)
class Source:
    """One source of the resolved terms.

    Args:
        where: The version, step, dataset or origin that states it.
        what: The statement.
        terms: The terms that the statement implies.
    """

    where: str
    what: str
    terms: LicenseTerms


def resolve_terms(
    ancestry: Ancestry, datasets: Mapping[ArtifactRef, tuple[Entry, ...] | None], licenses: Licenses
) -> tuple[LicenseTerms, tuple[Source, ...]]:
    """Returns the license terms of an upstream graph, and the statements that they come from; pure.

    Args:
        ancestry: The upstream graph.
        datasets: Images of each dataset, from its manifest; None means that the manifest cannot be read.
        licenses: The license table.
    """
    stated: dict[NodeId, list[Source]] = defaultdict(list)
    for version in ancestry.versions:
        stated[NodeId("artifact", version.artifact.sha256)] += _card_sources(version, licenses)
    for step, settings in ancestry.settings.items():
        stated[NodeId("execution", step)] += _step_sources(settings, licenses)
        stated[NodeId("execution", step)] += _file_sources(settings, ancestry)
    for origin in ancestry.graph.ids("origin"):
        if origin.startswith(_BASE):
            stated[NodeId("origin", origin)] += _origin_sources(ancestry, origin, licenses)
    for dataset, entries in datasets.items():
        stated[NodeId("artifact", dataset.sha256)] += _image_sources(dataset, entries, licenses)
    sources = _distinct(source for node in sorted(stated) for source in stated[node])
    if all(source.where.startswith(_DATASET) for source in sources):
        no_source = Source(
            "version", "neither base nor license is recorded", unknown("it: neither base nor license is recorded")
        )
        stated[ancestry.root].append(no_source)
        sources = (*sources, no_source)
    own = {node: combine(*(source.terms for source in listed)) for node, listed in stated.items()}
    return inherit(own, ancestry.graph.sources()).get(ancestry.root, UNRESTRICTED), sources


def stated_rights(entries: Iterable[Entry]) -> list[Entry]:
    """Returns images that give the same terms as these: one of each statement, without anything else."""
    stated = {canonical_json({name: rights_of(entry).get(name) for name in _STATEMENTS}) for entry in entries}
    return [{"rights": json.loads(rights)} for rights in sorted(stated)]


def read_datasets(store: Store, datasets: Iterable[ArtifactRef]) -> dict[ArtifactRef, tuple[Entry, ...] | None]:
    """Returns the images of each dataset from its manifest; None if the bytes are missing or damaged."""
    images: dict[ArtifactRef, tuple[Entry, ...] | None] = {}
    for dataset in datasets:
        try:
            images[dataset] = tuple(json.loads(store.read(dataset, "manifest.json")).get("pictures", ()))
        except (StoreError, ValueError):
            images[dataset] = None
    return images


def _card_sources(version: AdapterVersion, licenses: Licenses) -> Iterator[Source]:
    declared, base = version.card.get("license"), version.card.get("base")
    if declared:
        terms = licenses.terms_of_license(str(declared), f"{version.ref} itself")
        yield Source(version.ref, f"license {declared} as declared", terms)
    if base:
        yield Source(
            version.ref, f"base {base}", licenses.terms_of_base(str(base), version.card.get("base_fingerprint"))
        )


def _origin_sources(ancestry: Ancestry, origin: str, licenses: Licenses) -> Iterator[Source]:
    """Yields the terms of a base that versions declare as a parent, by the fingerprints in their cards."""
    name = origin.removeprefix(_BASE).strip()
    children = {edge.target.id for edge in ancestry.graph.edges if edge.source == NodeId("origin", origin)}
    cards = [version.card for version in ancestry.versions if version.artifact.sha256 in children]
    fingerprints = {card.get("base_fingerprint") for card in cards if card.get("base") == name} or {None}
    for fingerprint in sorted(fingerprints, key=str):
        yield Source("parents", f"base {name}", licenses.terms_of_base(name, fingerprint))


def _step_sources(settings: Entry, licenses: Licenses) -> Iterator[Source]:
    described = settings.get("base") or {}
    name = described.get("label") or (settings.get("settings") or {}).get("base")
    if name:
        yield Source("step", f"base {name}", licenses.terms_of_base(str(name), described.get("fingerprint")))


def _file_sources(settings: Entry, ancestry: Ancestry) -> Iterator[Source]:
    """Yields unknown terms for an adapter that a training started from, if it is the file of no version upstream."""
    digest = (settings.get("files") or {}).get("init")
    if digest is not None and digest not in {version.sha256 for version in ancestry.versions}:
        what = f"init {digest[:12]}, an adapter file that is not registered"
        yield Source("step", what, unknown(what))


def _image_sources(dataset: ArtifactRef, entries: tuple[Entry, ...] | None, licenses: Licenses) -> Iterator[Source]:
    where = f"{_DATASET} {dataset.sha256[:12]}"
    if entries is None:
        yield Source(where, "cannot be read", unknown(f"{where}, which cannot be read"))
        return
    stated = Counter((rights_of(entry).get("license"), rights_of(entry).get("rights")) for entry in entries)
    for (license_id, basis), count in sorted(stated.items(), key=str):
        images = f"{count} image{'s' if count > 1 else ''}"
        if license_id:
            yield Source(where, f"{images} under {license_id}", licenses.terms_of_license(license_id, images))
        elif basis == "licence":
            yield Source(
                where, f"{images} under an unnamed license", unknown(f"{images} used under an unnamed license")
            )
    train_only = sum(rights_of(entry).get("scope") == "train" for entry in entries)
    if train_only:
        images = f"{train_only} image{'s' if train_only > 1 else ''}"
        tainted = licenses.terms_of_license(CONSENT_TO_TRAIN, images)
        yield Source(where, f"{images} for training only, not for commercial use", tainted)


def _distinct(sources: Iterable[Source]) -> tuple[Source, ...]:
    """Returns each statement once per dataset, and once for all steps, which name the same base."""
    seen: dict[tuple[str, str, LicenseTerms], Source] = {}
    for source in sources:
        key = (source.where if source.where.startswith(_DATASET) else "", source.what, source.terms)
        if key not in seen or seen[key].where == "step":
            seen[key] = source
    return tuple(seen.values())

"""Gathers the facts about a version from its row, lineage and store."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import select

from registry.context import RegistryContext
from registry.documents.facts import Dataset, Facts, Parent, Sample, without_paths
from registry.entities import AdapterVersion, ArtifactRef, Execution
from registry.errors import RegistryError
from registry.identity import program_version
from registry.lineage.record import Lineage
from registry.policy.license_terms import LicenseTerms, unknown
from registry.policy.rights import resolve_rights
from registry.refs import split_ref, version_number
from registry.store.artifacts import Store
from registry.store.tables import VersionRow

MAX_IMAGE_BYTES = 6 << 20
"""Maximum total bytes of the images that one page embeds."""
_MAX_SAMPLES = 6


def gather_facts(context: RegistryContext, version: AdapterVersion) -> Facts:
    """Returns the facts about a version; verifies the report and the manifests that it reads.

    Raises:
        StoreError: The report or a manifest is missing or damaged.
    """
    store, lineage = context.store, context.lineage
    try:
        with lineage.database.read() as session:
            rights = resolve_rights(session, context, version)
        terms, origin, sources = rights.terms, "inherited from everything upstream", rights.sources
    except RegistryError as error:
        terms, origin, sources = unknown("it"), f"not resolved: {error.problem}", ()
    steps = list(_steps(lineage, version))
    maker = next((step for step in reversed(steps) if step.output == version.artifact), None)
    report = _read_object(store, version.report, "report.json") if version.report else {}
    run_id = maker.run_id if maker else version.run_id
    return Facts(
        version=version,
        terms=terms,
        terms_origin=origin,
        terms_sources=[(source.where, str(without_paths(source.what))) for source in sources],
        report=report,
        maker=maker,
        run=lineage.run(run_id) if run_id else None,
        steps=steps,
        datasets=list(_datasets(store, steps)),
        parents=list(_parents(lineage, version)),
        samples=list(_samples(store, version, report)),
        builder=program_version(),
    )


def bare_facts(version: AdapterVersion) -> Facts:
    """Returns the facts from the row of a version alone, for a version whose bytes are missing."""
    stated = frozenset({str(version.card["license"])} if version.card.get("license") else ())
    return Facts(version, LicenseTerms(permissions=frozenset(), licenses=stated), "stated in the adapter's card")


def _read_object(store: Store, ref: ArtifactRef, file: str) -> dict[str, Any]:
    """Returns the JSON object in a file of an artifact; empty if an imported artifact has none."""
    if file not in store.files(ref):
        return {}
    try:
        content = json.loads(store.read(ref, file))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _steps(lineage: Lineage, version: AdapterVersion) -> Iterator[Execution]:
    steps = lineage.executions(ids=[node.id for node in lineage.walk(version.ref).nodes if node.kind == "execution"])
    # A step that returns its input unchanged has the same output as the step before it. Other inputs may have given the
    # same bytes, such as the same images with other statements about their rights: then all of them count.
    latest = {(step.step, step.uses, step.output, *sorted(step.inputs.items())): step for step in steps}
    yield from sorted(latest.values(), key=lambda step: (step.started_at, step.id))


def _parents(lineage: Lineage, version: AdapterVersion) -> Iterator[Parent]:
    with lineage.database.read() as session:
        for text in version.parents:
            # A merge names its parents by title and digest; a version with that digest has a better name.
            title, _, digest = text.partition(" sha256:")
            query = select(VersionRow).order_by(VersionRow.id).limit(1)
            name, ref = split_ref(text)
            number = version_number(ref)
            if digest:
                row = session.scalars(query.where(VersionRow.sha256 == digest)).first()
            elif number is not None:
                row = session.scalars(query.where(VersionRow.name == name, VersionRow.version == number)).first()
            elif text.startswith("base:"):
                continue
            else:
                row = None
            if row is not None:
                yield Parent(f"{row.name}@{row.version}", row.sha256)
            else:
                yield Parent(str(without_paths(title)), digest or None)


def _datasets(store: Store, steps: Sequence[Execution]) -> Iterator[Dataset]:
    seen = set()
    for step in steps:
        # A step that makes an adapter from images is a training, or a merge that learned its weights from them.
        if step.output is None or step.output.kind != "adapter":
            continue
        for role, ref in step.inputs.items():
            if ref.kind == "manifest" and (role, ref) not in seen:
                seen.add((role, ref))
                yield _dataset(role, ref, _read_object(store, ref, "manifest.json"))


def _dataset(role: str, ref: ArtifactRef, manifest: Mapping[str, Any]) -> Dataset:
    images = manifest.get("pictures", [])
    splits = Counter(image.get("split", "train") for image in images)
    sizes = Counter(f"{image['width']} x {image['height']}" for image in images)
    return Dataset(
        artifact=ref,
        role=role.partition(".")[0],
        train=splits["train"],
        heldout=splits["heldout"],
        captioned=sum(bool(image.get("caption")) for image in images),
        quarantined=len(manifest.get("quarantined", ())),
        sizes=tuple(size for size, _ in sizes.most_common(6)),
        consents=dict(sorted(Counter(image["consent"] for image in images if image.get("consent")).items())),
        pictures=tuple(sorted(image["sha256"] for image in images)),
    )


def _samples(store: Store, version: AdapterVersion, report: Mapping[str, Any]) -> Iterator[Sample]:
    """Yields the first images of the report with the trigger, up to `MAX_IMAGE_BYTES`."""
    if version.report is None:
        return
    files = store.files(version.report)
    budget = MAX_IMAGE_BYTES
    with_trigger = [entry for entry in report.get("samples", ()) if entry.get("kind") != "unasked"]
    for entry in with_trigger[:_MAX_SAMPLES]:
        before, after = (str(entry.get(role)) for role in ("base", "adapter"))
        if before not in files or after not in files:
            continue
        budget -= files[before].size + files[after].size
        if budget < 0:
            return
        label = str(entry.get("prompt", "")), str(entry.get("kind", "")), int(entry.get("seed", 0))
        yield Sample(*label, store.read(version.report, before), store.read(version.report, after))

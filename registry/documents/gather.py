"""What the documents of a version say, gathered once from its row, lineage and store."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from typing import Any

from sqlalchemy import select

from registry.context import RegistryContext
from registry.documents.facts import Dataset, Facts, LicenseTerms, Parent, Sample, without_paths
from registry.entities import AdapterVersion, ArtifactRef, Execution
from registry.errors import RegistryError
from registry.lineage.record import Lineage
from registry.policy.terms import terms_of
from registry.store.artifacts import Store
from registry.store.tables import VersionRow

MAX_PICTURE_BYTES = 6 << 20
"""How much of pictures is kept for the pages that embed them."""
_MAX_SAMPLES = 6


def gather_facts(context: RegistryContext, version: AdapterVersion) -> Facts:
    """What is known of a version; what is read of its report and its datasets is verified.

    Raises:
        StoreError: The report or a manifest is gone or damaged.
    """
    store, lineage = context.store, context.lineage
    steps = list(_steps(lineage, version))
    maker = next((step for step in reversed(steps) if step.output == version.artifact), None)
    report = _read_object(store, version.report, "report.json") if version.report else {}
    run_id = maker.run_id if maker else version.run_id
    return Facts(
        version=version,
        terms=_terms(context, version),
        report=report,
        maker=maker,
        run=lineage.run(run_id) if run_id else None,
        steps=steps,
        datasets=list(_datasets(store, steps)),
        parents=list(_parents(lineage, version)),
        samples=list(_samples(store, version, report)),
        builder=builder_version(),
    )


def bare_facts(version: AdapterVersion) -> Facts:
    """What the row of a version says alone, for one whose bytes are gone."""
    stated = str(version.card.get("license") or "")
    return Facts(version, LicenseTerms((stated,) if stated else (), "stated in the adapter's card"))


def _terms(context: RegistryContext, version: AdapterVersion) -> LicenseTerms:
    try:
        resolved = terms_of(context, version)
    except RegistryError as error:
        return LicenseTerms((), f"it could not be told: {error.problem}", unknown=("it",))
    terms = resolved.terms
    return LicenseTerms(
        licenses=tuple(sorted(terms.licenses)),
        origin="inherited from all that it was made from",
        permissions=tuple(sorted(terms.permissions)),
        obligations=tuple(sorted(terms.obligations)),
        restrictions=tuple(sorted(terms.restrictions)),
        unknown=tuple(sorted(terms.unknown)),
        sources=tuple((source.where, str(without_paths(source.what))) for source in resolved.sources),
    )


def builder_version() -> str:
    """The version of this program."""
    try:
        return package_version("loraline")
    except PackageNotFoundError:
        return "unknown"


def _read_object(store: Store, ref: ArtifactRef, file: str) -> dict[str, Any]:
    """The JSON object in a file of an artifact; an empty one where an artifact from elsewhere has none."""
    if file not in store.files(ref):
        return {}
    try:
        found = json.loads(store.read(ref, file))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _steps(lineage: Lineage, version: AdapterVersion) -> Iterator[Execution]:
    nodes = lineage.walk(version.ref).nodes
    made = [lineage.executions(output=node.id) for node in nodes if node.kind == "artifact"]
    done = [[step for step in steps if step.status == "COMPLETED"] for steps in made]
    # A step that gives back what it was given has the same output as the one before it.
    latest = {(step.step, step.uses, step.output): step for steps in done for step in steps}
    yield from sorted(latest.values(), key=lambda step: (step.started_at, step.id))


def _parents(lineage: Lineage, version: AdapterVersion) -> Iterator[Parent]:
    with lineage.database.read() as session:
        for text in version.parents:
            # A merge names its parents by title and digest; what is registered with that digest has a better name.
            title, _, digest = text.partition(" sha256:")
            known = select(VersionRow).order_by(VersionRow.id).limit(1)
            name, _, number = text.partition("@")
            if digest:
                row = session.scalars(known.where(VersionRow.sha256 == digest)).first()
            elif number.isdecimal():
                row = session.scalars(known.where(VersionRow.name == name, VersionRow.version == int(number))).first()
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
        # What made an adapter from pictures was a training, or a merge that learned its weights from them.
        if step.output is None or step.output.kind != "adapter":
            continue
        for role, ref in step.inputs.items():
            if ref.kind == "manifest" and (role, ref) not in seen:
                seen.add((role, ref))
                yield _dataset(role, ref, _read_object(store, ref, "manifest.json"))


def _dataset(role: str, ref: ArtifactRef, manifest: Mapping[str, Any]) -> Dataset:
    pictures = manifest.get("pictures", [])
    splits = Counter(picture.get("split", "train") for picture in pictures)
    sizes = Counter(f"{picture['width']} x {picture['height']}" for picture in pictures)
    return Dataset(
        artifact=ref,
        role=role.partition(".")[0],
        train=splits["train"],
        heldout=splits["heldout"],
        captioned=sum(bool(picture.get("caption")) for picture in pictures),
        quarantined=len(manifest.get("quarantined", ())),
        sizes=tuple(size for size, _ in sizes.most_common(6)),
        consents=dict(sorted(Counter(each["consent"] for each in pictures if each.get("consent")).items())),
        pictures=tuple(sorted(picture["sha256"] for picture in pictures)),
    )


def _samples(store: Store, version: AdapterVersion, report: Mapping[str, Any]) -> Iterator[Sample]:
    """The first pictures of the report with the trigger, as many as may be embedded."""
    if version.report is None:
        return
    files = store.files(version.report)
    room = MAX_PICTURE_BYTES
    shown = [entry for entry in report.get("samples", ()) if entry.get("kind") != "unasked"]
    for entry in shown[:_MAX_SAMPLES]:
        before, after = (str(entry.get(role)) for role in ("base", "adapter"))
        if before not in files or after not in files:
            continue
        room -= files[before].size + files[after].size
        if room < 0:
            return
        words = str(entry.get("prompt", "")), str(entry.get("kind", "")), int(entry.get("seed", 0))
        yield Sample(*words, store.read(version.report, before), store.read(version.report, after))

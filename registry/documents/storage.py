"""Stores and finds the documents of a version: one artifact and one row per kind."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from lora_engine.documents import parse_json
from lora_engine.files import canonical_json
from registry.context import RegistryContext
from registry.documents.facts import Facts
from registry.documents.gather import bare_facts, gather_facts
from registry.documents.mlbom import mlbom
from registry.documents.provenance import provenance
from registry.entities import AdapterVersion, ArtifactRef, now
from registry.errors import StoreError, VersionError
from registry.lineage.record import Lineage
from registry.lineage.rows import artifact_ref, record_artifacts, record_contents
from registry.store.artifacts import Store
from registry.store.tables import ArtifactRow, DocumentRow, VersionRow

if TYPE_CHECKING:
    from registry.store.artifacts import Content

_logger = logging.getLogger(__name__)

CARD, PROVENANCE, BOM, SIGNATURE = "model-card", "provenance", "ml-bom", "signature"
DOCUMENT_FILES: Mapping[str, tuple[str, ...]] = {
    CARD: ("model-card.md", "model-card.html"),
    PROVENANCE: ("provenance.json",),
    BOM: ("ml-bom.json",),
    SIGNATURE: ("signature.json",),
}
"""Kind of document -> names of its files; a signature of a further key has a file of its own."""


def _card_files(facts: Facts) -> dict[str, Content]:
    from registry.documents.card import render_html, render_markdown

    return {"model-card.md": render_markdown(facts).encode(), "model-card.html": render_html(facts).encode()}


_WRITERS: Mapping[str, Callable[[Facts], dict[str, Content]]] = {
    CARD: _card_files,
    PROVENANCE: lambda facts: {"provenance.json": canonical_json(provenance(facts))},
    BOM: lambda facts: {"ml-bom.json": canonical_json(mlbom(facts))},
}


def find_records(lineage: Lineage, version: AdapterVersion) -> dict[str, ArtifactRef]:
    """Returns the stored documents of a version, by kind."""
    with lineage.database.read() as session:
        return read_records(session, version)


def read_records(session: Session, version: AdapterVersion) -> dict[str, ArtifactRef]:
    """Returns the stored documents of a version, by kind, within a session."""
    query = (
        select(DocumentRow.kind, ArtifactRow)
        .join(ArtifactRow, ArtifactRow.sha256 == DocumentRow.artifact)
        .join(VersionRow, VersionRow.id == DocumentRow.version)
        .where(VersionRow.name == version.name, VersionRow.version == version.version)
        .order_by(DocumentRow.kind)
    )
    return {kind: artifact_ref(row) for kind, row in session.execute(query)}


def write_missing(context: RegistryContext, version: AdapterVersion) -> dict[str, ArtifactRef]:
    """Writes the missing documents of a version, and returns all of its documents, by kind.

    Safe to interrupt and repeat; never rewrites an existing document.

    Raises:
        StoreError: The report or a manifest is missing or damaged.
    """
    store, lineage = context.store, context.lineage
    stored = find_records(lineage, version)
    missing = [kind for kind in _WRITERS if kind not in stored]
    if not missing:
        return stored
    facts = gather_facts(context, version)
    written = {kind: store.put_files(kind, _WRITERS[kind](facts)) for kind in missing}
    with lineage.database.write() as session:
        # Another process may have stored its documents first; those stay.
        for kind in written.keys() - read_records(session, version).keys():
            keep(session, store, version, kind, written[kind])
    return find_records(lineage, version)


def read_documents(context: RegistryContext, version: AdapterVersion) -> dict[str, bytes]:
    """Returns the documents of a version, verified, by file name; writes missing ones if the home is writable.

    Raises:
        StoreError: A document, the report or a manifest is missing or damaged.
    """
    store, home = context.store, context.home
    is_writable = not (home.read_only or home.is_full)
    stored = write_missing(context, version) if is_writable else find_records(context.lineage, version)
    missing = [kind for kind in _WRITERS if kind not in stored]
    rendered: dict[str, Content] = {}
    if missing:
        facts = gather_facts(context, version)
        rendered = {file: content for kind in missing for file, content in _WRITERS[kind](facts).items()}
    # The files of signatures have the keys in their names.
    files = {
        file: store.read(ref, file) for ref in stored.values() for file in sorted(store.files(ref)) if "/" not in file
    }
    return files | {file: bytes(content) for file, content in rendered.items() if isinstance(content, bytes)}


def keep(session: Session, store: Store, version: AdapterVersion, kind: str, ref: ArtifactRef) -> None:
    """Records an artifact as the document of that kind, within a writing transaction; replaces an earlier one.

    The next `sync` shows it in MLflow.
    """
    query = select(VersionRow).where(VersionRow.name == version.name, VersionRow.version == version.version)
    row = session.scalars(query).one()
    row.mirrored = False
    record_artifacts(session, [ref])
    record_contents(session, ref, store.files(ref))
    session.merge(DocumentRow(version=row.id, kind=kind, artifact=ref.sha256, created_at=now()))
    session.flush()


@dataclass(frozen=True)
class Shown:
    """The facts and documents of a version that MLflow shows, besides its row."""

    facts: Facts
    documents: tuple[ArtifactRef, ...]


def gather_shown(context: RegistryContext, version: AdapterVersion) -> Shown:
    """Returns what MLflow shows of a version; writes missing documents first.

    Returns only facts from the row if the sources of the documents are damaged, because one damaged version must not
    block the sync of all others.
    """
    try:
        records = write_missing(context, version)
        return Shown(gather_facts(context, version), tuple(records.values()))
    except StoreError as error:
        _logger.warning("the documents of %s cannot be written: %s", version.ref, error)
        return Shown(bare_facts(version), ())


def read_version_document(
    store: Store, records: Mapping[str, ArtifactRef], version: AdapterVersion, file: str
) -> bytes:
    """Returns the verified bytes of one document, by the name of its file.

    Raises:
        VersionError: The document was never written.
        StoreError: The document is missing or damaged.
    """
    kind = next(kind for kind, files in DOCUMENT_FILES.items() if file in files)
    if kind not in records:
        raise VersionError(f"it has no {kind}", where=version.ref, remedy=f"`loraline records {version.ref}` writes it")
    return store.read(records[kind], file)


def document_problems(file: str, content: bytes, sha256: str) -> Iterator[str]:
    """Yields why a document is not about the adapter file with a digest.

    Args:
        file: Name of the document's file; other files have no problem.
        content: Its bytes.
        sha256: Digest of the adapter file.
    """
    try:
        digest = _subject(file, content)
    except (StoreError, KeyError, IndexError, TypeError) as error:
        yield f"it cannot be read ({error.problem if isinstance(error, StoreError) else repr(error)})"
        return
    if digest is not None and digest != sha256:
        yield f"it is for an adapter with digest {digest}"
    if file in DOCUMENT_FILES[CARD] and sha256.encode() not in content:
        yield "it does not name the adapter's digest"


def _subject(file: str, content: bytes) -> str | None:
    """Returns the adapter's digest in a JSON document; None for other documents."""
    if file not in {*DOCUMENT_FILES[PROVENANCE], *DOCUMENT_FILES[BOM]}:
        return None
    document: Any = parse_json(content, file, StoreError)
    if file in DOCUMENT_FILES[PROVENANCE]:
        return str(document["subject"][0]["digest"]["sha256"])
    return str(document["metadata"]["component"]["hashes"][0]["content"])

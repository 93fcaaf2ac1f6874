"""Records what the adapters in artifacts do, and finds the artifacts that hold a file or do the same.

The digests and sketches come from `lora_engine.formats.content`; here they are text.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import PurePosixPath

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry.entities import ADAPTER_KINDS, FOREIGN, RESULT, ArtifactRef
from registry.lineage.graph import NodeId, upstream, version_ref
from registry.lineage.rows import artifact_ref, record_artifacts
from registry.store.database import batched, insert_missing
from registry.store.tables import ArtifactRow, ContentDigestRow, ContentRow, ExecutionRow, InputRow, VersionRow

UNKNOWN_INPUTS = "unknown_inputs"
"""Setting of the step of a verb: digests of the inputs that the registry did not know."""
_WEIGHTS = frozenset({".safetensors", ".pt", ".pth", ".ckpt", ".bin"})


def has_weights(path: str) -> bool:
    """Returns True if a file has the suffix of one with tensors; other files of adapters, such as PEFT's, are alike."""
    return PurePosixPath(path).suffix.lower() in _WEIGHTS


def record_content(session: Session, artifact: ArtifactRef, digests: Mapping[str, str], sketch: str | None) -> None:
    """Records what an artifact's adapters do, within a transaction.

    Args:
        session: In a writing transaction.
        artifact: The artifact.
        digests: Digest -> its kind, `deltas` or `embedding`; empty if no adapter can be read.
        sketch: The sketch as text; None if there is none.
    """
    record_artifacts(session, [artifact])
    rows = digests or {"": "none"}
    values = [
        {"artifact": artifact.sha256, "digest": digest, "kind": kind, "sketch": sketch} for digest, kind in rows.items()
    ]
    insert_missing(session, ContentDigestRow, values)


def find_unrecorded(session: Session) -> list[ArtifactRef]:
    """Returns the stored adapters and exports whose content is not recorded yet, sorted by digest."""
    recorded = select(ContentDigestRow.artifact)
    query = select(ArtifactRow).where(ArtifactRow.kind.in_(("adapter", "export")), ArtifactRow.sha256.not_in(recorded))
    refs = map(artifact_ref, session.scalars(query.order_by(ArtifactRow.sha256)))
    return [ref for ref in refs if isinstance(ref, ArtifactRef)]


def find_holders(session: Session, digests: Collection[str]) -> dict[str, set[str]]:
    """Returns artifact -> those of the digests that its files of weights have; without original files of imports."""
    query = (
        select(ContentRow.artifact, ContentRow.sha256, ContentRow.path)
        .join(ArtifactRow, ArtifactRow.sha256 == ContentRow.artifact)
        .where(ArtifactRow.kind.in_(set(ADAPTER_KINDS) - {FOREIGN}))
    )
    found: dict[str, set[str]] = {}
    for artifact, digest, path in batched(session, query, ContentRow.sha256, digests):
        if has_weights(path):
            found.setdefault(artifact, set()).add(digest)
    return found


def find_imported(session: Session, digests: Collection[str]) -> dict[str, set[str]]:
    """Returns adapter -> those of the digests that are of the original files that it was imported from."""
    query = (
        select(ExecutionRow.output, ContentRow.sha256)
        .join(InputRow, InputRow.execution == ExecutionRow.id)
        .join(ContentRow, ContentRow.artifact == InputRow.artifact)
        .where(ExecutionRow.uses == "import", ExecutionRow.status == "COMPLETED")
    )
    found: dict[str, set[str]] = {}
    for output, digest in batched(session, query, ContentRow.sha256, digests):
        found.setdefault(output, set()).add(digest)
    return found


def find_unknown_inputs(session: Session, artifacts: Collection[str]) -> set[str]:
    """Returns the digests of files that artifacts were made from, and that nothing had when that was recorded."""
    query = select(ExecutionRow.settings).join(ArtifactRow, ArtifactRow.sha256 == ExecutionRow.output)
    rows = batched(session, query.where(ArtifactRow.kind == RESULT), ExecutionRow.output, artifacts)
    return {str(digest) for (settings,) in rows for digest in settings.get(UNKNOWN_INPUTS, ())}


def find_result_sizes(session: Session) -> set[int]:
    """Returns the sizes of the files that verbs wrote outside of the store, in bytes."""
    query = select(ContentRow.size).join(ArtifactRow, ArtifactRow.sha256 == ContentRow.artifact)
    return set(session.scalars(query.where(ArtifactRow.kind == RESULT)))


def find_equal(session: Session, digests: Collection[str]) -> set[str]:
    """Returns the artifacts with an adapter or a token of the same content; without copies in other formats."""
    query = select(ContentDigestRow.artifact, ArtifactRow.kind)
    query = query.join(ArtifactRow, ArtifactRow.sha256 == ContentDigestRow.artifact)
    kinds = {row[0]: row[1] for row in batched(session, query, ContentDigestRow.digest, filter(None, digests))}
    # A copy in another format says nothing that its source does not say.
    inputs = select(ExecutionRow.output, InputRow.artifact).join(InputRow, InputRow.execution == ExecutionRow.id)
    sources: dict[str, set[str]] = {}
    copies = [artifact for artifact, kind in kinds.items() if kind in (RESULT, "export")]
    for output, source in batched(session, inputs, ExecutionRow.output, copies):
        sources.setdefault(output, set()).add(source)
    return kinds.keys() - {output for output, origins in sources.items() if origins <= kinds.keys()}


def find_upstream(session: Session, artifacts: Iterable[str]) -> set[str]:
    """Returns the artifacts and those that they were made from by recorded steps."""
    graph = upstream(session, [NodeId("artifact", digest) for digest in artifacts], "output", "input")
    return set(graph.ids("artifact"))


def read_sketches(session: Session) -> list[tuple[str, str]]:
    """Returns artifact and sketch of every recorded content that has one."""
    query = select(ContentDigestRow.artifact, ContentDigestRow.sketch).where(ContentDigestRow.sketch.is_not(None))
    return [(artifact, sketch) for artifact, sketch in session.execute(query.distinct()) if isinstance(sketch, str)]


def name_artifacts(session: Session, artifacts: Iterable[str]) -> dict[str, str]:
    """Returns artifact -> the first version that it was registered as, or `result of STEP artifact:DIGEST`.

    Both are texts that `Versions.register` takes as parents.
    """
    wanted = sorted(set(artifacts))
    versions = select(VersionRow.artifact, version_ref()).order_by(VersionRow.id.desc())
    names: dict[str, str] = {row[0]: row[1] for row in batched(session, versions, VersionRow.artifact, wanted)}
    rest = [artifact for artifact in wanted if artifact not in names]
    steps = select(ExecutionRow.output, ExecutionRow.uses)
    made = {row[0]: row[1] for row in batched(session, steps, ExecutionRow.output, rest)}
    return names | {artifact: f"result of {made.get(artifact, 'step')} artifact:{artifact}" for artifact in rest}

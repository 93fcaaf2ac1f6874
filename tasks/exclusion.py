"""What a step must leave out because it was revoked: part of the name of its work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from registry.errors import RightsError
from registry.governance.ancestry import held_subjects
from registry.governance.revoked import read_revoked, revoked_subjects
from registry.lineage.record import Lineage
from tasks.spec import StepSpec
from tasks.step import Inputs, StepKind

_REVOKED = "revoked"
"""The entry beside the digests of the user's files, in the cache key, that names what is left out of them."""


def find_excluded(kind: StepKind, spec: StepSpec, folder: Path, lineage: Lineage) -> tuple[str, ...]:
    """Digests of the pictures and ids of the consents among the step's own files that were revoked, sorted.

    Args:
        kind: The kind of step.
        spec: Its settings.
        folder: Where the pipeline file lies.
        lineage: Where revocations are known.
    """
    if kind.excludes is None:
        return ()
    revoked = read_revoked(lineage)
    return tuple(sorted(kind.excludes(spec, folder, revoked))) if revoked else ()


def with_excluded(files: Mapping[str, str], excluded: tuple[str, ...]) -> dict[str, str]:
    """The digests of the user's files, and what is left out of them; the same as before where that is nothing."""
    return {**files, _REVOKED: " ".join(excluded)} if excluded else dict(files)


def refuse_revoked(inputs: Inputs, lineage: Lineage, where: str) -> None:
    """Stops a step whose dataset holds what was revoked since the dataset was made.

    Raises:
        RightsError: It does.
    """
    datasets = {ref.sha256 for refs in inputs.values() for ref in refs if ref.kind == "manifest"}
    with lineage.database.read() as session:
        revoked = revoked_subjects(session) if datasets else {}
        held = held_subjects(session, revoked, datasets) if revoked else frozenset()
    if held:
        raise RightsError(
            f"its dataset holds what was revoked meanwhile: {', '.join(sorted({revoked[each] for each in held}))}",
            where=where,
            remedy="run the pipeline again; ingest leaves it out",
        )

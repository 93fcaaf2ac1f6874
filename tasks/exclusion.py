"""Refuses datasets with revoked images or consents."""

from __future__ import annotations

from registry.errors import RightsError
from registry.lineage.record import Lineage
from registry.policy.revocations import revoked_in
from tasks.step import Inputs


def refuse_revoked(inputs: Inputs, lineage: Lineage, where: str) -> None:
    """Raises RightsError if a dataset contains an image or consent that was revoked after the dataset was made.

    Raises:
        RightsError: Names the revoked images and consents.
    """
    datasets = {ref.sha256 for refs in inputs.values() for ref in refs if ref.kind == "manifest"}
    with lineage.database.read() as session:
        revoked = revoked_in(session, datasets)
    if revoked:
        raise RightsError(
            f"its dataset contains revoked items: {', '.join(revoked)}",
            where=where,
            remedy="run the pipeline again; ingest excludes them",
        )

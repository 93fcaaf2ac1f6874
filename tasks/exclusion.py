"""Refuses datasets with revoked images or consents, and revoked bases."""

from __future__ import annotations

from collections.abc import Mapping

from registry.errors import RightsError
from registry.lineage.record import Lineage
from registry.policy.revocations import active_revocations, covers_base, revoked_in
from registry.store.tables import EventRow
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


def refuse_revoked_base(base: Mapping[str, str] | None, lineage: Lineage, where: str) -> None:
    """Raises RightsError if the base of a step was revoked, by its name or fingerprint.

    Args:
        base: Label and fingerprint; None means that the step has no base.
        lineage: The lineage.
        where: The step, for errors.

    Raises:
        RightsError: Names the base, and the reason of its revocation.
    """
    if base is None:
        return
    with lineage.database.read() as session:
        for revocation in active_revocations(session):
            if any(covers_base(revocation.bases, base[name]) for name in ("label", "fingerprint")):
                event = session.get_one(EventRow, revocation.seq)
                raise RightsError(
                    f"its base {base['label']!r} was revoked by {event.actor} in event {event.seq}: {event.reason}",
                    where=where,
                    remedy="set another base, or lift the revocation with `loraline lift`",
                )

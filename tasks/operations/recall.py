"""Recalls images whose consent expired or whose owners opted out since they were used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_engine.data.consent import Statement, read_consent
from lora_engine.data.folder import open_inside
from lora_engine.errors import DataError
from lora_engine.files import sha256_file
from registry.entities import is_digest
from registry.home import Home
from registry.versions.impact import Recall
from registry.versions.lapsed import LapsedReport, recall_lapsed
from registry.versions.versions import Versions


def recall_images(
    home: Home,
    reason: str,
    *,
    statements: Path | None = None,
    images: Path | None = None,
    policy: Recall | None = None,
    dry_run: bool = False,
) -> LapsedReport:
    """Revokes the images whose newest statement does not hold any more, and flags or withdraws what used them.

    Args:
        home: The home with all state.
        reason: The reason; stored in the log.
        statements: A consent file that is newer than those of the datasets; it names files or their digests.
        images: The folder of its files; None means the folder of the consent file.
        policy: `flag` or `withdraw`; None means the home's policy.
        dry_run: True changes nothing.

    Raises:
        DataError: The consent file is invalid, or an image that it names cannot be read.
    """
    stated = _by_digest(statements, images or statements.parent) if statements is not None else {}
    return recall_lapsed(Versions(home), stated, reason=reason, policy=policy, dry_run=dry_run)


def _by_digest(table: Path, folder: Path) -> dict[str, Mapping[str, Any]]:
    stated: dict[str, Mapping[str, Any]] = {}
    for name, statement in read_consent(table).items():
        digest = name.lower() if is_digest(name.lower()) else _digest(folder, name)
        stated[digest] = _as_entry(name, statement)
    return stated


def _digest(folder: Path, name: str) -> str:
    path = folder / name
    try:
        open_inside(path, folder).close()
    except DataError as error:
        raise DataError(
            error.problem, where=name, remedy=f"add it to {folder}, or name the image by its SHA-256"
        ) from None
    return sha256_file(path)


def _as_entry(name: str, statement: Statement) -> dict[str, Any]:
    rights = statement.rights.model_dump(mode="json") if statement.rights is not None else {}
    return {"source": name, "consent": statement.consent, "rights": rights}

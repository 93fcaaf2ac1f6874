"""Defines the manifest of a backup, and reads the manifests in a folder of backups."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lora_engine.documents import parse_json
from registry.errors import LineageError, StoreError
from registry.maintenance.check_chain import KnownHead
from registry.store.chain import Head
from registry.store.trees import open_regular

FORMAT = 1
BLOBS, SNAPSHOTS, MANIFEST = "blobs", "snapshots", "manifest.json"
_MANIFEST_SIZE = 1 << 30
_REMEDY = "take another backup"


class BackupManifest(BaseModel):
    """Contents of a backup.

    Attributes:
        format: Version of the layout.
        created_at: Time of the backup, ISO 8601 in UTC.
        home: Path of the home.
        files: Databases and settings beside the manifest: name -> digest.
        blobs: Digest -> size in bytes.
        left_out: Descriptions of parts of the home that the backup does not contain.
        head: The newest event of the log, `NUMBER:DIGEST`; empty without events, and in backups of earlier releases.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Annotated[int, Field(ge=0, le=1_000_000)]
    created_at: str
    home: str
    files: dict[str, str]
    blobs: dict[str, Annotated[int, Field(ge=0, lt=1 << 63)]]
    left_out: tuple[str, ...] = ()
    head: str = ""


def read_backup_manifest(snapshot: Path) -> BackupManifest:
    """Returns the manifest in the folder of a snapshot.

    Raises:
        StoreError: It is missing or invalid.
    """
    path = snapshot / MANIFEST
    try:
        with open_regular(path) as file:
            content = file.read(_MANIFEST_SIZE)
        return BackupManifest.model_validate(parse_json(content, str(path), StoreError, remedy=_REMEDY))
    except OSError as error:
        raise StoreError(f"the manifest cannot be read ({error})", where=str(path), remedy=_REMEDY) from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "the manifest"
        raise StoreError(
            f"the manifest cannot be read: {key}: {first['msg']}", where=str(path), remedy=_REMEDY
        ) from error


def read_backup_heads(folder: Path) -> list[KnownHead]:
    """Returns the heads of the log in the manifests of a folder of backups, oldest first, or of one snapshot in it.

    Raises:
        StoreError: It is no folder of backups and no snapshot, or a manifest is damaged.
    """
    snapshots = folder / SNAPSHOTS
    paths = sorted(snapshots.glob(f"[!.]*/{MANIFEST}")) if snapshots.is_dir() else [folder / MANIFEST]
    heads = []
    for path in paths:
        manifest = read_backup_manifest(path.parent)
        try:
            head = Head.parse(manifest.head) if manifest.head else None
        except LineageError as error:
            raise StoreError(
                f"the manifest of a backup cannot be read ({error})", where=str(path), remedy="name another folder"
            ) from None
        if head:
            heads.append(KnownHead(head, f"backup of {manifest.created_at} in {path.parent}"))
    return heads

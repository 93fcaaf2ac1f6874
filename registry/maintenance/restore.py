"""Restores a home from a backup: verifies everything in a temporary folder, then renames that folder."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

from pydantic import ValidationError

from lora_engine.files import atomic_write, sync_folder
from registry.entities import now
from registry.errors import HomeError, MissingBlob, StoreError, disk_errors
from registry.home import Home
from registry.maintenance.archive import ARCHIVE_SUFFIX, unpack_archive
from registry.maintenance.backup import BLOBS, DATABASES, FORMAT, KEPT, MANIFEST, SNAPSHOTS, BackupManifest
from registry.maintenance.check_rows import check_sqlite
from registry.settings import Settings, read_file, read_settings, write_file
from registry.store.artifacts import check_relative, open_regular, open_store
from registry.store.blobs import Blobs, check_digest, copy_verified
from registry.store.database import name_of, sqlite_file
from registry.store.local import LocalBlobs
from registry.store.schema import file_schema

_MANIFEST_SIZE = 1 << 30


@dataclass(frozen=True)
class Restored:
    """Result of a restore.

    Args:
        home: The home.
        created_at: Time of the backup.
        blobs: Number of blobs.
        before: New path of the replaced home; None if there was none.
        left_out: Descriptions of what the backup did not contain, and of the database servers of the home.
    """

    home: Path
    created_at: str
    blobs: int
    before: Path | None
    left_out: tuple[str, ...]


def restore_backup(source: Path, home: Path, *, replace: bool = False) -> Restored:
    """Restores a home from a backup; the next command that registers or promotes rebuilds MLflow's copies.

    Args:
        source: A folder of backups (uses the latest), one of its snapshots, or a `.tar`; not trusted.
        home: Path of the restored home.
        replace: True replaces an existing home, which is renamed first.

    Raises:
        HomeError: The home exists, or the disk is full.
        StoreError: The source is not a complete backup; nothing was changed.
    """
    home = home.expanduser().absolute()
    if not replace and holds_something(home):
        raise HomeError(
            "the folder is not empty",
            where=str(home),
            remedy="name another folder in LORALINE_HOME, or allow to replace it: the existing home is renamed",
        )
    with disk_errors(home):
        home.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=home.parent, prefix=f".{home.name}.", suffix=".partial"))
        try:
            with _opened(source, work / "unpacked") as (snapshot, blobs):
                manifest = _read_manifest(snapshot)
                servers = _rebuild(snapshot, blobs, manifest, work / "home")
            before = _switch(work / "home", home)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return Restored(home, manifest.created_at, len(manifest.blobs), before, (*manifest.left_out, *servers))


def holds_something(home: Path) -> bool:
    """Returns True if a folder has more than empty folders, lock files and the reserve."""
    if home.is_symlink() or (home.exists() and not home.is_dir()):
        return True
    reserve = Home(home).reserve
    others = (path for path in home.rglob("*") if path != reserve)
    return any(path.is_symlink() or not (path.is_dir() or path.suffix == ".lock") for path in others)


@contextmanager
def _opened(source: Path, unpacked: Path) -> Iterator[tuple[Path, LocalBlobs]]:
    if source.is_file() and source.suffix == ARCHIVE_SUFFIX:
        unpacked.mkdir()
        unpack_archive(source, unpacked)
        source = unpacked
    snapshot = source
    if (source / SNAPSHOTS).is_dir():
        complete = sorted(path for path in (source / SNAPSHOTS).iterdir() if not path.name.startswith("."))
        if not complete:
            raise StoreError("the folder has no finished backup", where=str(source))
        snapshot = complete[-1]
    if not (snapshot / MANIFEST).is_file():
        raise StoreError(
            "this is not a backup",
            where=str(source),
            allowed="a folder or a `.tar` that `loraline backup` wrote, or one of its snapshots",
        )
    yield snapshot, LocalBlobs(snapshot.absolute().parent.parent / BLOBS)


def _read_manifest(snapshot: Path) -> BackupManifest:
    path = snapshot / MANIFEST
    with open_regular(path) as file:
        content = file.read(_MANIFEST_SIZE)
    try:
        manifest = BackupManifest.model_validate_json(content)
    except ValidationError as error:
        raise StoreError(f"the manifest cannot be read ({error})", where=str(path)) from error
    if manifest.format != FORMAT:
        raise StoreError(
            f"the backup has format {manifest.format}",
            where=str(path),
            allowed=f"format {FORMAT}",
            remedy="use the release of loraline that wrote it",
        )
    for name, digest in manifest.files.items():
        check_digest(digest)
        if name not in DATABASES and not any(fnmatchcase(check_relative(name), pattern) for pattern in KEPT):
            raise StoreError(
                f"{name!r} is not a file of a backup", where=str(path), allowed=", ".join((*DATABASES, *KEPT))
            )
    for digest in manifest.blobs:
        check_digest(digest)
    return manifest


def _rebuild(snapshot: Path, source: LocalBlobs, manifest: BackupManifest, folder: Path) -> tuple[str, ...]:
    """Rebuilds the home in another folder from verified copies; returns descriptions of the servers it leaves."""
    folder.mkdir()
    for name, digest in manifest.files.items():
        _copy(snapshot / name, folder / name, digest)
    for name in filter(manifest.files.__contains__, DATABASES):
        path = folder / name
        for problem in check_sqlite(path, ""):
            raise StoreError(problem.what, where=str(snapshot / name), remedy="take another backup")
    if DATABASES[0] in manifest.files:
        file_schema(folder / DATABASES[0])
        _prepare(folder / DATABASES[0])
    servers = _leave_servers(folder) if DATABASES[0] in manifest.files else ()
    # The settings may name a remote store, which keeps its blobs and receives the missing ones.
    blobs: Blobs = open_store(Home(folder)).blobs
    for digest in manifest.blobs:
        try:
            blobs.write(digest, partial(open_regular, source.path(digest)))
        except (StoreError, MissingBlob) as error:
            where = f"blob {digest} in {source.folder}"
            raise StoreError(error.problem, where=where, remedy="take another backup") from error
    return servers


def _leave_servers(folder: Path) -> tuple[str, ...]:
    """Points the home to the backup's tables instead of a server's, which may have changed or be lost."""
    settings = read_file(folder)
    if settings.database is None or sqlite_file(settings.database):
        return ()
    servers = [f"{name_of(settings.database)}: the tables are in {DATABASES[0]}; `loraline copy-database` copies them"]
    mlflow = settings.mlflow
    if mlflow is not None and not sqlite_file(mlflow):
        servers.append(f"{name_of(mlflow)}: MLflow's tables are written to {DATABASES[1]}")
        mlflow = None
    write_file(folder, Settings(store=settings.store, mlflow=mlflow))
    return tuple(servers)


def _copy(source: Path, target: Path, digest: str) -> None:
    with open_regular(source) as stream:
        atomic_write(target, lambda file: copy_verified(stream, file, digest, str(source)))


def _prepare(database: Path) -> None:
    """Marks everything as not synced, because a backup has no MLflow copies, and sets the registry's journal mode."""
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("UPDATE versions SET mirrored = 0")
        connection.execute("UPDATE aliases SET mirrored_seq = 0")
        connection.commit()
        connection.execute("PRAGMA journal_mode=WAL")


def _switch(new: Path, home: Path) -> Path | None:
    read_settings(new)
    before = None
    if home.exists() or home.is_symlink():
        before = home.with_name(f"{home.name}.before-{now():%Y%m%dT%H%M%S.%fZ}")
        is_empty = not holds_something(home)
        home.rename(before)
    os.replace(new, home)  # noqa: PTH105
    sync_folder(home.parent)
    if before is not None and is_empty:
        shutil.rmtree(before)
        before = None
    Home.open(home)
    return before

"""Restores a home from a backup: verifies everything in a temporary folder, then renames that folder.

A backup is data: its tables and bytes go into the new home. Its settings, which name places elsewhere, are taken over
only on request.
"""

from __future__ import annotations

import glob
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from lora_engine.files import atomic_write, exchange, expand_home, sync_folder, write_within
from registry.entities import now
from registry.errors import HomeError, MissingBlob, StoreError, database_error, disk_errors
from registry.home import Home
from registry.maintenance.archive import ARCHIVE_SUFFIX, unpack_archive
from registry.maintenance.backup import DATABASES, KEPT
from registry.maintenance.backup_manifest import (
    BLOBS,
    FORMAT,
    MANIFEST,
    SNAPSHOTS,
    BackupManifest,
    read_backup_manifest,
)
from registry.maintenance.restored_tables import prepare_mlflow, prepare_tables
from registry.settings import NAME, VARIABLES, Settings, read_file, write_file
from registry.store.artifacts import open_store
from registry.store.blobs import Blobs, check_digest, copy_verified
from registry.store.local import LocalBlobs
from registry.store.redaction import redact_url
from registry.store.trees import check_relative, open_regular

_PARTIAL, _LOCK = ".partial", "lock"
_GRACE = 60.0
"""Seconds in which a new work folder is not yet deleted as left over."""


@dataclass(frozen=True)
class Restored:
    """Result of a restore.

    Args:
        home: The home.
        created_at: Time of the backup.
        blobs: Number of blobs.
        before: New path of the replaced home; None if there was none.
        left_out: Descriptions of what is not restored.
        settings: Settings in the backup that name places elsewhere and were not taken over.
        files: Policies, license tables and trusted keys of the backup, which apply in the new home.
    """

    home: Path
    created_at: str
    blobs: int
    before: Path | None
    left_out: tuple[str, ...]
    settings: Mapping[str, str]
    files: tuple[str, ...]


def restore_backup(source: Path, home: Path, *, replace: bool = False, with_settings: bool = False) -> Restored:
    """Restores a home from a backup; the next command that registers or promotes rebuilds MLflow's copies.

    Args:
        source: A folder of backups (uses the latest), one of its snapshots, or a `.tar`; not trusted.
        home: Path of the restored home.
        replace: True replaces an existing home, which is renamed.
        with_settings: True takes over the locations of store and MLflow in the backup's `loraline.yaml`; the store
            receives the missing blobs. False ignores them.

    Raises:
        HomeError: The home exists, or the disk is full.
        StoreError: The source is not a complete backup; nothing was changed.
    """
    home = expand_home(home).absolute()
    if not replace and holds_something(home):
        raise HomeError(
            "the folder is not empty",
            where=str(home),
            remedy="name another folder in LORALINE_HOME, or allow to replace it: the existing home is renamed",
        )
    with disk_errors(home):
        home.parent.mkdir(parents=True, exist_ok=True)
        with _work_folder(home) as work:
            with _opened(source, work / "unpacked") as (snapshot, blobs):
                manifest = _read_manifest(snapshot)
                new = work / "home"
                notes, settings = _rebuild(snapshot, manifest, new, home, with_settings=with_settings)
                _copy_blobs(blobs, manifest, new)
            before = _switch(work / "home", home)
    left_out = (*manifest.left_out, *notes)
    files = tuple(sorted(manifest.files.keys() - {*DATABASES, NAME}))
    return Restored(home, manifest.created_at, len(manifest.blobs), before, left_out, settings, files)


def holds_something(home: Path) -> bool:
    """Returns True if a folder has more than empty folders, lock files and the reserve."""
    if home.is_symlink() or (home.exists() and not home.is_dir()):
        return True
    reserve = Home(home).reserve
    others = (path for path in home.rglob("*") if path != reserve)
    return any(path.is_symlink() or not (path.is_dir() or path.suffix == ".lock") for path in others)


@contextmanager
def _work_folder(home: Path) -> Iterator[Path]:
    """Yields a new folder beside a home, deleted at the end; first deletes those of restores that were killed.

    A running restore holds the lock in its folder.
    """
    for folder in home.parent.glob(f".{glob.escape(home.name)}.*{_PARTIAL}"):
        lock = folder / _LOCK
        # Without a lock file, or younger, another restore may be about to lock it.
        if not folder.is_symlink() and lock.is_file() and time.time() - lock.stat().st_mtime > _GRACE:
            with suppress(Timeout), FileLock(lock, timeout=0):
                shutil.rmtree(folder, ignore_errors=True)
    work = Path(tempfile.mkdtemp(dir=home.parent, prefix=f".{home.name}.", suffix=_PARTIAL))
    try:
        with FileLock(work / _LOCK):
            yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


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
    path, manifest = snapshot / MANIFEST, read_backup_manifest(snapshot)
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
    if DATABASES[0] not in manifest.files:
        raise StoreError(f"the backup has no {DATABASES[0]}", where=str(path), remedy="take another backup")
    return manifest


def _rebuild(
    snapshot: Path, manifest: BackupManifest, folder: Path, home: Path, *, with_settings: bool
) -> tuple[list[str], dict[str, str]]:
    """Rebuilds all but the blobs in another folder; returns descriptions of what it leaves, and the settings left."""
    folder.mkdir()
    with write_within(folder):
        for name, digest in manifest.files.items():
            _copy(snapshot / name, folder / name, digest)
        settings = read_file(folder)
        (folder / NAME).unlink(missing_ok=True)
        taken = Settings(store=settings.store, mlflow=settings.mlflow) if with_settings else Settings()
        if taken != Settings():
            write_file(folder, taken)
    notes = []
    if settings.database is not None:
        tables = f"the tables are in {DATABASES[0]}; `loraline copy-database` copies them"
        notes.append(f"{redact_url(settings.database)}: {tables}")
    if os.environ.get(VARIABLES["database"]):
        notes.append(f"{VARIABLES['database']}: it hides the tables in {DATABASES[0]}; unset it")
    try:
        prepare_tables(folder / DATABASES[0], str(snapshot / DATABASES[0]))
        if DATABASES[1] in manifest.files:
            notes += prepare_mlflow(folder / DATABASES[1], str(snapshot / DATABASES[1]), manifest.home, home)
    except sqlite3.Error as error:
        where = str(folder)
        raise database_error(str(error), where) or HomeError(str(error), where=where) from error
    left = settings.model_dump(include={"store", "mlflow"}, exclude_none=True) if not with_settings else {}
    return notes, left


def _copy_blobs(source: LocalBlobs, manifest: BackupManifest, folder: Path) -> None:
    """Copies the blobs into the store of the new home, which is elsewhere only if the user names it."""
    blobs: Blobs = open_store(Home(folder)).blobs
    for digest in manifest.blobs:
        try:
            blobs.write(digest, partial(open_regular, source.path(digest)))
        except (StoreError, MissingBlob) as error:
            where = f"blob {digest} in {source.folder}"
            raise StoreError(error.problem, where=where, remedy="take another backup") from error


def _copy(source: Path, target: Path, digest: str) -> None:
    with open_regular(source) as stream:
        atomic_write(target, lambda file: copy_verified(stream, file, digest, str(source)))


def _switch(new: Path, home: Path) -> Path | None:
    """Puts a home in its place, in one step; returns the new path of the old one, None if there was none."""
    if not (home.exists() or home.is_symlink()):
        os.replace(new, home)  # noqa: PTH105
        before = None
    else:
        before = home.with_name(f"{home.name}.before-{now():%Y%m%dT%H%M%S.%fZ}")
        new.rename(before)
        exchange(before, home)
        if not holds_something(before):
            shutil.rmtree(before)
            before = None
    sync_folder(home.parent)
    Home.open(home)
    return before

"""Backs up a home while it is in use: a consistent snapshot of its databases, and every blob that they refer to.

All backups in a folder share `blobs/`, so a new backup adds only new blobs. `snapshots/TIME/` has the databases,
settings, trusted keys and a manifest with all digests. A backup leaves out what can be rebuilt (MLflow's copies of
files, caches, reports, work folders) and Prefect's own database.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from filelock import Timeout

from lora_engine.files import atomic_write, canonical_json, sha256_file, sync_folder
from registry.documents import keys
from registry.entities import Problem, now
from registry.errors import DamagedBlob, HomeError, MissingBlob, StoreError, disk_errors
from registry.home import Home
from registry.maintenance.archive import ARCHIVE_SUFFIX, pack_archive
from registry.maintenance.backup_leftovers import PARTIAL, mark_of, remove_leftovers
from registry.maintenance.backup_manifest import BLOBS, FORMAT, MANIFEST, SNAPSHOTS, BackupManifest, read_backup_heads
from registry.maintenance.check_chain import EVENTS, check_heads
from registry.maintenance.gc_roots import intact_list, known_artifacts, read_all_files, version_roots
from registry.store.artifacts import Store, open_store
from registry.store.blobs import Blobs
from registry.store.chain import read_head, read_links
from registry.store.copy_database import copy_tables
from registry.store.database import Database, name_of, sqlite_file
from registry.store.local import LocalBlobs
from registry.store.snapshot import readable

DATABASES = ("lineage.db", "mlflow.db")
KEPT = ("*.yaml", f"{keys.FOLDER}/*{keys.KEY_SUFFIX}")
"""Patterns of other files in a backup: settings, policies and trusted keys."""
_COPIES = 8
"""Blobs that are copied at once."""


@dataclass(frozen=True)
class Backup:
    """Result of a backup.

    Args:
        path: The snapshot, or the archive.
        blobs: Number of blobs in the manifest.
        copied: Number of blobs that the folder did not have before.
        size: Total bytes of the copied blobs.
        left_out: Descriptions of parts of the home that need another backup.
        problems: Missing or damaged blobs that were not copied, which make the backup incomplete; and a latest backup
            in the same folder whose newest event the log no longer has.
    """

    path: Path
    blobs: int
    copied: int
    size: int
    left_out: tuple[str, ...]
    problems: tuple[Problem, ...]


def backup(home: Home, target: Path) -> Backup:
    """Copies databases, settings and all blobs that the databases refer to. Safe while others read and write.

    Args:
        home: The home.
        target: A folder of backups, created if missing; or a file `NAME.tar` for this backup alone.

    Raises:
        HomeError: A collection is running, a database is damaged, or the disk is full.
        StoreError: The target has other content, or is inside the home.
    """
    target = target.absolute()
    if not home.exists:
        raise HomeError(
            "there is nothing to back up", where=str(home.path), remedy="correct LORALINE_HOME, which names no home"
        )
    if home.path in (target, *target.parents):
        raise StoreError("a backup must not be inside its home", where=str(target), remedy="name another folder")
    try:
        with home.lock("gc", timeout=0):
            return _backup(home, target) if target.suffix != ARCHIVE_SUFFIX else _backup_to_archive(home, target)
    except Timeout:
        raise HomeError(
            "a collection or another backup is running", where=str(home.path), remedy="wait until it ends"
        ) from None


def _backup_to_archive(home: Home, target: Path) -> Backup:
    prefix = f".{target.name}.{mark_of(home)}"
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target.parent, f".{target.name}.", prefix)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=prefix, suffix=PARTIAL) as name:
            done = _backup(home, Path(name))
            pack_archive(Path(name), target)
    return Backup(target, done.blobs, done.copied, done.size, done.left_out, done.problems)


def _backup(home: Home, target: Path) -> Backup:
    snapshots = target / SNAPSHOTS
    with disk_errors(target):
        if target.is_dir() and any(target.iterdir()) and not snapshots.is_dir():
            raise StoreError("the folder has other content", where=str(target), remedy="name an empty or a new folder")
        snapshots.mkdir(parents=True, exist_ok=True)
        prefix = f".{mark_of(home)}"
        remove_leftovers(snapshots, ".", prefix)
        for folder in (target / BLOBS).glob("*/"):
            remove_leftovers(folder, ".", "\0")
        partial_folder = Path(tempfile.mkdtemp(dir=snapshots, prefix=prefix, suffix=PARTIAL))
        try:
            done, manifest = _fill(home, target, partial_folder)
            atomic_write(partial_folder / MANIFEST, canonical_json(manifest.model_dump(mode="json")))
            partial_folder.chmod(0o755)
            path = snapshots / f"{now():%Y%m%dT%H%M%S.%fZ}"
            partial_folder.rename(path)
            sync_folder(snapshots)
        finally:
            shutil.rmtree(partial_folder, ignore_errors=True)
    return Backup(path, done.blobs, done.copied, done.size, done.left_out, done.problems)


def _fill(home: Home, target: Path, folder: Path) -> tuple[Backup, BackupManifest]:
    left_out = []
    Database(home.lineage_url).close()  # migrates to this release's schema, or raises
    own, mlflow = (folder / name for name in DATABASES)
    if (file := sqlite_file(home.lineage_url)) is not None:
        copy_database(file, own, read_only=home.read_only)
    else:
        _copy_server(home.lineage_url, own)
    if (file := sqlite_file(home.mlflow_url)) is None:
        left_out.append(f"{name_of(home.mlflow_url)}: MLflow's tables, which the registry can rebuild")
    elif file.exists():
        copy_database(file, mlflow, read_only=home.read_only)
    for pattern in KEPT:
        for path in sorted(home.path.glob(pattern)):
            if path.is_file() and not path.is_symlink():
                atomic_write(folder / path.relative_to(home.path), path.read_bytes())
    store, blobs = open_store(home), LocalBlobs(target / BLOBS)
    with closing(Database(f"sqlite:///{own}")) as database:
        referenced, problems = _referenced_blobs(database, store)
        with database.read() as session:
            head = read_head(session, EVENTS)
            # Only the latest one: a home that was restored from an older backup is reported once.
            problems += check_heads(read_links(session, EVENTS), read_backup_heads(target)[-1:])
    sizes, size, copied = {}, 0, 0
    for digest, outcome in _copy_blobs(store.blobs, blobs, sorted(referenced)):
        if isinstance(outcome, StoreError):
            remedy = "`loraline fsck --repair`, then back up again"
            problems.append(Problem(outcome.problem, referenced[digest], remedy))
            continue
        sizes[digest] = blobs.size(digest)
        copied, size = copied + outcome, size + outcome * sizes[digest]
    files = {
        path.relative_to(folder).as_posix(): sha256_file(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }
    manifest = BackupManifest(
        format=FORMAT,
        created_at=now().isoformat(),
        home=str(home.path),
        files=files,
        blobs=sizes,
        left_out=tuple(left_out),
        head=str(head or ""),
    )
    return Backup(folder, len(sizes), copied, size, tuple(left_out), tuple(problems)), manifest


def _copy_blobs(source: Blobs, target: Blobs, digests: Sequence[str]) -> Iterator[tuple[str, bool | StoreError]]:
    """Copies blobs by several threads: they wait for the disk, and one flush of it serves several.

    Yields:
        In the order of the digests, each with True if the target did not have it, or with the error of the source.

    Raises:
        HomeError: The disk is full or read-only; the remaining blobs are not copied.
    """

    def copy(digest: str) -> bool | StoreError:
        is_new = not target.exists(digest)
        try:
            target.write(digest, partial(source.open, digest))
        except StoreError as error:
            return error
        return is_new

    pool = ThreadPoolExecutor(_COPIES, "backup")
    try:
        yield from zip(digests, pool.map(copy, digests), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def _referenced_blobs(database: Database, store: Store) -> tuple[dict[str, str], list[Problem]]:
    """Returns digest -> description of every blob that the database refers to and that was not collected."""
    descriptions: dict[str, str] = {}
    problems = []
    with database.read() as session:
        needed, recorded = version_roots(session), read_all_files(session)
        for ref in known_artifacts(session):
            if ref.sha256 not in needed and not store.blobs.exists(ref.sha256):
                continue
            try:
                files = intact_list(ref, recorded.get(ref.sha256, {})) or store.files(ref)
            except (MissingBlob, DamagedBlob) as error:
                problems.append(Problem(error.problem, f"{ref.kind} {ref.sha256}", error.remedy))
                continue
            descriptions[ref.sha256] = f"list of {ref.kind} {ref.sha256}"
            descriptions |= {entry.sha256: f"{path} of {ref.kind} {ref.sha256}" for path, entry in files.items()}
    return descriptions, problems


def _copy_server(url: str, target: Path) -> None:
    """Copies the registry's tables from a server to one checked SQLite file."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        copy = Path(folder) / target.name
        copy_tables(url, f"sqlite:///{copy}")
        copy_database(copy, target)


def copy_database(source: Path, target: Path, *, read_only: bool = False) -> None:
    """Copies a consistent snapshot of a SQLite database to one checked file. Safe while others write.

    Args:
        source: The database.
        target: The new file.
        read_only: True if the source's folder cannot be written.

    Raises:
        HomeError: The database is damaged, or the disk is full.
    """
    try:
        with (
            readable(source, copy=read_only) as database,
            closing(sqlite3.connect(database, timeout=20)) as reader,
            closing(sqlite3.connect(target)) as writer,
        ):
            reader.backup(writer)
            # Keeps the copy one file, without a write-ahead log.
            writer.execute("PRAGMA journal_mode=DELETE")
            findings = [row[0] for row in writer.execute("PRAGMA integrity_check(3)")]
    except sqlite3.Error as error:
        raise HomeError(
            f"the database cannot be copied ({error})", where=str(source), remedy="`loraline fsck`"
        ) from error
    if findings != ["ok"]:
        raise HomeError(f"the database is damaged: {findings[0]}", where=str(source), remedy="`loraline fsck`")
    with target.open("rb") as file:
        os.fsync(file.fileno())

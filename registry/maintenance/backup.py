"""Keeping a copy of a home while it is in use: its databases as at one instant, and every blob that they name.

A place of backups is a folder: `blobs/` is shared by all backups in it, so that the next one adds only what is new;
`snapshots/TIME/` holds the databases, settings, trusted keys and a manifest with the digests of all. What a home can
make again (MLflow's copies of the files, caches, reports, work) and Prefect's own database are not in it.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from filelock import Timeout
from pydantic import BaseModel, ConfigDict

from lora_engine.files import atomic_write, canonical_json, sha256_file, sync_folder
from registry.documents import keys
from registry.entities import Problem, now
from registry.errors import DamagedBlob, HomeError, MissingBlob, StoreError, disk_errors
from registry.home import Home
from registry.maintenance.archive import SUFFIX, pack
from registry.maintenance.gc_roots import known_artifacts, recorded_list, version_roots
from registry.store.artifacts import Store, open_store
from registry.store.copy_database import copy_tables
from registry.store.database import Database, name_of, sqlite_file
from registry.store.local import LocalBlobs

FORMAT = 1
BLOBS, SNAPSHOTS, MANIFEST = "blobs", "snapshots", "manifest.json"
DATABASES = ("lineage.db", "mlflow.db")
KEPT = ("*.yaml", f"{keys.FOLDER}/*{keys.SUFFIX}")
"""What else of a home is kept: settings, policies, and the keys that are trusted."""


class Manifest(BaseModel):
    """What a backup holds.

    Attributes:
        format: Version of the layout.
        created_at: When it was taken, ISO 8601 in UTC.
        home: Where the home was.
        files: Databases and settings beside the manifest: name -> digest.
        blobs: Digest -> bytes.
        left_out: In words, what belongs to the home and is not in it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int
    created_at: str
    home: str
    files: dict[str, str]
    blobs: dict[str, int]
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Backup:
    """What was backed up.

    Args:
        path: The snapshot, or the archive.
        blobs: Number of blobs that it names.
        copied: Number of those that were not in the place before.
        size: Bytes of the blobs that were copied.
        left_out: In words, what belongs to the home and must be backed up by other means.
        problems: What could not be copied because it is gone or damaged; a backup with problems is not whole.
    """

    path: Path
    blobs: int
    copied: int
    size: int
    left_out: tuple[str, ...]
    problems: tuple[Problem, ...]


def backup(home: Home, target: Path) -> Backup:
    """Copies databases, settings and all blobs that the databases name; others may read and write meanwhile.

    Args:
        home: The home.
        target: A folder of backups, made if it is missing; or a file `NAME.tar`, which holds this one alone.

    Raises:
        HomeError: A collection is running, a database is damaged, or the disk is full.
        StoreError: The target holds something else, or lies in the home.
    """
    target = target.absolute()
    if home.path in (target, *target.parents):
        raise StoreError("a backup must not lie in what it is of", where=str(target), remedy="name another folder")
    if target.suffix != SUFFIX:
        return _backup(home, target)
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.", suffix=".partial") as name:
            done = _backup(home, Path(name))
            pack(Path(name), target)
    return Backup(target, done.blobs, done.copied, done.size, done.left_out, done.problems)


def _backup(home: Home, target: Path) -> Backup:
    snapshots = target / SNAPSHOTS
    with disk_errors(target):
        if target.is_dir() and any(target.iterdir()) and not snapshots.is_dir():
            raise StoreError("there is something else here", where=str(target), remedy="name an empty or a new folder")
        snapshots.mkdir(parents=True, exist_ok=True)
        partial_folder = Path(tempfile.mkdtemp(dir=snapshots, prefix=".", suffix=".partial"))
        try:
            with home.lock("gc", timeout=0):
                done, manifest = _fill(home, target, partial_folder)
            atomic_write(partial_folder / MANIFEST, canonical_json(manifest.model_dump(mode="json")))
            partial_folder.chmod(0o755)
            path = snapshots / f"{now():%Y%m%dT%H%M%S.%fZ}"
            partial_folder.rename(path)
            sync_folder(snapshots)
        except Timeout:
            raise HomeError(
                "a collection or another backup is running", where=str(home.path), remedy="wait for its end"
            ) from None
        finally:
            shutil.rmtree(partial_folder, ignore_errors=True)
    return Backup(path, done.blobs, done.copied, done.size, done.left_out, done.problems)


def _fill(home: Home, target: Path, folder: Path) -> tuple[Backup, Manifest]:
    left_out = []
    Database(home.lineage_url).close()  # of this release's schema from here on, or refused
    own, mlflow = (folder / name for name in DATABASES)
    if (file := sqlite_file(home.lineage_url)) is not None:
        copy_database(file, own)
    else:
        _copy_server(home.lineage_url, own)
    if (file := sqlite_file(home.mlflow_url)) is None:
        left_out.append(f"{name_of(home.mlflow_url)}: MLflow's tables, which are written again from the registry")
    elif file.exists():
        copy_database(file, mlflow)
    for pattern in KEPT:
        for path in sorted(home.path.glob(pattern)):
            if path.is_file() and not path.is_symlink():
                atomic_write(folder / path.relative_to(home.path), path.read_bytes())
    store, blobs = open_store(home), LocalBlobs(target / BLOBS)
    with closing(Database(f"sqlite:///{own}")) as database:
        found, problems = _named_blobs(database, store)
    held, size, copied = {}, 0, 0
    for digest, where in sorted(found.items()):
        is_new = not blobs.exists(digest)
        try:
            blobs.write(digest, partial(store.blobs.open, digest))
        except (StoreError, MissingBlob) as error:
            problems.append(Problem(error.problem, where, "`loraline fsck --repair`, then back up again"))
            continue
        held[digest] = blobs.size(digest)
        copied, size = copied + is_new, size + is_new * held[digest]
    files = {
        path.relative_to(folder).as_posix(): sha256_file(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }
    manifest = Manifest(
        format=FORMAT,
        created_at=now().isoformat(),
        home=str(home.path),
        files=files,
        blobs=held,
        left_out=tuple(left_out),
    )
    return Backup(folder, len(held), copied, size, tuple(left_out), tuple(problems)), manifest


def _named_blobs(database: Database, store: Store) -> tuple[dict[str, str], list[Problem]]:
    """Digest -> what it is, of every blob that the record names and a collection did not take."""
    found: dict[str, str] = {}
    problems = []
    with database.read() as session:
        needed = version_roots(session)
        for ref in known_artifacts(session):
            if ref.sha256 not in needed and not store.blobs.exists(ref.sha256):
                continue
            try:
                files = recorded_list(session, ref) or store.files(ref)
            except (MissingBlob, DamagedBlob) as error:
                problems.append(Problem(error.problem, f"{ref.kind} {ref.sha256}", error.remedy))
                continue
            found[ref.sha256] = f"list of {ref.kind} {ref.sha256}"
            found |= {entry.sha256: f"{path} of {ref.kind} {ref.sha256}" for path, entry in files.items()}
    return found, problems


def _copy_server(url: str, target: Path) -> None:
    """Copies our tables from a server to a file, which is one file then, and checked."""
    with tempfile.TemporaryDirectory(dir=target.parent) as beside:
        made = Path(beside) / target.name
        copy_tables(url, f"sqlite:///{made}")
        copy_database(made, target)


def copy_database(source: Path, target: Path) -> None:
    """Copies a SQLite database as it is at one instant, while others write; the copy is one file, and checked.

    Raises:
        HomeError: The database is damaged, or the disk is full.
    """
    try:
        with closing(sqlite3.connect(source, timeout=20)) as reader, closing(sqlite3.connect(target)) as writer:
            reader.backup(writer)
            # One file, without a log beside it.
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

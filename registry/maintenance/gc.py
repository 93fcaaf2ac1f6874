"""Collects garbage: unreferenced blobs and the leftovers of killed processes.

Safe while others store and register. Storing, finding or registering a blob refreshes its age (`Blobs.touch`), and a
collection deletes neither young blobs nor blobs that the database refers to. The caller prunes the engine's training
cache.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

from filelock import Timeout
from sqlalchemy.orm import Session

from registry.entities import ArtifactRef, FileEntry, is_digest, now
from registry.errors import DamagedBlob, HomeError, MissingBlob, StoreError, disk_errors
from registry.home import Home
from registry.maintenance.gc_roots import intact_list, known_artifacts, read_all_files, run_roots, version_roots
from registry.store.artifacts import Store, open_store
from registry.store.blobs import Blobs
from registry.store.database import Database

GRACE_PERIOD = 24 * 3600.0
KEEP_RUNS = 30.0

What = Literal["artifact", "blob", "bin", "leftover", "work"]


@dataclass(frozen=True)
class Item:
    """One deleted item, or one to delete in a dry run.

    Args:
        what: `artifact` (a recorded list of files), `blob`, `bin` (a blob that an earlier collection moved to the trash
            of a remote store), `leftover` (of a killed writer) or `work` (folder of a step).
        name: Digest or path.
        size: Size in bytes.
    """

    what: What
    name: str
    size: int


@dataclass(frozen=True)
class Collection:
    """Result of a collection.

    Args:
        items: Deleted items.
        kept: Number of referenced blobs.
        waiting: Number of unreferenced blobs that are younger than the grace period.
        binned: Bytes in the trash of a remote store, which a later collection deletes if no process uses them.
        dry_run: True if nothing was deleted.
    """

    items: tuple[Item, ...]
    kept: int
    waiting: int
    binned: int
    dry_run: bool

    @property
    def size(self) -> int:
        """Total bytes of the items."""
        return sum(item.size for item in self.items)


def collect(
    home: Home, *, grace: float = GRACE_PERIOD, keep_runs: float = KEEP_RUNS, dry_run: bool = False
) -> Collection:
    """Deletes blobs that no version and no recent run needs, and leftovers.

    Keeps everything that versions need (see `gc_roots.version_roots`), the inputs and outputs of recent runs, running
    runs and the last run of each pipeline, and everything younger than the grace period. A step whose result was
    deleted runs again when its output is needed.

    Args:
        home: The home.
        grace: Seconds for which a new or touched blob stays; must exceed the longest time between storing a blob and
            recording it. Use 0 only if nothing else runs.
        keep_runs: Days for which the artifacts of runs stay.
        dry_run: True deletes nothing and returns the items to delete.

    Raises:
        HomeError: Another collection or a backup is running, or the database cannot be used.
        StoreError: The files of a needed artifact are unknown; nothing was deleted.
    """
    try:
        with home.lock("gc", timeout=0), closing(Database(home.lineage_url)) as database:
            return _collect(home, database, grace, keep_runs, dry_run)
    except Timeout:
        raise HomeError(
            "another collection or a backup is running", where=str(home.path), remedy="wait until it ends"
        ) from None


def _collect(home: Home, database: Database, grace: float, keep_runs: float, dry_run: bool) -> Collection:
    store, before = open_store(home), time.time() - grace
    with database.read() as session:
        marked, lists = mark(session, store, keep_runs, before)
    # Lists first: if this process is killed midway, no list refers to a deleted file.
    digests = sorted(store.blobs.digests(), key=lambda digest: digest not in lists)
    unmarked = [digest for digest in digests if digest not in marked]
    items = list(_sweep_trash(store.blobs, marked, before, dry_run))
    trashed, binned = {item.name for item in items}, 0
    waiting = 0
    for digest in unmarked:
        if digest in trashed:
            continue
        item = _sweep(store.blobs, digest, "artifact" if digest in lists else "blob", before, dry_run)
        waiting += item is None
        items += [item] if item else []
    if not dry_run:
        binned = sum(entry.size for entry in store.blobs.trash())
    items += sweep_leftovers(home, store.blobs, before, dry_run)
    items += _sweep_work(home, before, dry_run)
    return Collection(tuple(items), len(digests) - len(unmarked), waiting, binned, dry_run)


def mark(session: Session, store: Store, keep_runs: float, before: float) -> tuple[set[str], set[str]]:
    """Returns the digests of all blobs that must stay, and of all recorded lists of files.

    A list that was found or stored since `before` keeps its files, because a list must never be incomplete.

    Raises:
        StoreError: A needed list is missing or damaged, and the database does not have its files either.
    """
    needed = version_roots(session)
    roots = needed | run_roots(session, now() - timedelta(days=keep_runs))
    marked, lists, recorded = set(roots), set(), read_all_files(session)
    for ref in known_artifacts(session):
        lists.add(ref.sha256)
        if ref.sha256 in roots or _is_young(store.blobs, ref.sha256, before):
            marked |= _files_of(store, ref, recorded.get(ref.sha256, {}), must_be_known=ref.sha256 in needed)
    return marked, lists


def _files_of(store: Store, ref: ArtifactRef, recorded: Mapping[str, FileEntry], *, must_be_known: bool) -> set[str]:
    files: Mapping[str, FileEntry] | None = intact_list(ref, recorded)
    if files is None:
        try:
            files = store.files(ref)
        except (MissingBlob, DamagedBlob) as error:
            files = recorded
            if must_be_known and not files:
                raise StoreError(
                    f"its list of files is unknown ({error.problem}), so nothing was collected",
                    where=f"{ref.kind} {ref.sha256}",
                    remedy="`loraline fsck --repair`, or restore it from a backup; then collect again",
                ) from error
    return {entry.sha256 for entry in files.values()}


def _is_young(blobs: Blobs, digest: str, before: float) -> bool:
    try:
        return blobs.age(digest) >= before
    except (FileNotFoundError, MissingBlob):
        return False


def _sweep(blobs: Blobs, digest: str, what: What, before: float, dry_run: bool) -> Item | None:
    try:
        size = blobs.size(digest)
        is_removed = blobs.age(digest) < before if dry_run else blobs.remove(digest, before)
    except (FileNotFoundError, MissingBlob):
        return None  # another process removed it
    return Item(what, digest, size) if is_removed else None


def _sweep_trash(blobs: Blobs, marked: set[str], before: float, dry_run: bool) -> Iterator[Item]:
    for entry in list(blobs.trash()):
        if entry.name in marked:
            if not dry_run:
                blobs.restore(entry.name)
        elif entry.modified < before:
            if not dry_run:
                blobs.delete_from_trash(entry.name)
            yield Item("bin", entry.name, entry.size)


def sweep_leftovers(home: Home, blobs: Blobs, before: float, dry_run: bool = False) -> Iterator[Item]:
    """Deletes the unfinished files of killed writers that are older than `before`, and yields them."""
    for orphan in blobs.orphans():
        if orphan.modified < before:
            if not dry_run:
                blobs.remove_orphan(orphan.name)
            yield Item("leftover", orphan.name, orphan.size)
    for path in find_partials(home):
        # Files in the folder of a step are deleted with that folder.
        if home.work in path.parents or _touched(path) >= before:
            continue
        size = _tree_size(path)
        if not dry_run:
            remove_path(path)
        yield Item("leftover", str(path), size)


def find_partials(home: Home) -> list[Path]:
    """Returns the unfinished files of killed writers in the folders of a home, outside the store."""
    folders = (home.work, home.cache, home.reports, home.path / "exports")
    nested = (path for folder in folders for path in folder.rglob("*.partial"))
    return sorted({*home.path.glob(".*.partial"), *nested})


def _sweep_work(home: Home, before: float, dry_run: bool) -> Iterator[Item]:
    """Deletes untouched folders of steps and copies; skips those whose lock a running step holds."""
    for folder in sorted(home.work.iterdir()):
        holder = "mlflow" if folder.name.startswith("mirror-") else folder.name if is_digest(folder.name) else "work"
        try:
            with home.lock(holder, timeout=0):
                if max(_touched(path) for path in (folder, *folder.rglob("*"))) >= before:
                    continue
                size = _tree_size(folder)
                if not dry_run:
                    remove_path(folder)
        except Timeout:
            continue
        yield Item("work", str(folder), size)


def remove_path(path: Path) -> None:
    """Deletes a file, a link or a folder; ignores a missing one.

    Raises:
        HomeError: It cannot be deleted.
    """
    with disk_errors(path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _touched(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except FileNotFoundError:
        return time.time()  # another process is working in the folder


def _tree_size(path: Path) -> int:
    files = [path, *path.rglob("*")] if path.is_dir() and not path.is_symlink() else [path]
    return sum(file.lstat().st_size for file in files if file.is_symlink() or file.is_file())

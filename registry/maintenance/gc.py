"""Collecting what nobody needs any more: blobs without an owner, and what killed processes left behind.

Safe while others put and register. Who stores, finds or registers something makes it young (`Blobs.touch`), and what is
younger than the grace period stays; so does all that the record names when the collection looks. The training cache is
the engine's, and pruned by the caller.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

from filelock import Timeout
from sqlalchemy.orm import Session

from registry.entities import ArtifactRef, is_digest, now
from registry.errors import DamagedBlob, HomeError, MissingBlob, StoreError, disk_errors
from registry.home import Home
from registry.maintenance.gc_roots import known_artifacts, recorded_files, recorded_list, run_roots, version_roots
from registry.store.artifacts import Store, open_store
from registry.store.blobs import Blobs
from registry.store.database import Database

GRACE = 24 * 3600.0
KEEP_RUNS = 30.0

What = Literal["artifact", "blob", "bin", "leftover", "work"]


@dataclass(frozen=True)
class Item:
    """One thing that went, or would go.

    Args:
        what: `artifact` (a list of files that the record knows), `blob`, `trash` (a blob that an earlier collection took
            away from a store behind a URL), `leftover` (of a killed writer) or `work` (a folder of a step).
        name: Its digest or path.
        size: Bytes.
    """

    what: What
    name: str
    size: int


@dataclass(frozen=True)
class Collection:
    """What a collection did, or with `dry_run` would do.

    Args:
        items: What went.
        kept: Number of blobs that stayed.
        waiting: Number of blobs that nobody needs, but that are younger than the grace period.
        binned: Bytes that a store behind a URL keeps until a later collection, in case that somebody was just about to
            use them.
        dry_run: Whether nothing was done.
    """

    items: tuple[Item, ...]
    kept: int
    waiting: int
    binned: int
    dry_run: bool

    @property
    def size(self) -> int:
        """Bytes of all items."""
        return sum(item.size for item in self.items)


def collect(home: Home, *, grace: float = GRACE, keep_runs: float = KEEP_RUNS, dry_run: bool = False) -> Collection:
    """Deletes what nobody needs: blobs of no version and no recent run, and leftovers.

    What stays: all that versions need (see `needs.version_roots`), what runs of the last days, running ones and
    the last one of each pipeline read and made, and whatever is younger than the grace period. A step whose result went
    simply runs again when it is asked for.

    Args:
        home: The home.
        grace: Seconds for which a new or renewed blob stays whatever the record says; must cover the longest time
            between a put and its record. 0 only where nothing else runs.
        keep_runs: Days for which the artifacts of runs stay.
        dry_run: Only says what would go.

    Raises:
        HomeError: Another collection or a backup is at it, or the database cannot be used.
        StoreError: The files of something that is needed are not known; nothing was deleted.
    """
    try:
        with home.lock("gc", timeout=0), closing(Database(home.lineage_url)) as database:
            return _collect(home, database, grace, keep_runs, dry_run)
    except Timeout:
        raise HomeError(
            "another collection or a backup is running", where=str(home.path), remedy="wait for its end"
        ) from None


def _collect(home: Home, database: Database, grace: float, keep_runs: float, dry_run: bool) -> Collection:
    store, before = open_store(home), time.time() - grace
    with database.read() as session:
        wanted, lists = mark(session, store, keep_runs, before)
    # Lists first: if this dies midway, no list of files names a file that is gone.
    digests = sorted(store.blobs.digests(), key=lambda digest: digest not in lists)
    unwanted = [digest for digest in digests if digest not in wanted]
    items = list(_sweep_bin(store.blobs, wanted, before, dry_run))
    to_export, binned = {item.name for item in items}, 0
    waiting = 0
    for digest in unwanted:
        if digest in to_export:
            continue
        item = _sweep(store.blobs, digest, "artifact" if digest in lists else "blob", before, dry_run)
        waiting += item is None
        items += [item] if item else []
    if not dry_run:
        binned = sum(entry.size for entry in store.blobs.trash())
    items += sweep_leftovers(home, store.blobs, before, dry_run)
    items += _sweep_work(home, before, dry_run)
    return Collection(tuple(items), len(digests) - len(unwanted), waiting, binned, dry_run)


def mark(session: Session, store: Store, keep_runs: float, before: float) -> tuple[set[str], set[str]]:
    """The digests of all blobs that must stay, and of all lists of files that the record knows.

    A list that was found or put since `before` keeps its files: there is no list without them.

    Raises:
        StoreError: A list that is needed is gone or damaged, and the record does not have its files either.
    """
    needed = version_roots(session)
    kept = needed | run_roots(session, now() - timedelta(days=keep_runs))
    wanted, lists = set(kept), set()
    for ref in known_artifacts(session):
        lists.add(ref.sha256)
        if ref.sha256 in kept or _is_young(store.blobs, ref.sha256, before):
            wanted |= _files_of(session, store, ref, must_be_known=ref.sha256 in needed)
    return wanted, lists


def _files_of(session: Session, store: Store, ref: ArtifactRef, *, must_be_known: bool) -> set[str]:
    files = recorded_list(session, ref)
    if files is None:
        try:
            files = store.files(ref)
        except (MissingBlob, DamagedBlob) as error:
            files = recorded_files(session, ref)
            if must_be_known and not files:
                raise StoreError(
                    f"nobody knows which files belong to it ({error.problem}), so nothing was collected",
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
        gone = blobs.age(digest) < before if dry_run else blobs.remove(digest, before)
    except (FileNotFoundError, MissingBlob):
        return None  # somebody else took it away
    return Item(what, digest, size) if gone else None


def _sweep_bin(blobs: Blobs, wanted: set[str], before: float, dry_run: bool) -> Iterator[Item]:
    for entry in list(blobs.trash()):
        if entry.name in wanted:
            if not dry_run:
                blobs.restore(entry.name)
        elif entry.modified < before:
            if not dry_run:
                blobs.delete_from_trash(entry.name)
            yield Item("bin", entry.name, entry.size)


def sweep_leftovers(home: Home, blobs: Blobs, before: float, dry_run: bool = False) -> Iterator[Item]:
    """Deletes what writers that died left before that instant, and says what."""
    for stray in blobs.orphans():
        if stray.modified < before:
            if not dry_run:
                blobs.remove_orphan(stray.name)
            yield Item("leftover", stray.name, stray.size)
    for path in find_partials(home):
        # What lies in the folder of a step goes with that folder.
        if home.work in path.parents or _touched(path) >= before:
            continue
        size = _tree_size(path)
        if not dry_run:
            remove_path(path)
        yield Item("leftover", str(path), size)


def find_partials(home: Home) -> list[Path]:
    """What writers that died left in the folders of a home, beside the blobs."""
    deep = [folder.rglob("*.partial") for folder in (home.work, home.cache, home.reports, home.path / "exports")]
    return sorted({*home.path.glob(".*.partial"), *(path for found in deep for path in found)})


def _sweep_work(home: Home, before: float, dry_run: bool) -> Iterator[Item]:
    """Folders of steps and copies that nobody has touched since; a step that is being worked on holds its lock."""
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
    """Deletes a file, a link or a folder; what is gone already is fine.

    Raises:
        HomeError: It may not be deleted.
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
        return time.time()  # somebody is at it


def _tree_size(path: Path) -> int:
    files = [path, *path.rglob("*")] if path.is_dir() and not path.is_symlink() else [path]
    return sum(file.lstat().st_size for file in files if file.is_symlink() or file.is_file())

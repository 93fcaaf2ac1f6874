"""`Home`: the folder of all state (LORALINE_HOME), its subfolders and its locks."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock

from lora_engine.files import FilePath, atomic_write, expand_home
from registry.errors import DiskFull, HomeError, disk_errors
from registry.settings import Settings, read_settings
from registry.store.snapshot import find_scratch

_FOLDERS = ("store", "prefect", "work", "cache", "reports", "runs", "locks", "mlflow")
_ROOM = 64 << 10
"""Bytes that a usable disk has room for; SQLite needs 32 KiB for the index of its log before it can read."""
_RESERVE = 1 << 20


@dataclass(frozen=True)
class Home:
    """The folder of all state, and the paths in it.

    Args:
        path: Absolute path of the folder.
        read_only: True if nothing in it may be created, changed or deleted; it may also be missing.
        is_full: True if files in it can be deleted, but not written.
    """

    path: Path
    read_only: bool = False
    is_full: bool = False

    @classmethod
    def open(cls, path: FilePath, *, create: bool = True) -> Home:
        """Returns the home at a path.

        Args:
            path: The folder.
            create: True creates missing folders and requires that the home is writable. False creates nothing,
                refuses a folder that is no home yet, and opens a home read-only that it cannot write.

        Raises:
            HomeError: Not a home, not writable, or full.
        """
        home = cls._at(path)
        if create:
            with disk_errors(home.path):
                for folder in _FOLDERS:
                    (home.path / folder).mkdir(parents=True, exist_ok=True)
                home._probe(_ROOM)
                home._fill_reserve()
            return home
        if not home.exists:
            raise HomeError(
                "not a Loraline home",
                where=str(home.path),
                remedy="`loraline run` or `loraline import` creates it; or correct LORALINE_HOME",
            )
        return home if home._is_writable() else replace(home, read_only=True)

    @classmethod
    def open_to_read(cls, path: FilePath) -> Home:
        """Returns the home at a path for reading; a missing one is empty and is not created."""
        home = cls._at(path)
        return cls.open(path, create=False) if home.exists else replace(home, read_only=True)

    @classmethod
    def open_to_delete(cls, path: FilePath) -> Home:
        """Returns the home for work that frees space. On a full disk, it first gives up the reserve.

        Raises:
            HomeError: Not writable for another reason than a full disk.
        """
        home = cls._at(path)
        try:
            with disk_errors(home.path):
                (home.path / "locks").mkdir(parents=True, exist_ok=True)
                home._probe(_RESERVE)
        except DiskFull:
            home.reserve.unlink(missing_ok=True)
        try:
            return cls.open(path)
        except DiskFull:
            return replace(home, is_full=True)

    @classmethod
    def _at(cls, path: FilePath) -> Home:
        return cls(expand_home(path).absolute())

    @property
    def exists(self) -> bool:
        """Returns True if the folder is a home, or if the settings name a database elsewhere."""
        return self.store.is_dir() or self.settings.database is not None

    def _probe(self, size: int) -> None:
        probe = self.locks / f"probe-{os.getpid()}"
        atomic_write(probe, bytes(size))
        probe.unlink(missing_ok=True)

    def _is_writable(self) -> bool:
        if not self.locks.is_dir():
            return False
        try:
            with disk_errors(self.path):
                self._probe(_ROOM)
        except HomeError:
            return False
        paths = (self.path, self.store, self.lineage_db)
        return all(os.access(path, os.W_OK) for path in paths if path.exists())

    def _fill_reserve(self) -> None:
        if not self.reserve.exists() and shutil.disk_usage(self.path).free > 4 * _RESERVE:
            self.reserve.write_bytes(bytes(_RESERVE))

    @property
    def reserve(self) -> Path:
        """File without content that `open_to_delete` deletes on a full disk, because deletions are recorded."""
        return self.path / "reserve"

    @property
    def store(self) -> Path:
        """Folder of the content-addressed store."""
        return self.path / "store"

    @property
    def work(self) -> Path:
        """Folder for checkouts and checkpoints; may be deleted while nothing runs."""
        return self.path / "work"

    @property
    def cache(self) -> Path:
        """Folder of encoded images and texts that training runs share; may be deleted while nothing runs."""
        return self.path / "cache"

    @property
    def reports(self) -> Path:
        """Folder of rendered reports."""
        return self.path / "reports"

    @property
    def runs(self) -> Path:
        """Folder of what runs report while they run; may be deleted while nothing runs."""
        return self.path / "runs"

    @property
    def prefect(self) -> Path:
        """Folder for Prefect."""
        return self.path / "prefect"

    @property
    def locks(self) -> Path:
        """Folder of lock files."""
        return self.path / "locks"

    @property
    def lineage_db(self) -> Path:
        """File of the registry's own database."""
        return self.path / "lineage.db"

    @property
    def mlflow_db(self) -> Path:
        """File of MLflow's database."""
        return self.path / "mlflow.db"

    @property
    def mlflow_artifacts(self) -> Path:
        """Folder of the copies that MLflow shows."""
        return self.path / "mlflow"

    @property
    def settings(self) -> Settings:
        """The locations of store and databases that are configured outside the home."""
        return read_settings(self.path)

    @property
    def store_url(self) -> str | None:
        """URL (as fsspec reads it) of the store's blobs, or None for the folder of the home."""
        return self.settings.store

    @property
    def lineage_url(self) -> str:
        """SQLAlchemy URL of the registry's own database."""
        url = self.settings.database or f"sqlite:///{self.lineage_db}"
        if not (self.read_only or self.is_full) or not url.startswith("sqlite"):
            return url
        return f"{url}{'&' if '?' in url else '?'}mode=ro"

    @property
    def mlflow_url(self) -> str:
        """Tracking and registry URI for MLflow's clients and user interface."""
        return self.settings.mlflow or f"sqlite:///{self.mlflow_db}"

    @contextmanager
    def temporary_folder(self, size: int = 0) -> Iterator[Path]:
        """Yields a folder for copies of files: in `work`, or elsewhere if the home cannot be written.

        Args:
            size: Total size of the copies in bytes.
        """
        parent = find_scratch(size) if self.read_only else self.work
        with tempfile.TemporaryDirectory(dir=parent) as name:
            yield Path(name)

    def lock(self, name: str, timeout: float = -1) -> AbstractContextManager[object]:
        """Returns a lock between processes; the system releases it when the process that holds it exits.

        Args:
            name: Name of the locked resource; nothing is locked in a home that is only read.
            timeout: Seconds to wait; -1 waits forever.
        """
        return nullcontext() if self.read_only else FileLock(self.locks / f"{name}.lock", timeout=timeout)

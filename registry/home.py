"""`Home`: the folder of all state (LORALINE_HOME), its subfolders and its locks."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from lora_engine.files import FilePath, atomic_write
from registry.errors import HomeError, disk_errors
from registry.settings import Settings, read_settings

_FOLDERS = ("store", "prefect", "work", "cache", "reports", "locks", "mlflow")


@dataclass(frozen=True)
class Home:
    """The folder of all state, and the paths in it.

    Args:
        path: Absolute path of the folder.
    """

    path: Path

    @classmethod
    def open(cls, path: FilePath, *, create: bool = True) -> Home:
        """Returns the home at a path; creates its folders and checks that they are writable.

        Args:
            path: The folder; created if it is missing.
            create: False refuses a folder that is not a home yet.

        Raises:
            HomeError: Not a home, not writable, or full.
        """
        home = cls(Path(path).expanduser().absolute())
        if not create and not home.store.is_dir():
            raise HomeError(
                "not a Loraline home",
                where=str(home.path),
                remedy="run `loraline init`, or set LORALINE_HOME",
            )
        with disk_errors(home.path):
            for folder in _FOLDERS:
                (home.path / folder).mkdir(parents=True, exist_ok=True)
            probe = home.locks / f"probe-{os.getpid()}"
            atomic_write(probe, b"can this be written?")
            probe.unlink(missing_ok=True)
        return home

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
        return self.settings.database or f"sqlite:///{self.lineage_db}"

    @property
    def mlflow_url(self) -> str:
        """Tracking and registry URI for MLflow's clients and user interface."""
        return self.settings.mlflow or f"sqlite:///{self.mlflow_db}"

    def lock(self, name: str, timeout: float = -1) -> FileLock:
        """Returns a lock between processes; the system releases it when the process that holds it exits.

        Args:
            name: Name of the locked resource.
            timeout: Seconds to wait; -1 waits forever.
        """
        return FileLock(self.locks / f"{name}.lock", timeout=timeout)

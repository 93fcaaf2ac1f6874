"""Copies a SQLite database that cannot be opened where it is: on a read-only or full disk, or without permission.

SQLite writes even to read: a database in WAL mode needs an index file beside it. `immutable=1` needs none, but would
return wrong rows while another process writes.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from registry.errors import HomeError, disk_errors

_ATTEMPTS = 20
_PAUSE = 0.05
_SPARE = 1 << 20
_MEMORY = "/dev/shm"  # noqa: S108 (mkdtemp makes a private folder in it)


def find_scratch(size: int = 0) -> str:
    """Returns a folder for temporary files of this size outside the home: on disk, or else in memory.

    Args:
        size: Bytes.

    Raises:
        HomeError: No folder has room for them.
    """
    folders = [_MEMORY]
    with suppress(FileNotFoundError):  # every folder for temporary files is full or read-only
        folders.insert(0, tempfile.gettempdir())
    for folder in folders:
        if os.access(folder, os.W_OK) and shutil.disk_usage(folder).free >= size + _SPARE:
            return folder
    raise HomeError(
        f"no folder for temporary files has {size + _SPARE} bytes free",
        where=", ".join(folders),
        remedy="set TMPDIR to a folder on a disk with free space",
    )


@contextmanager
def readable(path: Path, *, copy: bool) -> Iterator[Path]:
    """Yields a SQLite database that can be opened: the file itself, or a temporary copy.

    Args:
        path: The database.
        copy: True yields a copy; see `copy_to_scratch`.
    """
    if not copy:
        yield path
        return
    scratch = copy_to_scratch(path)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch.parent, ignore_errors=True)


def copy_to_scratch(path: Path) -> Path:
    """Copies a SQLite database to a new temporary folder, as one consistent state, and returns the copy.

    Args:
        path: The database; its copy does not exist either if it is missing. The caller deletes the copy's folder.

    Raises:
        HomeError: Another process changes it all the time, or no folder has room for the copy.
    """
    log = path.with_name(f"{path.name}-wal")
    size = sum(file.stat().st_size for file in (path, log) if file.exists())
    copy = Path(tempfile.mkdtemp(dir=find_scratch(size), prefix="loraline-")) / path.name
    try:
        with disk_errors(copy):
            if path.exists() and not _copy_shared(path, copy):
                _copy_files((path, log), copy.parent)
            elif log.exists() and not path.exists():
                shutil.copyfile(log, copy.with_name(log.name))
    except BaseException:
        shutil.rmtree(copy.parent, ignore_errors=True)
        raise
    return copy


def _copy_shared(path: Path, copy: Path) -> bool:
    """Copies through SQLite, with its locks; returns False where no process has the database open."""
    index = path.with_name(f"{path.name}-shm")
    if not index.exists() or not index.stat().st_size:
        return False
    try:
        with (
            closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=20)) as source,
            closing(sqlite3.connect(copy)) as target,
        ):
            source.backup(target)
    except sqlite3.DatabaseError:
        for suffix in ("", "-wal", "-shm", "-journal"):
            copy.with_name(copy.name + suffix).unlink(missing_ok=True)
        return False
    return True


def _copy_files(files: tuple[Path, ...], folder: Path) -> None:
    """Copies the files, again if one changes meanwhile: another process may open the database at any time."""
    for _ in range(_ATTEMPTS):
        before = _state(files)
        for file in files:
            with suppress(FileNotFoundError):
                shutil.copyfile(file, folder / file.name)
        if _state(files) == before:
            return
        for file in files:
            (folder / file.name).unlink(missing_ok=True)
        time.sleep(_PAUSE)
    raise HomeError(
        "another process changes the database all the time", where=str(files[0]), remedy="try again when it has ended"
    )


def _state(files: tuple[Path, ...]) -> list[tuple[int, int, int]]:
    states = [file.stat() for file in files if file.exists()]
    return [(state.st_ino, state.st_size, state.st_mtime_ns) for state in states]

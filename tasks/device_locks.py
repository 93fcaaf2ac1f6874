"""Locks the slots of devices in a folder. Child processes inherit locks; the system frees those of dead processes."""

from __future__ import annotations

import fcntl
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from filelock import FileLock

from registry.errors import HomeError, disk_errors
from registry.home import Home

LOCKS = "LORALINE_DEVICE_LOCKS"
"""Environment variable with the folder of this machine's device locks."""
_NO_FILE_NAME = re.compile(r"[^A-Za-z0-9.]+")


def machine_locks() -> Path:
    """Returns the folder with the locks of this machine's devices, shared by all homes of this user; creates it.

    Its place does not depend on the session, which a scheduled run does not have: `LORALINE_DEVICE_LOCKS` overrides it.

    Raises:
        HomeError: It is a link, or not a folder that only this user can write.
    """
    given = os.environ.get(LOCKS)
    path = Path(given) if given else Path("/tmp") / f"loraline-{os.getuid()}"  # noqa: S108  # checked below
    with disk_errors(path):
        path.mkdir(mode=0o700, parents=bool(given), exist_ok=True)
        state = path.lstat()
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid() or state.st_mode & 0o022:
        raise HomeError(
            "the locks of devices need a folder that only this user can write",
            where=str(path),
            remedy=f"remove it, or set {LOCKS} to such a folder",
        )
    return path


def count_holders(home: Home, device: str) -> int:
    """Returns the number of slots of a device that are held now by processes of a home."""
    with _serialized(home.locks, device):
        descriptors, held = _lock_free_slots(home.locks, device)
        close_locks(descriptors)
    return held


def take_slot(folder: Path, device: str, limit: int, *, exclusive: bool) -> list[int] | None:
    """Takes a slot of a device without waiting.

    Args:
        folder: The folder of the locks.
        device: Any name; equal names mean the same device.
        limit: Maximum number of holders, this one included.
        exclusive: True needs the whole device.

    Returns:
        The descriptors of the locks; None if the slot is not free.
    """
    # Serialized, because the locks that are taken for counting look like holders to other processes.
    with _serialized(folder, device):
        # Every holder shares the lock of the whole device, so an exclusive one is alone.
        whole = _lock(folder / f"device-{_file_name(device)}.whole.lock", fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        if whole is None:
            return None
        descriptors, held = _lock_free_slots(folder, device)
        if held >= limit:
            close_locks([whole, *descriptors])
            return None
        close_locks(descriptors[1:])
    return [whole, descriptors[0]]


def _lock_free_slots(folder: Path, device: str) -> tuple[list[int], int]:
    """Locks every free slot file of a device, and creates one if none is free.

    Checks all files whatever the limit is, because holders with a higher limit count too.

    Returns:
        Descriptors of the locked files, and the number of held files.
    """
    descriptors: list[int] = []
    held = 0
    while True:
        path = folder / f"device-{_file_name(device)}.{len(descriptors) + held}.lock"
        if descriptors and not path.exists():
            return descriptors, held
        descriptor = _lock(path, fcntl.LOCK_EX)
        if descriptor is None:
            held += 1
        else:
            descriptors.append(descriptor)


def _lock(path: Path, kind: int) -> int | None:
    """Returns the descriptor of a locked file, or None if another process holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _serialized(folder: Path, device: str) -> FileLock:
    return FileLock(folder / f"device-{_file_name(device)}.lock")


def close_locks(descriptors: Iterable[int]) -> None:
    """Releases locks that no other process inherited."""
    for descriptor in descriptors:
        os.close(descriptor)


def _file_name(device: str) -> str:
    return _NO_FILE_NAME.sub("-", device)

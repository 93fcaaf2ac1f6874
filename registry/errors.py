"""The registry's errors: one tree, worded like the engine's.

RegistryError
├── HomeError           LORALINE_HOME: read-only, full, damaged, or written by a newer release
├── StoreError          an artifact that cannot be put or read
│   ├── MissingBlob         its bytes are gone
│   └── DamagedBlob         its bytes are not those that were stored
├── LineageError        a run, an execution or a digest that is not as it must be
├── VersionError        a version that cannot be registered
│   ├── UnknownName         no adapter of that name
│   ├── UnknownVersion      no such number or alias under that name
│   ├── MlflowError         the truth is recorded, but MLflow could not be brought level with it
│   └── GoneVersion         withdrawn or deleted: known, but not handed out any more
├── SignatureError      a key that cannot be used, or a signature that cannot be made or does not hold
├── PolicyError         `policy.yaml` or `licenses.yaml` of the home cannot be used
├── RightsError         a revocation that cannot be made or lifted
└── PromotionError      an alias that cannot be moved
    ├── Refused             the decision says no; carries all reasons
    └── Conflict            somebody else moved it first
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_engine.errors import WordedError


class RegistryError(WordedError):
    """Anything that the registry refuses or cannot do."""


class HomeError(RegistryError):
    """The folder that holds all state cannot be used."""


class StoreError(RegistryError):
    """An artifact that cannot be put into the store or read from it."""


class MissingBlob(StoreError):
    """Bytes that the store should have and has not."""


class DamagedBlob(StoreError):
    """Bytes that are not those that were stored; the message names both digests."""


class LineageError(RegistryError):
    """A run, an execution or a digest that is unknown, ambiguous or not as it must be."""


class VersionError(RegistryError):
    """A version that cannot be registered or read."""


class UnknownName(VersionError):
    """No adapter of that name."""


class UnknownVersion(VersionError):
    """No such number or alias under that name."""


class MlflowError(VersionError):
    """The registry's own record stands, but MLflow could not be brought level with it."""


class SignatureError(RegistryError):
    """A key that cannot be used, or a signature that cannot be made or does not hold."""


class GoneVersion(VersionError):
    """The version was withdrawn or deleted; the message says by whom, when and why."""


class PolicyError(RegistryError):
    """A policy or a table of licences that cannot be used."""


class RightsError(RegistryError):
    """A revocation that cannot be made or lifted."""


class PromotionError(RegistryError):
    """An alias that cannot be moved."""


class Refused(PromotionError):
    """The decision says no.

    Args:
        problem: What was refused.
        reasons: All reasons at once.
        where: The version.
        remedy: One thing to do.
    """

    def __init__(self, problem: str, *, reasons: tuple[str, ...], where: str = "", remedy: str = "") -> None:
        self.reasons = reasons
        listed = "; ".join(f"({number}) {reason}" for number, reason in enumerate(reasons, 1))
        super().__init__(f"{problem}: {listed}", where=where, remedy=remedy)


class Conflict(PromotionError):
    """The alias no longer points at what the caller expected; the message says what changed."""


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Words the disk's refusals (full, read-only, forbidden) as `HomeError`; lets every other `OSError` pass.

    Args:
        path: What was being written.
    """
    try:
        yield
    except OSError as error:
        raise _worded(error, path) from error


def database_error(message: str, where: str) -> HomeError | None:
    """What a driver's message means and what to do about it; None where it says nothing of the kind."""
    with_context = {
        "disk is full": ("the disk is full", "free some space and run the same command again"),
        "No space left": ("the disk is full", "free some space and run the same command again"),
        "readonly": ("the database cannot be written", "make the file and its folder writable"),
        "read-only": ("the database cannot be written", "make the file and its folder writable"),
        "unable to open": ("the database cannot be opened", "see that the folder exists and is writable"),
        "malformed": ("the database is damaged", "restore it from a backup"),
        "not a database": ("this is not a database", "restore it from a backup, or move it away"),
        "disk I/O error": ("the disk does not read or write", "check the disk; then run `loraline fsck`"),
        "database is locked": ("the database was busy for 20 seconds", "see what else uses it, and try again"),
        "lock timeout": ("the database was busy for 20 seconds", "see what else uses it, and try again"),
        "connection failed": ("the database cannot be reached", "start the server, or mend LORALINE_DATABASE_URL"),
        "connection is lost": ("the database went away", "see to the server, and run the same command again"),
        "terminating connection": ("the database went away", "see to the server, and run the same command again"),
        "server closed the connection": ("the database went away", "see to the server, and run the same command again"),
        "permission denied": ("the database refuses", "grant the user what it needs (see docs/operations.md)"),
    }
    for sign, (problem, remedy) in with_context.items():
        if sign in message:
            return HomeError(f"{problem} ({message.strip()})", where=where, remedy=remedy)
    return None


def _worded(error: OSError, path: Path) -> Exception:
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return HomeError("the disk is full", where=str(path), remedy="free some space and run the same command again")
    if error.errno in {errno.EROFS, errno.EACCES, errno.EPERM}:
        return HomeError(
            f"cannot write here ({error.strerror})",
            where=str(path),
            remedy="make the folder writable, or name another one in LORALINE_HOME",
        )
    if error.errno in {errno.ENOTDIR, errno.EEXIST}:
        return HomeError(
            f"not a folder ({error.strerror})", where=str(path), remedy="name another folder in LORALINE_HOME"
        )
    return error

"""The registry's errors: one tree, worded like the engine's.

RegistryError
├── HomeError           LORALINE_HOME is read-only, full, damaged, or written by a newer release
│   └── DiskFull            its disk has no room
├── DamagedRow          a cell of the registry's database has a value that no release writes
├── StoreError          an artifact cannot be stored or read
│   ├── MissingBlob         its bytes are gone
│   └── DamagedBlob         its bytes differ from those that were stored
├── LineageError        a run, an execution or a digest is unknown, ambiguous or invalid
├── VersionError        a version cannot be registered or read
│   ├── UnknownName         no adapter has that name
│   ├── UnknownVersion      that name has no such number or alias
│   ├── MlflowError         the change is recorded, but MLflow is not in sync
│   └── GoneVersion         the version was withdrawn or deleted
├── SignatureError      a key cannot be used, or a signature cannot be made or is not valid
├── PolicyError         `policy.yaml` or `licenses.yaml` of the home cannot be used
├── IdentityError       the current user cannot be established
├── RightsError         a revocation cannot be made or lifted
├── VoteError           a comparison cannot be used, or a vote is not taken
└── PromotionError      an alias cannot be moved
    ├── Refused             the policy does not allow it; carries all reasons
    └── Conflict            another process moved the alias first
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_engine.errors import WordedError

_FREE_SPACE = "`loraline gc`, or free some space; then run the same command again"


class RegistryError(WordedError):
    """Base of all errors that the registry raises."""


class HomeError(RegistryError):
    """The folder or the database that holds all state cannot be used."""


class DiskFull(HomeError):
    """The disk has no room for what must be written."""


class DamagedRow(RegistryError):
    """A cell of the registry's database has a value that no release writes; names table, row and column."""


class StoreError(RegistryError):
    """An artifact cannot be put into the store or read from it."""


class MissingBlob(StoreError):
    """The bytes of a digest are gone from the store."""


class DamagedBlob(StoreError):
    """The bytes differ from those that were stored; the message names both digests."""


class LineageError(RegistryError):
    """A run, an execution or a digest is unknown, ambiguous or invalid."""


class VersionError(RegistryError):
    """A version cannot be registered or read."""


class UnknownName(VersionError):
    """No adapter has that name."""


class UnknownVersion(VersionError):
    """The adapter has no such number or alias."""


class MlflowError(VersionError):
    """The change is recorded in the registry's database, but MLflow is not in sync."""


class SignatureError(RegistryError):
    """A key cannot be used, or a signature cannot be made or is not valid."""


class GoneVersion(VersionError):
    """The version was withdrawn or deleted; the message names actor, date and reason."""


class PolicyError(RegistryError):
    """A policy or a table of licenses cannot be used."""


class IdentityError(RegistryError):
    """The current user cannot be established: a token, a signed value or a name is not valid."""


class RightsError(RegistryError):
    """A revocation cannot be made or lifted."""


class VoteError(RegistryError):
    """A comparison cannot be used, or a vote is not taken."""


class PromotionError(RegistryError):
    """An alias cannot be moved."""


class Refused(PromotionError):
    """The policy does not allow the operation.

    Args:
        problem: The refused operation.
        reasons: All reasons at once.
        where: The version.
        remedy: One fix, as an imperative.
    """

    def __init__(self, problem: str, *, reasons: tuple[str, ...], where: str = "", remedy: str = "") -> None:
        self.reasons = reasons
        listed = "; ".join(f"({number}) {reason}" for number, reason in enumerate(reasons, 1))
        super().__init__(f"{problem}: {listed}", where=where, remedy=remedy)


class Conflict(PromotionError):
    """The alias no longer points at the version that the caller expected; the message names the change."""


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Converts disk errors (full, read-only, forbidden) to `HomeError`; lets every other `OSError` pass.

    Args:
        path: The file or folder that is written.
    """
    try:
        yield
    except OSError as error:
        raise _disk_error(error, path) from error


def database_error(message: str, where: str) -> HomeError | None:
    """Returns a `HomeError` with cause and fix for a database driver's message; None if it is not a known one."""
    causes = {
        "disk is full": ("the disk is full", _FREE_SPACE),
        "No space left": ("the disk is full", _FREE_SPACE),
        "readonly": ("the database cannot be written", "make the file and its folder writable"),
        "read-only": ("the database cannot be written", "make the file and its folder writable"),
        "unable to open": ("the database cannot be opened", "make the folder exist and writable"),
        "malformed": ("the database is damaged", "restore it from a backup"),
        "not a database": ("this is not a database", "restore it from a backup, or move it away"),
        "disk I/O error": ("the disk does not read or write", "check the disk; then run `loraline fsck`"),
        "database is locked": ("the database was busy for 20 seconds", "check what else uses it, and try again"),
        "lock timeout": ("the database was busy for 20 seconds", "check what else uses it, and try again"),
        "connection failed": ("the database cannot be reached", "start the server, or correct LORALINE_DATABASE_URL"),
        "connection is lost": ("the database connection was lost", "check the server, and run the same command again"),
        "terminating connection": (
            "the database connection was lost",
            "check the server, and run the same command again",
        ),
        "server closed the connection": (
            "the database connection was lost",
            "check the server, and run the same command again",
        ),
        "permission denied": (
            "the database denies permission",
            "grant the database user the rights in docs/operations.md",
        ),
    }
    for fragment, (problem, remedy) in causes.items():
        if fragment in message:
            kind = DiskFull if remedy == _FREE_SPACE else HomeError
            return kind(f"{problem} ({message.strip()})", where=where, remedy=remedy)
    return None


def _disk_error(error: OSError, path: Path) -> Exception:
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return DiskFull("the disk is full", where=str(path), remedy=_FREE_SPACE)
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

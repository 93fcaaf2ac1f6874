"""Injects faults at fault points: the operations of a process on files and databases.

The n-th point of a piece of work is the same in every repetition, so a campaign can fail at each of them in turn.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import event
from sqlalchemy.engine import Engine

Mode = Literal["count", "kill", "full-once", "full"]

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_RENAMING = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link"}


class Points:
    """Counts the fault points of this process below a folder, and injects a fault at one of them.

    Args:
        folder: Only files below it count.
        at: Number of the point to fail at, from 1; 0 fails nowhere.
        mode: `count` for 0; `kill` sends SIGKILL; `full-once` and `full` report a full disk at that point, or from that
            point on.
        kind: Kind of points to count; None counts all. A kind is an operation without random names: `open partial`,
            `fsync after os.rename`, `INSERT versions`, `SELECT`, `commit`.
    """

    def __init__(self, folder: str, at: int = 0, mode: Mode = "count", kind: str | None = None) -> None:
        self.folder, self.at, self.mode, self.kind = folder, at, mode, kind
        self.count = 0
        self.kinds: list[str] = []
        self._is_reached = False

    def install(self) -> None:
        """Hooks into file operations, `fsync` and SQL of this process; cannot be undone."""
        sys.addaudithook(self._audit)
        fsync = os.fsync

        def counted(descriptor: int) -> None:
            self.pass_point("fsync")
            fsync(descriptor)

        os.fsync = counted
        event.listen(Engine, "before_cursor_execute", self._on_statement)
        event.listen(Engine, "commit", lambda connection: self.pass_sql("commit"))

    def pass_point(self, name: str) -> None:
        """Counts a point of a file; fails at the chosen one, and in mode `full` at all later ones.

        Raises:
            OSError: ENOSPC, at the chosen point.
        """
        if self._is_due(name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def pass_sql(self, name: str) -> None:
        """Counts a point of the database; see `pass_point`.

        Raises:
            sqlite3.OperationalError: `database or disk is full`.
        """
        if self._is_due(name):
            raise sqlite3.OperationalError("database or disk is full")

    def _is_due(self, name: str) -> bool:
        self.kinds.append(self._kind_of(name))
        is_counted = self.kind in {None, self.kinds[-1]}
        self.count += is_counted
        is_first = is_counted and self.count == self.at
        self._is_reached |= is_first
        if not is_first and not (self.mode == "full" and self._is_reached):
            return False
        if self.mode == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return True

    def _kind_of(self, name: str) -> str:
        if name == "fsync" and self.kinds:
            return f"fsync after {self.kinds[-1]}"
        return re.sub(r"^open .*\.(\w+)$", r"open \1", name)

    def _audit(self, name: str, arguments: tuple[Any, ...]) -> None:
        if name == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & _WRITING and self._is_ours(path):
                self.pass_point(f"open {Path(path).name}")
        elif name in _RENAMING and arguments and self._is_ours(arguments[0]):
            self.pass_point(name)

    def _is_ours(self, path: object) -> bool:
        return isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(self.folder)

    def _on_statement(self, _connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        verb, *rest = statement.split(None, 3)
        # `INSERT INTO versions`, `UPDATE aliases`, `DELETE FROM aliases`; reads have one kind.
        table = {"INSERT": rest[1:2], "DELETE": rest[1:2], "UPDATE": rest[:1]}.get(verb.upper(), [])
        self.pass_sql(" ".join([verb.upper(), *table]))


def forked(work: Callable[[Callable[[str], None]], None], *, before: Callable[[], None] = lambda: None) -> Trial:
    """Starts a piece of work in a forked process.

    Args:
        work: Takes a function that reports a line to the parent; a reported result counts as promised.
        before: Runs first in the child.
    """
    receiving, sending = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(receiving)
            os.setpgid(0, 0)
            before()
            work(lambda line: _tell(sending, line))
            status = 0
        except BaseException as error:
            _tell(sending, f"error {type(error).__name__}: {error}")
        finally:
            os._exit(status)
    os.close(sending)
    return Trial(pid, receiving)


class Trial:
    """A forked process and its reports.

    Args:
        pid: Id of the process.
        receiving: File descriptor to read its lines from.
    """

    def __init__(self, pid: int, receiving: int) -> None:
        self.pid, self._receiving = pid, receiving

    def kill(self) -> None:
        """Sends SIGKILL."""
        os.kill(self.pid, signal.SIGKILL)

    def finish(self) -> tuple[int, list[str]]:
        """Waits for the process; returns its exit status (negative: the signal) and its lines."""
        with os.fdopen(self._receiving, "rb") as stream:
            output = stream.read().decode(errors="replace")
        _, status = os.waitpid(self.pid, 0)
        complete = output[: output.rfind("\n") + 1]
        return os.waitstatus_to_exitcode(status), complete.splitlines()


def _tell(descriptor: int, line: str) -> None:
    os.write(descriptor, line.replace("\n", " ").encode() + b"\n")

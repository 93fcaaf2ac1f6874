"""Fault points: every place at which a process touches the disk or the database, counted, and failed on request.

The n-th point of a piece of work is the same at every repetition, so that all of them can be gone through in turn.
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
    """Counts the fault points of this process below a folder, and fails at one of them.

    Args:
        folder: Only files below it count.
        at: The point to fail at, from 1 on; 0 fails nowhere.
        mode: `count` belongs to 0; `kill` ends the process as SIGKILL does; `full-once` and `full` let the disk be full
            at that point, or from that point on.
        kind: Only points of this kind are counted; None counts all. A kind is an operation without what is drawn at
            random: `open partial`, `fsync after os.rename`, `INSERT versions`, `SELECT`, `commit`.
    """

    def __init__(self, folder: str, at: int = 0, mode: Mode = "count", kind: str | None = None) -> None:
        self.folder, self.at, self.mode, self.kind = folder, at, mode, kind
        self.count = 0
        self.kinds: list[str] = []
        self._is_reached = False

    def install(self) -> None:
        """Hooks into file operations, `fsync` and SQL of this process; there is no way back."""
        sys.addaudithook(self._audit)
        fsync = os.fsync

        def counted(descriptor: int) -> None:
            self.pass_point("fsync")
            fsync(descriptor)

        os.fsync = counted
        event.listen(Engine, "before_cursor_execute", self._on_statement)
        event.listen(Engine, "commit", lambda connection: self.pass_sql("commit"))

    def pass_point(self, name: str) -> None:
        """Counts a point of a file; at the chosen one, and in mode `full` behind it, fails.

        Raises:
            OSError: ENOSPC.
        """
        if self._is_due(name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def pass_sql(self, name: str) -> None:
        """As `pass_point`, with the error that SQLite gives.

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
        # `INSERT INTO versions`, `UPDATE aliases`, `DELETE FROM aliases`; reads are all alike.
        table = {"INSERT": rest[1:2], "DELETE": rest[1:2], "UPDATE": rest[:1]}.get(verb.upper(), [])
        self.pass_sql(" ".join([verb.upper(), *table]))


def forked(work: Callable[[Callable[[str], None]], None], *, before: Callable[[], None] = lambda: None) -> Trial:
    """Runs a piece of work in a forked process, without waiting for it.

    Args:
        work: Takes a function that tells the parent a line: what is told counts as promised.
        before: What the child does first.
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
    """A forked process and what it told.

    Args:
        pid: Of the process.
        receiving: Descriptor that its lines come from.
    """

    def __init__(self, pid: int, receiving: int) -> None:
        self.pid, self._receiving = pid, receiving

    def kill(self) -> None:
        """Ends it, as SIGKILL does, wherever it is."""
        os.kill(self.pid, signal.SIGKILL)

    def finish(self) -> tuple[int, list[str]]:
        """Waits for its end; gives its exit status (negative: the signal) and its lines."""
        with os.fdopen(self._receiving, "rb") as stream:
            told = stream.read().decode(errors="replace")
        _, status = os.waitpid(self.pid, 0)
        whole = told[: told.rfind("\n") + 1]
        return os.waitstatus_to_exitcode(status), whole.splitlines()


def _tell(descriptor: int, line: str) -> None:
    os.write(descriptor, line.replace("\n", " ").encode() + b"\n")

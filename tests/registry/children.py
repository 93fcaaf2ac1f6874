"""Starts processes for tests: forks a server process that has the registry imported, because its imports take seconds.

A separate module: a child imports it by name, and several modules are named `conftest`.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection

PRELOADED = [
    "registry.maintenance.backup",
    "registry.maintenance.fsck",
    "registry.maintenance.gc",
    "registry.versions.promotion",
    "registry.documents.signing",
    "registry.store.remote",
    "s3fs",
]
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(PRELOADED)


def _run_script(
    script: str, arguments: list[str], environment: Mapping[str, str], out: Connection, errors: Connection
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, pipe in ((1, out), (2, errors)):
        os.dup2(pipe.fileno(), descriptor)
        pipe.close()
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    sys.argv = ["-c", *arguments]
    exec(compile(script, "<script>", "exec"), {"__name__": "__main__"})


class Child:
    """A child process with the part of `subprocess.Popen`'s interface that the tests use.

    It is forked from a server process that has the registry imported, and shares nothing with the test's process.
    """

    def __init__(self, script: str, arguments: list[str]) -> None:
        (read_out, out), (read_errors, errors) = (multiprocessing.Pipe(duplex=False) for _ in range(2))
        self._process = FORKSERVER.Process(
            target=_run_script, args=(script, arguments, dict(os.environ), out, errors), daemon=True
        )
        self._process.start()
        self.stdout, self.stderr = (os.fdopen(os.dup(pipe.fileno())) for pipe in (read_out, read_errors))
        for pipe in (read_out, read_errors, out, errors):
            pipe.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        """Kills the process if it is still running, and closes the pipes."""
        self._process.kill()
        self._process.join()
        self.stdout.close()
        self.stderr.close()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Waits for the end, and returns stdout and stderr; each must fit into a pipe."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            raise subprocess.TimeoutExpired("the child", timeout)
        with self.stdout, self.stderr:
            return self.stdout.read(), self.stderr.read()

"""Reads pickled files in processes forked from one that has imported torch already.

`pickles` starts an interpreter for every file, and torch's import costs it seconds. Here one interpreter is started per
worker, in the environment of the real one, and forks for each file: `pickle_child.main` runs in a process of its own,
under its own limits. What depends on the start itself (arguments, environment, limits that end it) is tested with the
real one in `checkpoints/test_pickles.py`.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import select
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from lora_engine.formats import pickles

_SERVER = """
import json, os, sys
from pathlib import Path
from lora_engine.formats.pickle_child import main

for line in sys.stdin:
    stderr, file, folder, limits = json.loads(line)
    child = os.fork()
    if not child:
        os.setsid()
        os.chdir(folder)
        os.dup2(os.open(stderr, os.O_WRONLY), 2)
        main(Path(file), Path(folder), json.loads(limits))
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
_COMMAND = [sys.executable, "-P", "-m", "lora_engine.formats.pickle_child"]


class Server:
    """The interpreter that forks readers."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=pickles._environment(),
            bufsize=0,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout

    def ask(self, request: list[str]) -> None:
        self._requests.write(json.dumps(request).encode() + b"\n")

    def answer(self, timeout: float | None = None) -> int | None:
        """Returns the next number that it prints, or None on timeout."""
        if not select.select([self._answers], [], [], timeout)[0]:
            return None
        line = self._answers.readline()
        assert line, "the server of readers ended"
        return int(line)

    def close(self) -> None:
        self._requests.close()
        self._process.wait()
        self._answers.close()


class ForkedReader:
    """The part of `subprocess.Popen` that `pickles` uses."""

    def __init__(self, server: Server, command: list[str], *, stderr: Any, cwd: Path, **_: Any) -> None:
        assert command[:4] == _COMMAND
        assert str(cwd) == command[5]
        self._server = server
        self._code: int | None = None
        server.ask([stderr.name, *command[4:]])
        pid = server.answer()
        assert pid is not None
        self.pid = pid

    def wait(self, timeout: float | None = None) -> int:
        if self._code is None:
            self._code = self._server.answer(timeout)
        if self._code is None:
            raise subprocess.TimeoutExpired(_COMMAND, timeout or 0.0)
        return self._code

    def kill(self) -> None:
        if self._code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


@functools.cache
def shared_server() -> Server:
    server = Server()
    atexit.register(server.close)
    return server


@pytest.fixture
def forked_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes forked processes read pickled files during a test."""
    monkeypatch.setattr(pickles, "subprocess", forking())


def forking() -> types.SimpleNamespace:
    """Returns the part of `subprocess` that `pickles` uses, with forks of the shared interpreter."""

    def start(command: list[str], **options: Any) -> ForkedReader:
        return ForkedReader(shared_server(), command, **options)

    names = {"Popen": start, "DEVNULL": subprocess.DEVNULL, "TimeoutExpired": subprocess.TimeoutExpired}
    return types.SimpleNamespace(**names)

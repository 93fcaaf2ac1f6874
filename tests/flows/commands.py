"""Runs the command line as a process or, without repeating imports, in this process."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from unittest.mock import patch

from flows.cli import main

PLAIN = {"COLUMNS": "200", "NO_COLOR": "1"}


@contextlib.contextmanager
def loraline_process(environment: Mapping[str, str], *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Starts the command in a new process group, and kills the group at the end of the `with` block."""
    process = subprocess.Popen(
        [sys.executable, "-c", "from flows.cli import start; start()", *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def loraline_here(*arguments: object, home: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs the command in this process, with additional environment variables."""
    out, err, code = io.StringIO(), io.StringIO(), None
    with (
        patch.dict(os.environ, PLAIN | {"LORALINE_HOME": str(home)} | variables),
        patch.object(sys, "argv", ["loraline", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as exit_request:
            code = exit_request.code
    return subprocess.CompletedProcess(sys.argv, int(code or 0), out.getvalue(), err.getvalue())


def say(*arguments: object, home: Path, code: int = 0) -> str:
    """Runs the command in this process and returns its standard output; asserts the exit code."""
    completed = loraline_here(*arguments, home=home)
    assert completed.returncode == code, completed.stdout + completed.stderr
    assert "Traceback" not in completed.stderr
    return completed.stdout

"""The command line as a process, as users meet it, and in this process, which has its imports already."""

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
    """Starts the command in a process group of its own, and kills the group at the end of the block."""
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


def loraline_here(*arguments: object, home: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Runs the command in this process, with more variables in its environment."""
    out, err, code = io.StringIO(), io.StringIO(), None
    with (
        patch.dict(os.environ, PLAIN | {"LORALINE_HOME": str(home)} | more),
        patch.object(sys, "argv", ["loraline", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as ended:
            code = ended.code
    return subprocess.CompletedProcess(sys.argv, int(code or 0), out.getvalue(), err.getvalue())


def say(*arguments: object, home: Path, code: int = 0) -> str:
    """Runs the command in this process and returns its standard output; it must end with that exit code."""
    done = loraline_here(*arguments, home=home)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout

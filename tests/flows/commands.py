"""The command line in a process of its own, as its users meet it, and in this one, which has imported everything."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

from flows.cli import main

PLAIN = {"COLUMNS": "200", "NO_COLOR": "1"}


def loraline(*arguments: object, home: Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the command; its imports take seconds."""
    environment = os.environ | PLAIN | {"LORALINE_HOME": str(home)}
    command = [sys.executable, "-c", "from flows.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=300)


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

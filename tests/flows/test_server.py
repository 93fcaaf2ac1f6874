"""Tests the Prefect server of a run: it serves, ends with its parent, and its failure is reported."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from tests.flows.shared import DATABASE

BEGIN = """
import sys, time
from pathlib import Path
from flows.prefect import configure_prefect, run_as_flow
from flows.server import _start, prefect_server
from registry.home import Home
configure_prefect(Home.open(Path(sys.argv[1])))
"""
RUN_AND_WAIT = """
with prefect_server() as address:
    print(run_as_flow("seven", lambda: 7)(), flush=True)
    print(address, "prefect.server.api.server" in sys.modules, flush=True)
    time.sleep(600)
"""
LOSE_THE_SERVER = """
from tasks.errors import PipelineFailed
try:
    with prefect_server():
        _start()[1].kill()
        _start()[1].wait()
        run_as_flow("seven", lambda: 7)()
except PipelineFailed as error:
    print(error)
"""


@pytest.fixture(autouse=True)
def migrated(home: Path, prefect_database: Path) -> None:
    """Copies a migrated database, so that the servers skip their migrations."""
    (home / "prefect").mkdir(parents=True)
    shutil.copy(prefect_database, home / "prefect" / DATABASE)


def start(home: Path, script: str, **variables: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")} | variables
    command = [sys.executable, "-P", "-c", BEGIN + script, str(home)]
    project = home.parent / "project"
    (project / "flows").mkdir(parents=True, exist_ok=True)  # common in projects with Prefect
    (project / "flows" / "__init__.py").touch()
    return subprocess.Popen(
        command, cwd=project, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def is_up(address: str) -> bool:
    try:
        with urlopen(f"{address}/health", timeout=60) as answer:
            return bool(answer.read() == b"true")
    except (URLError, ConnectionError):
        return False


def test_a_server_serves_flows_and_ends_when_its_parent_is_killed(home: Path) -> None:
    with start(home, RUN_AND_WAIT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "7\n", process.communicate()[1]
        address, imports_the_server = process.stdout.readline().split()
        assert imports_the_server == "False"
        assert is_up(address)
        os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while is_up(address):
        assert time.monotonic() < deadline, "the server outlived its parent"
        time.sleep(0.1)


def test_a_lost_server_is_reported_with_its_log(home: Path) -> None:
    # No retries, because the requests cannot succeed.
    with start(home, LOSE_THE_SERVER, PREFECT_CLIENT_MAX_RETRIES="0") as process:
        out, err = process.communicate(timeout=300)
    assert "Prefect's server ended with code -9" in out, err
    assert str(home / "prefect" / "server.log") in out

"""The Prefect server of a run: it serves, it does not outlive its maker, and its end is told of."""

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
    """Saves the servers their migrations. The server of `prefect_server` starts without a database."""
    (home / "prefect").mkdir(parents=True)
    shutil.copy(prefect_database, home / "prefect" / DATABASE)


def start(home: Path, script: str, **more: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")} | more
    command = [sys.executable, "-P", "-c", BEGIN + script, str(home)]
    elsewhere = home.parent / "project"
    (elsewhere / "flows").mkdir(parents=True, exist_ok=True)  # as projects that use Prefect often have
    (elsewhere / "flows" / "__init__.py").touch()
    return subprocess.Popen(
        command, cwd=elsewhere, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def is_up(address: str) -> bool:
    try:
        with urlopen(f"{address}/health", timeout=60) as answer:
            return bool(answer.read() == b"true")
    except (URLError, ConnectionError):
        return False


def test_a_server_serves_flows_and_ends_with_a_maker_that_is_killed(home: Path) -> None:
    with start(home, RUN_AND_WAIT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "7\n", process.communicate()[1]
        address, imports_the_server = process.stdout.readline().split()
        assert imports_the_server == "False"
        assert is_up(address)
        os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while is_up(address):
        assert time.monotonic() < deadline, "the server outlived its maker"
        time.sleep(0.1)


def test_a_server_that_is_lost_is_named_with_its_words(home: Path) -> None:
    # A request that cannot succeed need not be tried again and again.
    with start(home, LOSE_THE_SERVER, PREFECT_CLIENT_MAX_RETRIES="0") as process:
        out, err = process.communicate(timeout=300)
    assert "Prefect's server ended with code -9" in out, err
    assert str(home / "prefect" / "server.log") in out

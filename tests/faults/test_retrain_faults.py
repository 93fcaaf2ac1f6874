"""A full disk, a lost database and a clock that goes back in the middle of a retraining; the next one repairs all.

Each retraining is a process of its own with a real Prefect server. It merges two adapters and registers the result.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from registry.home import Home
from registry.maintenance.fsck import fsck
from tests.conftest import find_program
from tests.faults.queued import PROJECT, check_queue, prepare_queue

RETRAIN = """
import os, signal, sys
from datetime import timedelta
from pathlib import Path
from registry.home import Home
from flows.prefect import configure_prefect
home, spec, fault = Home.open(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
configure_prefect(home)
import registry.entities, registry.versions.versions, tasks.steps.register, flows.pipeline, flows.spec
from tests.faults.points import Points
points = Points(str(home.path))
if fault.startswith("full "):
    points = Points(str(home.path), int(fault.split()[1]), "full")
if fault == "clock":
    right, calls = registry.entities.now, []
    def back():
        calls.append(1)
        return right() - timedelta(hours=3) * (len(calls) > 4)
    for module in [*sys.modules.values()]:
        if getattr(module, "now", None) is right:
            module.now = back
if fault == "stop":
    register = registry.versions.versions.Versions.register
    def wait(*arguments, **settings):
        print("registering", flush=True)
        sys.stdin.readline()
        return register(*arguments, **settings)
    registry.versions.versions.Versions.register = wait
points.install()
from flows.cli import main
sys.argv = ["loraline", "run", str(spec)]
try:
    main()
finally:
    print("points", points.count, flush=True)
"""


def start(home: Home, spec: Path, fault: str, server: str, **variables: str) -> subprocess.Popen[str]:
    own = {"PREFECT_API_URL": server, "LORALINE_HOME": str(home.path), "PYTHONPATH": str(PROJECT)}
    return subprocess.Popen(
        [sys.executable, "-c", RETRAIN, str(home.path), str(spec), fault],
        env=os.environ | own | variables,
        cwd=PROJECT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def retrain(home: Home, spec: Path, fault: str, server: str, **variables: str) -> tuple[int, str, str]:
    with start(home, spec, fault, server, **variables) as process:
        out, errors = process.communicate(timeout=600)
    return process.returncode, out, errors


@pytest.mark.nightly
def test_a_disk_that_fills_during_a_retraining_is_named_and_the_next_one_registers_once(
    tmp_path: Path, prefect_server: str
) -> None:
    (tmp_path / "whole").mkdir()
    whole, specs = prepare_queue(tmp_path / "whole", 1)
    code, out, errors = retrain(whole, specs[0], "none", prefect_server)
    assert code == 0, errors
    count, failures = int(out.split("points ")[1]), 0
    for part in range(1, 6):
        folder = tmp_path / str(part)
        folder.mkdir()
        home, specs = prepare_queue(folder, 1)
        code, out, errors = retrain(home, specs[0], f"full {part * count // 6}", prefect_server)
        if code:
            failures += 1
            assert "disk is full" in errors or "No space left" in errors, errors
        code, out, errors = retrain(home, specs[0], "none", prefect_server)
        assert code == 0, errors
        assert check_queue(home, 1) == []
    assert failures >= 3, "negative control: most points fail the run"


@pytest.mark.nightly
def test_a_clock_that_goes_back_during_a_retraining_changes_no_alias_and_is_reported(
    tmp_path: Path, prefect_server: str
) -> None:
    home, specs = prepare_queue(tmp_path, 2)
    for spec, fault in zip(specs, ("none", "clock"), strict=True):
        code, _, errors = retrain(home, spec, fault, prefect_server)
        assert code == 0, errors
    assert check_queue(home, 2) == []
    warnings = [problem.what for problem in fsck(home) if problem.severity == "warning"]
    assert any("the clock went back" in what for what in warnings), warnings


class Postgres:
    """A PostgreSQL server with a socket in a new folder, which can be stopped and started again."""

    def __init__(self) -> None:
        # Not in pytest's folder, which only its owner may enter. Sockets require a short path.
        self.folder = Path(tempfile.mkdtemp(prefix="pg"))
        self.common: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": self.folder}
        if os.geteuid() == 0:  # the server refuses to run as root
            nobody = pwd.getpwnam("nobody")
            os.chown(self.folder, nobody.pw_uid, nobody.pw_gid)
            self.common |= {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": ()}
        self.programs = Path(os.path.realpath(find_program("postgres"))).parent
        subprocess.run(
            [self.programs / "initdb", "-D", self.folder / "data", "-U", "loraline", "-A", "trust", "-E", "UTF8"],
            check=True,
            **self.common,
        )
        self.start()

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://loraline@/postgres?host={self.folder}"

    def start(self) -> None:
        settings = ("-c", "listen_addresses=", "-c", f"unix_socket_directories={self.folder}")
        command = [self.programs / "postgres", "-D", self.folder / "data", *settings]
        self.server = subprocess.Popen(command, **self.common)
        while subprocess.run([self.programs / "pg_isready", "-q", "-h", self.folder], check=False).returncode:
            assert self.server.poll() is None, "the server ended"
            time.sleep(0.05)

    def stop(self) -> None:
        self.server.send_signal(signal.SIGQUIT)  # at once, as in a crash
        self.server.wait(30)


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    server = Postgres()
    yield server
    server.stop()
    shutil.rmtree(server.folder, ignore_errors=True)


@pytest.mark.nightly
@pytest.mark.needs("postgres")
def test_a_database_that_is_lost_during_a_retraining_is_named_and_the_next_one_registers_once(
    tmp_path: Path, prefect_server: str, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORALINE_DATABASE_URL", postgres.url)
    home, specs = prepare_queue(tmp_path, 1)
    with start(home, specs[0], "stop", prefect_server) as process:
        assert process.stdout is not None
        while "registering" not in (line := process.stdout.readline()):
            assert line, process.communicate()[1]
        postgres.stop()
        _, errors = process.communicate("go\n", timeout=600)
    assert process.returncode != 0
    assert "Traceback" not in errors
    assert str(postgres.folder) in errors or "server" in errors, errors
    postgres.start()
    code, _, errors = retrain(home, specs[0], "none", prefect_server)
    assert code == 0, errors
    assert check_queue(home, 1) == []

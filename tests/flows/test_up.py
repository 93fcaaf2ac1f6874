"""Tests `loraline up` with its real services: a Prefect server, MLflow and workers."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from flows.guard import guarded_command
from registry.home import Home
from registry.lineage.record import Lineage
from tests.flows.commands import loraline_here
from tests.flows.running import Running, alive, descendants, find, wait_until


@pytest.fixture
def project(tmp_path: Path, prefect_database: Path) -> Running:
    """Returns a project whose server skips its migrations."""
    running = Running(tmp_path / "project")
    running.use_database(prefect_database)
    return running


def test_up_starts_everything_runs_a_deployment_and_stops_with_all_its_processes(project: Running) -> None:
    project.write_project(project.write("rings"))
    with project.up("--mlflow-port", "0", "--grace", "600") as process:
        addresses = project.addresses
        assert addresses["pid"] == process.pid
        page, mlflow = addresses["prefect"], addresses["mlflow"]
        assert page.startswith("http://127.0.0.1:")
        assert httpx.get(f"{page}/").headers["content-type"].startswith("text/html")

        # Only this machine's browser, and no page of another site, may call the API, which can start processes.
        assert httpx.get(f"{page}/api/health", headers={"Host": "evil.example"}).status_code == 400
        foreign = httpx.get(f"{page}/api/health", headers={"Origin": "http://evil.example"})
        assert "access-control-allow-origin" not in foreign.headers
        query = f"{mlflow}/api/2.0/mlflow/experiments/search?max_results=1"
        assert httpx.get(query, headers={"Host": "evil.example"}).status_code == 403
        (experiment,) = httpx.get(query).json()["experiments"]
        assert experiment["artifact_location"].startswith(f"file://{project.home}/mlflow")

        again = loraline_here("up", home=project.home)
        assert (again.returncode, again.stdout) == (1, "")
        assert f"run already: {page} (process {process.pid})" in again.stderr

        (server,) = find(process.pid, "flows.server")
        server.kill()
        # The socket still listens: this request waits for the new server.
        run = project.start_run("rings")
        wait_until(lambda: project.state(run)["type"] == "RUNNING")
        children = descendants(process.pid)
        process.send_signal(signal.SIGTERM)
        errors = process.communicate(timeout=900)[1].splitlines()
        assert any(line.startswith("warning: server ended with code 137; starting it again") for line in errors)
        assert errors[-1] == "Stopping: runs have 600 s to finish."
        assert process.returncode == 0
        assert alive(children) == []
    with closing(Lineage(Home(project.home).lineage_url)) as lineage:
        (finished,) = lineage.runs()
    assert finished.status == "COMPLETED", "a run finishes within the grace period"
    assert not (project.home / "prefect" / "up.json").exists()


def test_workers_for_a_server_elsewhere_share_a_home_and_do_not_outlive_a_killed_up(
    tmp_path: Path, prefect_server: str
) -> None:
    project = Running(tmp_path / "project")
    elsewhere = ("--server", prefect_server, "--pool", "up", "--no-mlflow")
    with project.up(*elsewhere) as process:
        assert project.addresses["api"] == prefect_server
        assert project.ask("work_pools/up")["type"] == "process"
        assert project.addresses["workers"] == [f"{socket.gethostname()}-1"]
        children = descendants(process.pid)
        assert len(find(process.pid, "flows.worker")) == 1
        process.kill()
        process.communicate()
        wait_until(lambda: alive(children) == [])


@pytest.mark.nightly
def test_a_service_that_cannot_start_is_reported_with_the_end_of_its_log(tmp_path: Path) -> None:
    project = Running(tmp_path / "project", PREFECT_SERVER_LOGGING_LEVEL="loud")
    with project.command("--port", "0", "--no-mlflow") as process:
        out, errors = process.communicate(timeout=600)
    assert (process.returncode, out) == (1, "")
    log = project.home / "prefect" / "logs" / "up" / "server.log"
    assert f"{log}: server ended with code 1; its last lines are:" in errors
    assert f"  {log.read_text().strip().splitlines()[-1].strip()}" in errors
    assert "Traceback" not in errors.partition("its last lines are")[0]


@pytest.mark.parametrize("option", ["--port", "--mlflow-port"])
def test_a_port_that_is_taken_is_named_before_anything_starts(option: str, home: Path) -> None:
    server = () if option == "--port" else ("--server", "http://127.0.0.1:1/api")
    refused = up_on_a_taken_port(option, *server, home=home)
    assert refused.returncode == 1
    assert "is taken by another program" in refused.stderr
    assert f"`{option} 0` takes a free one" in refused.stderr
    assert not (home / "prefect" / "logs").exists()


def up_on_a_taken_port(option: str, *more: str, home: Path) -> subprocess.CompletedProcess[str]:
    with socket.create_server(("127.0.0.1", 0)) as other:
        return loraline_here("up", option, other.getsockname()[1], *more, home=home)


FAMILY = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {child!r}], start_new_session=True)
print("ready", flush=True)
time.sleep({seconds})
"""
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"


def guard(script: str, grace: float = 0) -> subprocess.Popen[str]:
    command = guarded_command([sys.executable, "-c", script], grace)
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("child", ["import time; time.sleep(600)", pytest.param(STUBBORN, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("how", ["stdin", "SIGTERM"])
def test_a_guard_stops_descendants_in_sessions_of_their_own(child: str, how: str) -> None:
    with guard(FAMILY.format(child=child, seconds=600)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        children = descendants(process.pid)
        assert len(children) == 2
        if how == "SIGTERM":
            process.send_signal(signal.SIGTERM)
        else:
            assert process.stdin is not None
            process.stdin.close()
        assert process.wait(60) == 128 + signal.SIGTERM
        assert alive(children) == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process adopt orphans")
def test_a_guard_waits_for_what_its_command_left_running() -> None:
    with guard(FAMILY.format(child="input()", seconds=0)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        wait_until(lambda: len(descendants(process.pid)) == 1)
        (orphan,) = descendants(process.pid)
        assert process.poll() is None
        orphan.kill()
        assert process.wait(60) == 0


def test_a_guard_returns_the_exit_code_of_its_command() -> None:
    for script, code in (("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137)):
        with guard(script) as process:
            assert process.wait(60) == code


def test_a_guard_without_a_pipe_as_input_runs_until_its_command_ends() -> None:
    done = subprocess.run(
        guarded_command([sys.executable, "-c", "print(7)"], 0), stdin=subprocess.DEVNULL, capture_output=True
    )
    assert (done.returncode, done.stdout) == (0, b"7\n")


def test_the_addresses_of_a_killed_up_are_not_taken_for_running_ones(home: Path) -> None:
    record = Home.open(home).prefect / "up.json"
    record.write_text(json.dumps({"pid": os.getpid()}))
    refused = up_on_a_taken_port("--port", home=home)
    assert "taken by another program" in refused.stderr
    assert not record.exists()

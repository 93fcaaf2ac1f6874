"""`Supervisor`: starts the services of `flows.up`, waits until they are ready, and starts those again that end."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from base64 import b64encode
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from flows.prefect import configure_prefect
from flows.services import Service, last_lines, start_when_free
from lora_engine.errors import InterruptedRun
from registry.home import Home
from registry.store.database import sqlite_file
from tasks.errors import PipelineFailed

_HOST = "127.0.0.1"
_TIMEOUT = 300.0
"""Seconds until a service must answer. In a fresh home, the server creates its tables, which takes half a minute."""
_POLL = 0.5
_RESTARTS = 5
"""Times that a service which ended is started again."""


@dataclass(frozen=True)
class UpSettings:
    """Settings of `run_services`.

    Attributes:
        server: Address of the API of a server that runs elsewhere; None starts one.
        port: Port of Prefect's API and page; 0 chooses a free one.
        mlflow_port: Port of MLflow's page; 0 chooses a free one; None starts no MLflow.
        workers: Number of workers; each executes one run at a time.
        deploy: True deploys `prefect.yaml` of the working folder, if there is one.
        pool: Work pool, which is created with the type `process` if it is missing.
        grace: Seconds in which running flows may finish after a request to stop.
    """

    server: str | None = None
    port: int = 4200
    mlflow_port: int | None = 5000
    workers: int = 1
    deploy: bool = True
    pool: str = "local"
    grace: float = 30.0


@dataclass(frozen=True)
class Addresses:
    """Where the services of a home are.

    Attributes:
        pid: Process that runs them.
        prefect: Prefect's page.
        api: Prefect's API, for `PREFECT_API_URL`.
        mlflow: MLflow's page; None if it does not run.
        pool: Work pool of the workers.
        workers: Names of the workers.
        logs: Folder of the log files.
    """

    pid: int
    prefect: str
    api: str
    mlflow: str | None
    pool: str
    workers: tuple[str, ...]
    logs: str


class Supervisor:
    """The services of one home.

    Args:
        settings: Which services.
        home: The home.
        logs: Folder of the log files.
        stopping: Set when the services have to stop.
        stack: Stops the services when it closes.
        report: Called with each line of progress and each warning.
    """

    def __init__(
        self,
        settings: UpSettings,
        home: Home,
        logs: Path,
        stopping: threading.Event,
        stack: ExitStack,
        report: Callable[[str], None],
    ) -> None:
        self.settings, self.home, self.logs, self.stopping = settings, home, logs, stopping
        self.stack, self.report = stack, report
        self.services: list[Service] = []
        configure_prefect(home)

    def start(self) -> Addresses:
        """Starts all services and returns their addresses."""
        settings = self.settings
        server, api = None, settings.server
        if api is None:
            listening = self.stack.enter_context(start_when_free(_HOST, settings.port, "--port"))
            api = f"http://{_HOST}:{listening.getsockname()[1]}/api"
            self.report(f"Starting Prefect's server at {api.removesuffix('/api')}")
            descriptor = listening.fileno()
            command = ["flows.server", str(descriptor), "--lasting"]
            server = self._add("server", command, self._environment(api), descriptor)
        page, environment = api.removesuffix("/api"), self._environment(api)
        mlflow = None if settings.mlflow_port is None else self._start_mlflow(settings.mlflow_port, environment)
        self._wait(server, lambda: _get(f"{api}/health") == b"true", f"Prefect's server at {api}")
        workers = self._start_workers(api, environment)
        if settings.deploy and Path("prefect.yaml").is_file():
            self.report("Deploying prefect.yaml")
            self._run("deploy", ["prefect", "--no-prompt", "deploy", "--all"], environment)
        return Addresses(os.getpid(), page, api, mlflow, settings.pool, workers, str(self.logs))

    def watch(self) -> None:
        """Starts services again that end, until a request to stop."""
        while not self.stopping.wait(_POLL):
            for service in self.services:
                if not service.is_running():
                    self._restart(service)

    def _environment(self, api: str) -> dict[str, str]:
        """Returns the environment of all services; variables that are set already win."""
        page = api.removesuffix("/api")
        defaults = {
            # Prefect allows every web page to call the API, which can start processes, from a browser on this machine.
            "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"{page},{page.replace(_HOST, 'localhost')}",
            "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
            "PREFECT_UI_STATIC_DIRECTORY": str(self.home.prefect / "ui"),
            "LORALINE_PROJECT": str(Path.cwd()),
        }
        # What `configure_prefect` sets keeps runs of the command line silent; workers report to the server.
        quiet = ("PREFECT_LOGGING_LEVEL", "PREFECT_LOGGING_TO_API_ENABLED")
        inherited = {name: value for name, value in os.environ.items() if name not in quiet}
        # `python` in job variables is this one.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        return defaults | inherited | {"PREFECT_API_URL": api, "LORALINE_HOME": str(self.home.path), "PATH": path}

    def _add(self, name: str, module: list[str], environment: Mapping[str, str], *descriptors: int) -> Service:
        command = [sys.executable, "-P", "-m", *module]
        service = Service(name, command, dict(environment), self.logs / f"{name}.log", self.settings.grace, descriptors)
        self.stack.callback(service.stop)  # in reverse order: workers report their end to the server
        self.services.append(service)
        service.start()
        return service

    def _start_mlflow(self, port: int, environment: Mapping[str, str]) -> str:
        with start_when_free(_HOST, port, "--mlflow-port") as probe:
            port = probe.getsockname()[1]
        address = f"http://{_HOST}:{port}"
        self.report(f"Starting MLflow at {address}")
        # By a variable: other users of the machine may read command lines, and the URL may have a password.
        variables = {
            **environment,
            "MLFLOW_BACKEND_STORE_URI": self.home.mlflow_url,
            # Its jobs evaluate language models; they would be eight processes with 230 MB each.
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DEFAULT_ARTIFACT_ROOT": self.home.mlflow_artifacts.as_uri(),
        }
        command = ["mlflow", "server", "--host", _HOST, "--port", str(port), "--workers", "1"]
        database = sqlite_file(self.home.mlflow_url)
        # Two processes that create the tables at once fail.
        with ExitStack() as lock:
            if database is None or not database.exists():
                lock.enter_context(self.home.lock("mlflow", _TIMEOUT))
            self._wait(self._add("mlflow", command, variables), lambda: _get(f"{address}/health") == b"OK")
        return address

    def _start_workers(self, api: str, environment: Mapping[str, str]) -> tuple[str, ...]:
        """Starts the workers, of which the first creates the work pool if it is missing, and returns their names."""
        pool, names = self.settings.pool, [f"{socket.gethostname()}-{n + 1}" for n in range(self.settings.workers)]
        body = _get(f"{api}/work_pools/{pool}")
        if body is None:
            self.report(f"Creating the work pool {pool!r}")
        if body is None and not names:
            self._run("pool", ["prefect", "work-pool", "create", pool, "--type", "process"], environment)
        is_process = body is None or json.loads(body)["type"] == "process"
        workers = []
        for number, name in enumerate(names):
            other = ["prefect", "worker", "start", "--pool", pool, "--name", name, "--limit", "1"]
            command = ["flows.worker", pool, name] if is_process else other
            workers.append(self._add(f"worker-{number + 1}", command, environment))
            if body is None and number == 0:
                self._wait_for_worker(workers[0], name, api)  # it creates the work pool
        for name, worker in zip(names, workers, strict=True):
            self._wait_for_worker(worker, name, api)
        # At the end, all are asked to stop before the first is waited for.
        for worker in workers:
            self.stack.callback(worker.ask_to_stop)
        return tuple(names)

    def _wait_for_worker(self, worker: Service, name: str, api: str) -> None:
        self._wait(worker, lambda: name in self._online(api))

    def _run(self, name: str, module: list[str], environment: Mapping[str, str]) -> None:
        """Runs a command to its end."""
        service = self._add(name, module, environment)
        self.services.remove(service)
        self._wait(service, lambda: service.code == 0)

    def _wait(self, service: Service | None, is_ready: Callable[[], bool], what: str = "") -> None:
        for _ in range(int(_TIMEOUT / _POLL)):
            code = None if service is None else service.code
            if is_ready():
                return
            if service is not None and code is not None:
                raise self._failure(service, f"ended with code {code}")
            if self.stopping.wait(_POLL):
                raise InterruptedRun("stopped before every service was ready")
        if service is None:
            raise PipelineFailed(f"{what} does not answer", remedy="start it, or correct the address")
        raise self._failure(service, f"is not ready after {_TIMEOUT:.0f} s")

    def _restart(self, service: Service) -> None:
        if service.starts > _RESTARTS:
            raise self._failure(service, f"ended {service.starts} times, the last time with code {service.code}")
        self.report(f"warning: {service.name} ended with code {service.code}; starting it again (log: {service.log})")
        service.start()

    def _failure(self, service: Service, problem: str) -> PipelineFailed:
        lines = last_lines(service.log)
        quoted = f"; its last lines are:\n{lines}\n" if lines else ""
        return PipelineFailed(f"{service.name} {problem}{quoted}", where=str(service.log), remedy=service.remedy)

    def _online(self, api: str) -> set[str]:
        body = _get(f"{api}/work_pools/{self.settings.pool}/workers/filter", b"{}")
        workers = json.loads(body) if body else []
        return {worker["name"] for worker in workers if worker["status"] == "ONLINE"}


def _get(url: str, data: bytes | None = None) -> bytes | None:
    """Returns the answer of a service; None if there is none, or an error."""
    headers = {"Content-Type": "application/json"}
    if login := os.environ.get("PREFECT_API_AUTH_STRING"):
        headers["Authorization"] = f"Basic {b64encode(login.encode()).decode()}"
    elif key := os.environ.get("PREFECT_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    request = Request(url, data, headers)  # noqa: S310
    with suppress(OSError, HTTPError), urlopen(request, timeout=20) as answer:  # noqa: S310
        return bytes(answer.read())
    return None

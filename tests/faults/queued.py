"""Queues retrainings on a real Prefect server with two workers, and kills workers and runs at random moments.

Every retraining merges the same two adapters with other weights, and requests the alias `trial` for the version. Five
adapters share them, so their runs compete for numbers and aliases. The automations of `deploy/requeue.yaml`, with
shorter times, queue again what was killed.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
import yaml

from lora_engine.adapters import Adapter, LoraDelta
from lora_engine.formats import Card, write_adapter
from registry.home import Home
from registry.maintenance.fsck import fsck
from registry.versions.projections import replay
from registry.versions.promotion import read_log
from registry.versions.versions import Versions

PROJECT = Path(__file__).resolve().parents[2]
NAMES = 5
_BIN = Path(sys.executable).parent
_MODULE = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
_MOST_KILLS = 3
"""Kills per run; the automation gives up a run that crashed more often."""
_SILENCE, _START = 65, 60
"""Seconds until a run without a heartbeat, and one that did not start, count as crashed."""


@dataclass
class QueueResult:
    """What a campaign did, and what is wrong after it.

    Attributes:
        queued: Number of retrainings.
        run_kills: Number of killed processes of runs.
        worker_kills: Number of killed workers.
        repeated: Number of retrainings that started more than once.
        seconds: Duration.
        violations: Violated rules.
    """

    queued: int
    run_kills: int = 0
    worker_kills: int = 0
    repeated: int = 0
    seconds: float = 0.0
    violations: list[str] = field(default_factory=list)


def kill_queued(
    folder: Path,
    count: int,
    kills: int,
    seed: int,
    *,
    database: Path | None = None,
    tell: Callable[[str], None] = print,
) -> QueueResult:
    """Queues retrainings, kills at random, and waits until every one has ended.

    Args:
        folder: A new folder for server, home and files.
        count: Number of retrainings.
        kills: Most kills; they end early if nothing is left to kill.
        seed: Seed of the kills.
        database: Migrated database of Prefect to copy; None lets the server make its tables.
        tell: Takes lines about the progress.
    """
    began, result = time.monotonic(), QueueResult(count)
    home, specs = prepare_queue(folder, count)
    with ExitStack() as stack:
        queue = stack.enter_context(_started_queue(folder, home, database))
        runs = {queue.add(spec, home): spec for spec in specs}
        _kill(queue, set(runs), random.Random(seed), kills, result, tell)
        _wait_for_end(queue, set(runs), lambda: queue.add(specs[0], home), tell)
        states = queue.states()
    result.repeated = sum(states[run]["run_count"] > 1 for run in runs)
    result.violations += [
        f"{spec.name} ended {states[run]['state']['name']}: {states[run]['state']['message']}"
        for run, spec in runs.items()
        if states[run]["state"]["type"] != "COMPLETED"
    ]
    result.violations += check_queue(home, count)
    result.seconds = time.monotonic() - began
    return result


def prepare_queue(folder: Path, count: int) -> tuple[Home, list[Path]]:
    """Makes a home with two adapters, and one pipeline file per retraining."""
    home = Home.open(folder / "home")
    with closing(Versions(home)) as versions:
        for number in range(2):
            path = folder / "adapter.safetensors"
            source = torch.Generator().manual_seed(number)
            delta = LoraDelta(torch.randn(2, 4, generator=source), torch.randn(4, 2, generator=source), 2.0)
            write_adapter(path, Adapter({_MODULE: delta}, "sd"), card=Card(title=f"part {number}"))
            versions.register(f"part-{number}", versions.store.put_files("adapter", {path.name: path}), path.name)
    specs = []
    for number in range(count):
        name, path = f"queued-{number % NAMES}", folder / f"{number}.yaml"
        merge = {"uses": "merge", "adapters": ["part-0@1", "part-1@1"], "weights": [1.0, 1.0 + number / 1000]}
        release = {"uses": "register", "name": name, "adapter": "merged", "alias": "trial"}
        document = {"name": f"{name}-{number}", "steps": {"merged": merge, "release": release}}
        path.write_text(yaml.safe_dump(document, sort_keys=False))
        specs.append(path)
    return home, specs


def check_queue(home: Home, count: int) -> list[str]:
    """Returns what is wrong with a home in which every queued retraining has ended."""
    violations = [f"{problem.where}: {problem.what}" for problem in fsck(home) if problem.severity == "damage"]
    with closing(Versions(home)) as versions:
        made = [version for version in versions.list() if version.name.startswith("queued-")]
        events = read_log(versions)
        aliases = {(version.name, alias): version.version for version in made for alias in version.aliases}
        running = [run.id for run in versions.lineage.runs(10 * count) if run.status == "RUNNING"]
    if len(made) != count or len({version.sha256 for version in made}) != count:
        violations.append(f"{len(made)} versions of {len({v.sha256 for v in made})} adapters, not {count}")
    staged = Counter((event.name, event.after) for event in events if event.action == "stage")
    violations += [f"{name}@{number} was staged {times} times" for (name, number), times in staged.items() if times > 1]
    if set(staged) != {(version.name, version.version) for version in made}:
        violations.append("not every version was staged")
    if replay(events) != aliases:
        violations.append(f"the log gives {replay(events)}, the aliases are {aliases}")
    return violations + [f"the run {run} is RUNNING, and its process is gone" for run in running]


@dataclass
class _Queue:
    api: str
    environment: dict[str, str]
    folder: Path
    workers: dict[int, subprocess.Popen[bytes]]
    deployment: str = ""

    def add(self, spec: Path, home: Home) -> str:
        """Queues a retraining and returns the id of its flow run."""
        body = {"state": {"type": "SCHEDULED"}, "parameters": {"spec": str(spec), "home": str(home.path)}}
        return str(self.post(f"deployments/{self.deployment}/create_flow_run", body)["id"])

    def post(self, path: str, body: dict[str, Any]) -> Any:
        deadline = time.monotonic() + 300
        while True:
            try:
                answer = httpx.post(f"{self.api}/{path}", json=body, timeout=60)
                if answer.status_code != 503:
                    return answer.raise_for_status().json()
            except httpx.TransportError:
                pass
            if time.monotonic() > deadline:
                raise TimeoutError(f"the server does not answer {path}")
            time.sleep(0.5)

    def states(self) -> dict[str, Any]:
        """Returns flow run -> its row, for the queued ones."""
        query = {"flow_runs": {"deployment_id": {"any_": [self.deployment]}}, "limit": 200}
        rows: dict[str, Any] = {}
        while page := self.post("flow_runs/filter", query | {"offset": len(rows)}):
            rows |= {row["id"]: row for row in page}
        return rows

    def start_worker(self, number: int) -> None:
        command = [str(_BIN / "prefect"), "worker", "start", "--pool", "local", "--type", "process", "--limit", "1"]
        log = (self.folder / f"worker-{number}.log").open("ab")
        self.workers[number] = subprocess.Popen(
            [*command, "--name", f"worker-{number}"],
            env=self.environment,
            cwd=PROJECT,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    def engines(self) -> dict[int, str]:
        """Returns process -> flow run of the running flow runs of this queue, and of no other server."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                variables = dict(
                    entry.split("=", 1) for entry in (path / "environ").read_text().split("\0") if "=" in entry
                )
                arguments = (path / "cmdline").read_text().split("\0")
            except (OSError, UnicodeDecodeError):
                continue  # it ended meanwhile, or is another user's
            run = variables.get("PREFECT__FLOW_RUN_ID")
            if run and variables.get("PREFECT_API_URL") == self.api and "prefect.engine" in arguments:
                found[int(path.name)] = run
        return found


@contextmanager
def _started_queue(folder: Path, home: Home, database: Path | None) -> Iterator[_Queue]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    api = f"http://127.0.0.1:{port}/api"
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment = plain | {
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_API_URL": api,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        "DO_NOT_TRACK": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "OMP_NUM_THREADS": "1",
        "LORALINE_HOME": str(home.path),
        "LORALINE_PROJECT": str(PROJECT),
        "PYTHONPATH": str(PROJECT),
        "PATH": f"{_BIN}{os.pathsep}{os.environ['PATH']}",
    }
    (folder / "prefect").mkdir()
    if database is not None:
        (folder / "prefect" / "prefect.db").write_bytes(database.read_bytes())
    queue = _Queue(api, environment, folder, {})
    command = [str(_BIN / "prefect"), "server", "start", "--host", "127.0.0.1", "--port", str(port), "--no-ui"]
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(command, env=environment, cwd=PROJECT, stdout=log, stderr=log, start_new_session=True)
        try:
            _wait(lambda: httpx.get(f"{api}/health", timeout=5).text == "true", 600, "the server answers")
            _deploy(queue)
            for number in range(2):
                queue.start_worker(number)
            yield queue
        finally:
            for process in (*queue.workers.values(), server):
                _kill_group(process)
            for pid in queue.engines():
                os.kill(pid, signal.SIGKILL)


def _deploy(queue: _Queue) -> None:
    """Deploys the project's deployment without schedule and limit, and the automations with short times."""
    document = yaml.safe_load((PROJECT / "prefect.yaml").read_text())
    deployment = document["deployments"][0]
    for key in ("schedules", "concurrency_limit"):
        deployment.pop(key, None)
    document["deployments"] = [deployment]
    config = queue.folder / "prefect.yaml"
    config.write_text(yaml.safe_dump(document))
    automations = yaml.safe_load((PROJECT / "deploy" / "requeue.yaml").read_text())
    by_name = {automation["name"]: automation["trigger"] for automation in automations["automations"]}
    by_name["retrain-without-heartbeat"]["within"] = _SILENCE
    by_name["retrain-never-started"]["within"] = _START
    requeue = queue.folder / "requeue.yaml"
    requeue.write_text(yaml.safe_dump(automations))
    for arguments in (
        ["work-pool", "create", "local", "--type", "process"],
        ["--no-prompt", "deploy", "--all", "--prefect-file", str(config)],
        ["automation", "create", "--from-file", str(requeue)],
    ):
        done = subprocess.run(
            [str(_BIN / "prefect"), *arguments],
            env=queue.environment,
            cwd=PROJECT,
            capture_output=True,
            text=True,
            timeout=300,
        )
        if done.returncode:
            raise RuntimeError(f"prefect {' '.join(arguments)}: {done.stdout}{done.stderr}")
    name = f"deployments/name/retrain/{deployment['name']}"
    queue.deployment = httpx.get(f"{queue.api}/{name}", timeout=60).raise_for_status().json()["id"]


def _kill(
    queue: _Queue, runs: set[str], source: random.Random, kills: int, result: QueueResult, tell: Callable[[str], None]
) -> None:
    """Kills a run, a worker, or both at random moments; a killed worker starts again."""
    killed: Counter[str] = Counter()
    while result.run_kills + result.worker_kills < kills and _unfinished(queue, runs):
        time.sleep(source.uniform(1, 8))
        what = source.choice(["run", "run", "worker", "both"])
        engines = {pid: run for pid, run in queue.engines().items() if killed[run] < _MOST_KILLS}
        if what != "worker" and engines:
            pid = source.choice(sorted(engines))
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue  # it ended meanwhile
            killed[engines[pid]] += 1
            result.run_kills += 1
        if what != "run":
            number = source.choice(sorted(queue.workers))
            queue.workers[number].kill()
            queue.workers[number].wait()
            result.worker_kills += 1
            queue.start_worker(number)
        tell(f"killed {what}: {result.run_kills} runs, {result.worker_kills} workers, {_counts(queue, runs)}")


def _wait_for_end(queue: _Queue, runs: set[str], add_tick: Callable[[], object], tell: Callable[[str], None]) -> None:
    """Waits until all have ended; gives up once nothing changes for ten minutes.

    If only crashed runs are left for two minutes, the next scheduled run comes, which queues them again.
    """
    last, since, ticked = {}, time.monotonic(), False
    while _unfinished(queue, runs):
        current = _counts(queue, runs)
        if current != last:
            last, since, ticked = current, time.monotonic(), False
            tell(f"waiting: {current}")
        if not ticked and current.get("Crashed") and time.monotonic() - since > 120:
            ticked = True
            add_tick()
        if time.monotonic() - since > 600:
            return
        time.sleep(2)


def _counts(queue: _Queue, runs: set[str]) -> dict[str, int]:
    rows = queue.states()
    return dict(sorted(Counter(rows[run]["state"]["name"] for run in runs).items()))


def _unfinished(queue: _Queue, runs: set[str]) -> bool:
    """Returns True while a run is not at its end; one that crashed may be queued again."""
    rows = queue.states()
    final = {"COMPLETED", "FAILED", "CANCELLED"}
    return any(
        rows[run]["state"]["type"] not in final
        and not (rows[run]["state"]["type"] == "CRASHED" and rows[run]["run_count"] > _MOST_KILLS)
        for run in runs
    )


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _wait(condition: Callable[[], bool], seconds: float, description: str) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if condition():
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise TimeoutError(f"not after {seconds} s: {description}")

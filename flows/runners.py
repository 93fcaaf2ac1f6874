"""Task runners: what executes the steps of a run, the trials of a sweep and the pipelines of a matrix.

Prefect's runners, chosen by a setting. `runner:` in the home's `loraline.yaml`, `LORALINE_RUNNER` and `--runner` choose
one. Importing this module imports no Prefect.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lora_engine.compute import THREADS, threads
from lora_engine.errors import SettingsError
from lora_engine.lean import hide_optional
from lora_engine.parallel import count_cores
from lora_engine.registries import Registry
from registry.home import Home
from registry.settings import NAME
from tasks.progress import request_stop
from tasks.relay import Relay, receive_events, running_steps

if TYPE_CHECKING:
    from prefect.task_runners import TaskRunner

VARIABLE = "LORALINE_RUNNER"
"""Environment variable with the name of the task runner; overrides the setting of the home."""
_GRACE = 90.0
"""Seconds that the steps of a worker have to save, once its run was killed. A training has 60."""


class RunnerSettings(BaseModel):
    """The section `runner` of `loraline.yaml`.

    Attributes:
        type: Name of the task runner.
        workers: Steps, trials or pipelines at the same time. None means one per core; threads have no limit.
        address: Address of a running cluster of Dask or Ray; None starts one on this machine.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: str = "threads"
    workers: int | None = Field(default=None, ge=1, le=1024)
    address: str | None = Field(default=None, min_length=1, max_length=1024)


@dataclass(frozen=True)
class RunnerKind:
    """A task runner.

    Attributes:
        name: Its name in settings.
        title: What it is, for help texts.
        create: Returns Prefect's task runner.
        package: The package that it needs; empty for a part of Prefect.
        extra: The extra of Loraline that installs the package.
        isolated: True if tasks run in other processes.
    """

    name: str
    title: str
    create: Callable[[RunnerSettings], TaskRunner[Any]]
    package: str = ""
    extra: str = ""
    isolated: bool = True


@dataclass(frozen=True)
class StartedRunner:
    """A task runner for flows, and the channel to its workers.

    Attributes:
        prefect: Prefect's task runner; a flow starts and ends its workers.
        relay: The channel; None if tasks run in threads of this process.
    """

    prefect: TaskRunner[Any]
    relay: Relay | None = None


runners: Registry[RunnerKind] = Registry("task runner", entry=RunnerKind, source="flows.runners")
"""All task runners by name."""
IN_THREADS = RunnerSettings()
"""Steps inside of a trial or a pipeline that a worker runs: its own workers would exceed the limit."""


def read_runner(home: Home, name: str | None = None) -> RunnerSettings:
    """Returns the settings of the task runner: those of the home, of which an option and a variable set the type.

    Args:
        home: The home.
        name: Name of the task runner; None takes `LORALINE_RUNNER`, else the setting of the home, else threads. Another
            type than that of the home keeps its `workers`, but not its `address`.

    Raises:
        SettingsError: Unknown, not installed, or set to what it cannot do.
        HomeError: The settings of the home cannot be read.
    """
    where = str(home.path / NAME)
    try:
        settings = RunnerSettings.model_validate(home.settings.runner or {})
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        key = ".".join(("runner", *map(str, first["loc"])))
        allowed = ", ".join(RunnerSettings.model_fields)
        raise SettingsError(f"{key}: {first['msg']}", where=where, allowed=allowed, remedy="correct the file") from None
    chosen = name or os.environ.get(VARIABLE) or settings.type
    if chosen != settings.type:
        where = "--runner" if name else VARIABLE
        settings = RunnerSettings(type=chosen, workers=settings.workers)
    _check(settings, where)
    return settings


def _check(settings: RunnerSettings, where: str) -> None:
    try:
        kind = runners[settings.type]
    except SettingsError as error:
        raise error.at(where) from None
    if kind.package and find_spec(kind.package) is None:
        raise SettingsError(
            f"task runner {kind.name!r} needs the package {kind.package.replace('_', '-')}",
            where=where,
            remedy=f"install the extra: pip install 'loraline[{kind.extra}]'",
        )
    if settings.address and not kind.package:
        clusters = ", ".join(other.name for other in runners.values() if other.package)
        raise SettingsError(
            f"task runner {kind.name!r} has no address", where=where, allowed=clusters, remedy="remove `address`"
        )
    if settings.address and settings.workers:
        raise SettingsError(
            f"workers is {settings.workers}, but the cluster at `address` has its own",
            where=where,
            remedy="remove `workers` or `address`",
        )


@contextmanager
def started_runner(settings: RunnerSettings, home: Home) -> Iterator[StartedRunner]:
    """Yields a task runner for flows inside a `with` block; sends the events of its workers to this process.

    Local workers share the cores: each computes with its part of them, unless `OMP_NUM_THREADS` is set.
    """
    kind = runners[settings.type]
    if not kind.isolated:
        yield StartedRunner(kind.create(settings))
        return
    shared = None if THREADS in os.environ else max(1, count_cores() // _workers(settings))
    with threads(shared), _settings_of_all_threads(), receive_events(home) as relay:
        yield StartedRunner(kind.create(settings), relay)


@contextmanager
def _settings_of_all_threads() -> Iterator[None]:
    """Makes Prefect's current settings those of threads without a context of ours.

    Such threads of task runners would start another server, because the address of ours is not among their settings.
    """
    from prefect import context

    before = context.GLOBAL_SETTINGS_CONTEXT
    current = context.SettingsContext.get()
    context.GLOBAL_SETTINGS_CONTEXT = before if current is None else current
    try:
        yield
    finally:
        context.GLOBAL_SETTINGS_CONTEXT = before


def kill_workers() -> None:
    """Kills the workers of this process at once; their steps save nothing."""
    for process in multiprocessing.active_children():
        process.kill()


def _workers(settings: RunnerSettings) -> int:
    return settings.workers or count_cores()


def _create_threads(settings: RunnerSettings) -> TaskRunner[Any]:
    from prefect.task_runners import ThreadPoolTaskRunner

    return ThreadPoolTaskRunner(max_workers=settings.workers)


def _create_processes(settings: RunnerSettings) -> TaskRunner[Any]:
    from prefect.task_runners import ProcessPoolTaskRunner

    return ProcessPoolTaskRunner(max_workers=_workers(settings), initializer=_start_worker)


def _create_dask(settings: RunnerSettings) -> TaskRunner[Any]:
    from prefect_dask.task_runners import DaskTaskRunner

    if settings.address:
        return DaskTaskRunner(address=settings.address)
    cluster = {
        "n_workers": _workers(settings),
        "threads_per_worker": 1,
        "processes": True,
        "host": "127.0.0.1",
        "dashboard_address": None,
        "memory_limit": 0,  # else Dask kills a worker by its share of the memory
    }
    return DaskTaskRunner(cluster_kwargs=cluster)


def _create_ray(settings: RunnerSettings) -> TaskRunner[Any]:
    # Before the import of ray. It would hide the GPUs from tasks that reserve none; the home's device slots limit them.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    from prefect_ray import RayTaskRunner  # type: ignore[import-untyped]

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if not settings.address:
        options |= {"num_cpus": _workers(settings), "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    runner: TaskRunner[Any] = RayTaskRunner(address=settings.address, init_kwargs=options)
    return runner


def _start_worker() -> None:
    """Prepares a process of the pool, which the run alone ends: Ctrl-C in a terminal reaches the run, too."""
    hide_optional()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=_end_worker, daemon=True).start())
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()  # also if it was killed
            _end_worker()

    threading.Thread(target=follow, daemon=True).start()


def _end_worker() -> None:
    """Asks the steps of this process to save and stop, and ends it once they have."""
    request_stop()
    deadline = time.monotonic() + _GRACE
    while running_steps() and time.monotonic() < deadline:
        time.sleep(0.1)
    os._exit(1)


THREADS_RUNNER = RunnerKind("threads", "threads of this process", _create_threads, isolated=False)
PROCESSES_RUNNER = RunnerKind("processes", "processes on this machine", _create_processes)
DASK_RUNNER = RunnerKind("dask", "a cluster of Dask", _create_dask, "prefect_dask", "dask")
RAY_RUNNER = RunnerKind("ray", "a cluster of Ray", _create_ray, "prefect_ray", "ray")

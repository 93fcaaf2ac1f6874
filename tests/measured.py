"""Defines a pytest plug-in that marks slow tests, orders files by measured durations and sets the number of workers.

It also places the folders of tests in memory if it can: a third of the registry tests' time was waiting for `fsync`.

`make durations` updates `tests/durations.json`. Files without a measurement run first.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

DURATIONS = Path(__file__).parent / "durations.json"
SLOW = 0.1
"""Minimum seconds, fixtures included, of a test that `make check` skips."""
MEMORY = Path("/dev/shm")
ROOM = 6 << 30
"""Bytes that must be free in memory to place the folders of tests there; all workers together use a sixth."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("loraline")
    group.addoption("--nightly", action="store_true", help="Run the tests marked nightly too.")
    group.addoption("--store-durations", action="store_true", help=f"Write {DURATIONS.name} from this run.")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Returns one more process than cores, because tests wait for disks, servers and child processes."""
    return (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1) + 1


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_DEBUG_TEMPROOT" not in os.environ and _holds_folders(MEMORY):
        os.environ["PYTEST_DEBUG_TEMPROOT"] = str(MEMORY)
    config.pluginmanager.register(_Measured(config), "loraline-durations")


def _holds_folders(path: Path) -> bool:
    """Returns True if tests can write, and start programs, in a folder, and enough of it is free."""
    if not os.access(path, os.W_OK) or shutil.disk_usage(path).free < ROOM:
        return False
    return not os.statvfs(path).f_flag & os.ST_NOEXEC


class _Measured:
    """Applies the durations of earlier runs and measures those of this run."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        stored = json.loads(DURATIONS.read_text()) if DURATIONS.exists() else {"files": {}, "slow": {}}
        self.files: dict[str, float] = stored["files"]
        self.slow: dict[str, float] = stored["slow"]
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Marks slow tests, and deselects those of `make nightly`."""
        kept, nightly = [], []
        for item in items:
            if item.nodeid in self.slow:
                item.add_marker("slow")
            left_out = item.get_closest_marker("nightly") and not self.config.option.nightly
            (nightly if left_out else kept).append(item)
        if nightly:
            self.config.hook.pytest_deselected(items=nightly)
            items[:] = kept

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Any) -> LoadScopeScheduling | None:
        """Schedules whole files, the longest first, so that workers share fixtures and end together."""
        return _LongestFirst(config, log, self.files) if config.option.dist == "loadfile" else None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if not self.config.option.store_durations or hasattr(self.config, "workerinput"):
            return
        files: defaultdict[str, float] = defaultdict(float)
        for nodeid, seconds in self.seconds.items():
            files[nodeid.partition("::")[0]] += seconds
        slow = {nodeid: round(seconds, 1) for nodeid, seconds in self.seconds.items() if seconds >= SLOW}
        stored = {"files": {file: round(seconds, 1) for file, seconds in sorted(files.items())}}
        DURATIONS.write_text(json.dumps(stored | {"slow": dict(sorted(slow.items()))}, indent=1) + "\n")


class _LongestFirst(LoadScopeScheduling):
    """Schedules files in descending order of measured seconds."""

    def __init__(self, config: pytest.Config, log: Any, files: dict[str, float]) -> None:
        super().__init__(config, log)
        self.files = files

    def _split_scope(self, nodeid: str) -> str:
        return nodeid.partition("::")[0]

    def _assign_work_unit(self, node: Any) -> None:
        longest = max(self.workqueue, key=lambda file: self.files.get(file, float("inf")))
        self.workqueue.move_to_end(longest, last=False)
        super()._assign_work_unit(node)

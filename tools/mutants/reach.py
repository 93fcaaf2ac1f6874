"""Measures the CPU time of each test and the lines of the central modules that it reaches."""

from __future__ import annotations

import signal
from collections import defaultdict
from collections.abc import Iterator, Sequence
from os import times
from pathlib import Path
from types import FrameType
from typing import Any

import coverage
import pytest

LONGEST = 3.0
"""CPU seconds, without shared fixtures, after which a test is skipped."""
BUDGET = 12.0
"""CPU seconds of tests and their shared fixtures for one mutant."""


class Measure:
    """A pytest plugin that assigns time and lines to tests, and to the fixtures that several tests share.

    Attributes:
        seconds: CPU seconds by test or fixture, including finished child processes.
        passed: Ids of the tests that pass.
    """

    def __init__(self, files: Sequence[str]) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.passed: list[str] = []
        self._current, self._last = "", sum(times()[:4])
        self._coverage = coverage.Coverage(data_file=None, include=files, config_file=False)
        self._coverage.start()

    def _enter(self, name: str) -> str:
        before, self._current = self._current, name
        now = sum(times()[:4])
        self.seconds[before] += now - self._last
        self._last = now
        self._coverage.switch_context(name)
        return before

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Assigns the following time and lines to the test."""
        self._enter(item.nodeid)
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        """Assigns the setup of a shared fixture to the fixture."""
        if fixturedef.scope == "function":
            return (yield)
        before = self._enter(_key(fixturedef))
        try:
            return (yield)
        finally:
            self._enter(before)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Iterator[None]:
        """Skips the rest of a test that takes too long, in CPU time or, if it waits, in wall time."""
        for timer, number, seconds in (
            (signal.ITIMER_PROF, signal.SIGPROF, LONGEST),
            (signal.ITIMER_REAL, signal.SIGALRM, 20 * LONGEST),
        ):
            signal.signal(number, _too_long)
            signal.setitimer(timer, seconds)
        try:
            return (yield)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Records the tests that pass."""
        if report.when == "call" and report.passed:
            self.passed.append(report.nodeid)

    def finish(self) -> dict[str, list[str]]:
        """Returns the reached lines, as `<file>:<line>`, by test or fixture."""
        self._enter("")
        self._coverage.stop()
        data, lines = self._coverage.get_data(), defaultdict[str, list[str]](list)
        for path in data.measured_files():
            file = Path(path).relative_to(Path.cwd())
            for line, contexts in data.contexts_by_lineno(path).items():
                for context in contexts:
                    lines[context].append(f"{file}:{line}")
        return dict(lines)


class Selection:
    """Selects tests for lines. `measured` has one dict per folder, with `seconds`, `passed` and `lines`."""

    def __init__(self, items: Sequence[pytest.Item], measured: Sequence[dict[str, Any]]) -> None:
        passed = {nodeid for folder in measured for nodeid in folder["passed"]}
        self._items = [item for item in items if item.nodeid in passed]
        self._seconds = {key: value for folder in measured for key, value in folder["seconds"].items()}
        lines = {key: value for folder in measured for key, value in folder["lines"].items()}
        self._parts = {item.nodeid: (item.nodeid, *_shared(item)) for item in self._items}
        self._lines = {
            nodeid: {line for key in parts for line in lines.get(key, ())} for nodeid, parts in self._parts.items()
        }

    def choose(self, file: str, first: int, last: int) -> tuple[list[pytest.Item], float]:
        """Returns the cheapest tests that reach any of the lines, in run order, and their CPU seconds."""
        lines = {f"{file}:{line}" for line in range(first, last + 1)}
        chosen: list[pytest.Item] = []
        paid: set[str] = set()
        for item in sorted((item for item in self._items if lines & self._lines[item.nodeid]), key=self._cost):
            parts = paid.union(self._parts[item.nodeid])
            if self._sum([item.nodeid]) <= LONGEST and self._sum(parts) <= BUDGET:
                chosen, paid = [*chosen, item], parts
        # Grouped by file, because its tests share fixtures; the file with the cheapest test comes first.
        files = list(dict.fromkeys(item.path for item in chosen))
        return sorted(chosen, key=lambda item: files.index(item.path)), self._sum(paid)

    def _cost(self, item: pytest.Item) -> float:
        return self._sum(self._parts[item.nodeid])

    def _sum(self, parts: Any) -> float:
        return sum(self._seconds.get(key, 0.0) for key in parts)


def _too_long(number: int, frame: FrameType | None) -> None:
    pytest.skip("takes too long for the mutation check")


def _key(fixture: Any) -> str:
    return f"{fixture.baseid}::<{fixture.argname}>"


def _shared(item: Any) -> list[str]:
    fixtures = [definitions[-1] for definitions in item._fixtureinfo.name2fixturedefs.values()]
    return [_key(fixture) for fixture in fixtures if fixture.scope != "function"]

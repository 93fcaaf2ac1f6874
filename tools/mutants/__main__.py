"""`python -m tools.mutants`: what share of small changes to ten central modules the tests notice.

A mutant that survives is either equivalent or shows an assertion that is missing. To compare two versions of the
suite, run both against the same product code.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from tools.mutants.forks import LAZY, find_functions, import_heavy, in_fork, replace_code, run_tests
from tools.mutants.mutating import Codes, Mutant, sample
from tools.mutants.reach import LONGEST, Measure, Selection

MODULES: dict[str, tuple[str, tuple[str, ...]]] = {
    "statistics": ("lora_engine/evaluation/statistics.py", ("tests/lora_engine/evaluation",)),
    "low_rank": ("lora_engine/adapters/low_rank.py", ("tests/lora_engine/adapters", "tests/laws")),
    "codec": ("lora_engine/formats/codec.py", ("tests/lora_engine/formats", "tests/laws")),
    "checkpoint": ("lora_engine/training/checkpoint.py", ("tests/lora_engine/training",)),
    "loop": ("lora_engine/training/loop.py", ("tests/lora_engine/training",)),
    "policy": ("registry/policy/alias_policy.py", ("tests/registry",)),
    "promotion": ("registry/versions/promotion.py", ("tests/registry",)),
    "store": ("registry/store", ("tests/registry",)),
    "spec": ("flows/spec.py", ("tests/flows",)),
    "execution": ("tasks/execution.py", ("tests/flows", "tests/faults")),
}
"""A file or package, and the folders with its tests; which of these tests run against a mutant is measured."""


class Check:
    """A pytest plugin that runs mutants against the collected tests, in place of the tests alone."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.results: list[dict[str, Any]] = []
        self._options = options
        self._measured = json.loads(options.reach.read_text()) if options.reach and options.reach.exists() else {}
        slow = json.loads(options.durations.read_text())["slow"] if options.durations.exists() else {}
        self._long = {nodeid for nodeid, seconds in slow.items() if seconds > LONGEST}

    def pytest_configure(self) -> None:
        """Makes hypothesis draw the same examples each time."""
        import hypothesis

        hypothesis.settings.register_profile("mutants", derandomize=True, deadline=None, database=None)
        hypothesis.settings.load_profile("mutants")

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Draws and runs the mutants of each module, after measuring what its tests reach."""
        import_heavy(LAZY)
        for name in self._options.modules or MODULES:
            place, folders = MODULES[name]
            measured = [self._measure(session, folder) for folder in folders]
            import_heavy(chain.from_iterable(each["imported"] for each in measured))
            items = [item for item in session.items if item.nodeid.startswith(tuple(f"{each}/" for each in folders))]
            selection, drawn = Selection(items, measured), sample(Path.cwd(), _files(place), self._options.count)
            chosen = {mutant: selection.choose(mutant.file, *mutant.lines) for mutant, _ in drawn}
            union = list(dict.fromkeys(chain.from_iterable(tests for tests, _ in chosen.values())))
            # A test that fails in this order without any change would kill every mutant.
            unfit = in_fork(partial(run_tests, union, stop=False))
            _say(f"{name}: {len(drawn)} mutants, {len(union)} tests; not used, since they fail in this order: {unfit}")
            for mutant, codes in drawn:
                tests, seconds = chosen[mutant]
                self._try(name, mutant, codes, [test for test in tests if test.nodeid not in unfit], seconds)
        return True

    def _measure(self, session: pytest.Session, folder: str) -> dict[str, Any]:
        def run() -> dict[str, Any]:
            measure = Measure([file for place, _ in MODULES.values() for file in _files(place)])
            session.config.pluginmanager.register(measure)
            run_tests(items, stop=False)
            lines = measure.finish()
            return {
                "seconds": dict(measure.seconds),
                "passed": measure.passed,
                "lines": lines,
                "imported": [*sys.modules],
            }

        if folder not in self._measured:
            here = [item for item in session.items if item.nodeid.startswith(f"{folder}/")]
            items = [item for item in here if item.nodeid not in self._long]
            _say(f"{folder}: measuring {len(items)} of {len(here)} tests")
            self._measured[folder] = in_fork(run)
            if self._options.reach:
                self._options.reach.write_text(json.dumps(self._measured))
        return self._measured[folder]

    def _try(self, module: str, mutant: Mutant, codes: Codes, tests: list[pytest.Item], seconds: float) -> None:
        functions = find_functions(mutant.file)

        def run() -> list[str]:
            replace_code(functions, codes)
            return run_tests(tests)

        failed = in_fork(run, 20 + 3 * seconds) if tests else []
        outcome = "timeout" if failed is None else "killed" if failed else "survived"
        change = {
            key: getattr(mutant, key) for key in ("file", "function", "operator", "before", "after", "occurrence")
        }
        facts = {"line": mutant.lines[0], "tests": len(tests), "outcome": outcome, "by": failed[0] if failed else None}
        self.results.append({"module": module, **change, **facts})
        _say(json.dumps(self.results[-1]))


def report(results: list[dict[str, Any]]) -> str:
    """Returns the scores and the survivors as Markdown."""
    lines = ["| module | mutants | killed | survived | timeouts | score |", "|---|---:|---:|---:|---:|---:|"]
    for name in [*dict.fromkeys(each["module"] for each in results), "all"]:
        group = [each["outcome"] for each in results if name in {each["module"], "all"}]
        counts = [group.count(outcome) for outcome in ("killed", "survived", "timeout")]
        score = 1 - counts[1] / max(len(group), 1)
        lines.append(f"| {' | '.join(map(str, (name, len(group), *counts)))} | {score:.1%} |")
    lines += ["", "Survivors:", ""]
    for each in (each for each in results if each["outcome"] == "survived"):
        place = f"{each['file']}:{each['line']} `{each['function']}` ({each['tests']} tests)"
        lines.append(f"- {place}: `{each['before']}` -> `{each['after']}`")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Reads the arguments, runs the check and prints the report."""
    parser = argparse.ArgumentParser(prog="python -m tools.mutants", description=__doc__)
    parser.add_argument("modules", nargs="*", help=f"some of {', '.join(MODULES)}; all by default")
    parser.add_argument("--count", type=int, default=30, help="number of mutants per module; 30 by default")
    parser.add_argument("--json", type=Path, help="file to write the outcomes to")
    parser.add_argument("--reach", type=Path, help="file that keeps the measurement of the tests for a later run")
    parser.add_argument("--durations", type=Path, default=Path("tests/durations.json"), help="file with slow tests")
    options = parser.parse_args()
    check = Check(options)
    folders = dict.fromkeys(chain.from_iterable(MODULES[name][1] for name in options.modules or MODULES))
    with tempfile.TemporaryDirectory() as temporary:
        arguments = ["-q", "-s", "-p", "no:cacheprovider", "--basetemp", f"{temporary}/tests", "-k", "not postgres"]
        pytest.main([*arguments, *folders], plugins=[check])
    if options.json:
        options.json.write_text(json.dumps(check.results, indent=1) + "\n")
    sys.stdout.write(report(check.results))


def _files(place: str) -> list[str]:
    path = Path(place)
    return [str(each) for each in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()

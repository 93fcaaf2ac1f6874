"""Measures the share of small changes to central modules that tests notice: `python -m tools.mutants`.

A mutant that survives is equivalent, or an assertion is missing. To compare two versions of the
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
    "fit_state": ("lora_engine/training/fit_state.py", ("tests/lora_engine/training",)),
    "policy": ("registry/policy/alias_policy.py", ("tests/registry",)),
    "promotion": ("registry/versions/promotion.py", ("tests/registry",)),
    "store": ("registry/store/artifacts.py", ("tests/registry",)),
    "spec": ("flows/spec", ("tests/flows",)),
    "execution": ("tasks/execution.py", ("tests/flows", "tests/faults")),
}
"""Module -> its file or package, and the folders with its tests. `reach` selects the tests for a mutant."""


class Check:
    """A pytest plugin that runs mutants against the collected tests, instead of only the tests."""

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
        """Samples and runs the mutants of each module, after measuring the lines that its tests reach."""
        import_heavy(LAZY)
        for name in self._options.modules or MODULES:
            path, folders = MODULES[name]
            measured = [self._measure(session, folder) for folder in folders]
            import_heavy(chain.from_iterable(folder["imported"] for folder in measured))
            items = [
                item for item in session.items if item.nodeid.startswith(tuple(f"{folder}/" for folder in folders))
            ]
            selection, drawn = Selection(items, measured), sample(Path.cwd(), _files(path), self._options.count)
            chosen = {mutant: selection.choose(mutant.file, *mutant.lines) for mutant, _ in drawn}
            union = list(dict.fromkeys(chain.from_iterable(tests for tests, _ in chosen.values())))
            # A test that fails in this order without any change would kill every mutant.
            unfit = in_fork(partial(run_tests, union, stop=False))
            _print(
                f"{name}: {len(drawn)} mutants, {len(union)} tests; excluded because they fail in this order: {unfit}"
            )
            for mutant, codes in drawn:
                tests, seconds = chosen[mutant]
                self._try(name, mutant, codes, [test for test in tests if test.nodeid not in unfit], seconds)
        return True

    def _measure(self, session: pytest.Session, folder: str) -> dict[str, Any]:
        def run() -> dict[str, Any]:
            measure = Measure([file for path, _ in MODULES.values() for file in _files(path)])
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
            collected = [item for item in session.items if item.nodeid.startswith(f"{folder}/")]
            items = [item for item in collected if item.nodeid not in self._long]
            _print(f"{folder}: measuring {len(items)} of {len(collected)} tests")
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
        _print(json.dumps(self.results[-1]))


def report(results: list[dict[str, Any]]) -> str:
    """Returns the scores and the survivors as Markdown."""
    lines = ["| module | mutants | killed | survived | timeouts | score |", "|---|---:|---:|---:|---:|---:|"]
    for name in [*dict.fromkeys(result["module"] for result in results), "all"]:
        group = [result["outcome"] for result in results if name in {result["module"], "all"}]
        counts = [group.count(outcome) for outcome in ("killed", "survived", "timeout")]
        score = 1 - counts[1] / max(len(group), 1)
        lines.append(f"| {' | '.join(map(str, (name, len(group), *counts)))} | {score:.1%} |")
    lines += ["", "Survivors:", ""]
    for result in (result for result in results if result["outcome"] == "survived"):
        location = f"{result['file']}:{result['line']} `{result['function']}` ({result['tests']} tests)"
        lines.append(f"- {location}: `{result['before']}` -> `{result['after']}`")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Reads the arguments, runs the check and prints the report."""
    parser = argparse.ArgumentParser(prog="python -m tools.mutants", description=__doc__)
    parser.add_argument("modules", nargs="*", help=f"Modules to check: {', '.join(MODULES)}. Default: all.")
    parser.add_argument("--count", type=int, default=30, help="Number of mutants per module. Default: 30.")
    parser.add_argument("--json", type=Path, help="Output file for the outcomes.")
    parser.add_argument("--reach", type=Path, help="File that caches the measurement of the tests.")
    parser.add_argument("--durations", type=Path, default=Path("tests/durations.json"), help="File with slow tests.")
    options = parser.parse_args()
    check = Check(options)
    folders = dict.fromkeys(chain.from_iterable(MODULES[name][1] for name in options.modules or MODULES))
    with tempfile.TemporaryDirectory() as temporary:
        arguments = ["-q", "-s", "-p", "no:cacheprovider", "--basetemp", f"{temporary}/tests", "-k", "not postgres"]
        pytest.main([*arguments, *folders], plugins=[check])
    if options.json:
        options.json.write_text(json.dumps(check.results, indent=1) + "\n")
    sys.stdout.write(report(check.results))


def _files(module: str) -> list[str]:
    path = Path(module)
    return [str(file) for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]


def _print(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()

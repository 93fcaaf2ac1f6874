"""Fuzzes for a time: `python -m tests.fuzz [TARGET ...] [--seconds 60 | --count 100000] [--seed N] [--keep FOLDER]`.

Each target runs in a process of its own, for its share of the time. The exit code is 1 if there was a finding; its
input is written to FOLDER, and `--only NUMBER` repeats it. With `--guided`, atheris mutates by coverage, if installed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from tests.fuzz.files import write_files
from tests.fuzz.runs import Result, run, until
from tests.fuzz.target import input_of

_GRACE = 600.0
"""Seconds that a process may take longer than its time, before it is killed as hanging."""


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="Names of targets; all of them by default.")
    parser.add_argument("--seconds", type=float, default=60.0, help="Time of all targets together.")
    parser.add_argument("--count", type=int, help="Number of inputs of all targets together, instead of a time.")
    parser.add_argument("--seed", type=int, default=0, help="Another seed gives other inputs; 0 draws one.")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="Repeats one input of one target, with traceback.")
    parser.add_argument("--keep", type=Path, default=Path("build/fuzz"), help="Folder for inputs with findings.")
    parser.add_argument("--guided", action="store_true", help="Mutates by coverage, with atheris, one target.")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = _parse()
    if arguments.worker:
        _work(arguments)
        return
    from tests.fuzz.targets import TARGETS

    unknown = [name for name in arguments.targets if name not in TARGETS]
    if unknown:
        raise SystemExit(f"no target {unknown[0]!r}. Allowed: {', '.join(TARGETS)}.")
    seed = arguments.seed or int.from_bytes(os.urandom(3), "big") + 1
    names = arguments.targets or list(TARGETS)
    if arguments.only is not None or arguments.guided:
        _run_one(arguments, names[0], seed)
        return
    total = sum(TARGETS[name].share for name in names)
    failed = 0
    print(f"seed {seed}")
    for name in names:
        part = TARGETS[name].share / total
        failed += _start(name, seed, arguments, part) > 0
    raise SystemExit(1 if failed else 0)


def _start(name: str, seed: int, arguments: argparse.Namespace, part: float) -> int:
    """Runs a target in another process and prints its result; returns the number of findings."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        limit = ["--count", str(max(1, round(arguments.count * part)))] if arguments.count else []
        seconds = arguments.seconds * part
        command = [sys.executable, "-m", "tests.fuzz", name, "--seed", str(seed), "--seconds", str(seconds), *limit]
        command += ["--keep", str(arguments.keep), "--worker", folder]
        began = time.monotonic()
        try:
            timeout = None if arguments.count else seconds + _GRACE
            code = subprocess.run(
                command, timeout=timeout, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
            ).returncode
        except subprocess.TimeoutExpired:
            code = -1
        stored = Path(folder) / "result.json"
        if code != 0 or not stored.is_file():
            number = (Path(folder) / "number").read_text() if (Path(folder) / "number").is_file() else "none"
            print(f"{name}: FINDING input {number}: the process ended with code {code}")
            return 1
        result = Result(**json.loads(stored.read_text()))
    speed = result.inputs / max(0.001, time.monotonic() - began)
    print(
        f"{name}: {result.inputs} inputs ({speed:.0f} a second), {result.accepted} accepted, "
        f"slowest {result.slowest[0]:.1f} s (input {result.slowest[1]}), {len(result.findings)} findings",
        flush=True,
    )
    for number, finding in result.findings.items():
        print(f"{name}: FINDING input {number}: {finding[:400]}", flush=True)
    return len(result.findings)


def _work(arguments: argparse.Namespace) -> None:
    from tests.fuzz.targets import TARGETS

    logging.disable(logging.CRITICAL)
    target, folder = TARGETS[arguments.targets[0]], arguments.worker
    numbers = range(arguments.count) if arguments.count else until(arguments.seconds)
    result = run(target, arguments.seed, numbers, folder / "work", folder / "number")
    for number in result.findings:
        kept = arguments.keep / f"{target.name}-{arguments.seed}-{number}"
        shutil.rmtree(kept, ignore_errors=True)
        write_files(kept, input_of(target, arguments.seed, number, folder / "work"))
    (folder / "result.json").write_text(json.dumps(asdict(result)))


def _run_one(arguments: argparse.Namespace, name: str, seed: int) -> None:
    from tests.fuzz.guided import run_guided
    from tests.fuzz.target import try_input
    from tests.fuzz.targets import TARGETS

    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        work = Path(folder)
        if arguments.guided:
            run_guided(TARGETS[name], work, arguments.seconds)
        else:
            files = input_of(TARGETS[name], seed, arguments.only, work)
            write_files(arguments.keep / f"{name}-{seed}-{arguments.only}", files)
            print(try_input(TARGETS[name], files, work) or "accepted")


if __name__ == "__main__":
    main()

"""Fuzzes for a time: `python -m tests.fuzz [TARGET ...] [--seconds 60 | --count 100000] [--seed N] [--keep FOLDER]`.

The targets run in another process, each for its share of the time. The exit code is 1 if there was a finding; its
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
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from tests.fuzz.files import write_files
from tests.fuzz.runs import Result, run, until
from tests.fuzz.target import input_of

_GRACE = 300.0
"""Seconds after which a process is killed that stays with one input: the bound in it counts no waiting."""


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
    parser.add_argument("--total", type=float, help=argparse.SUPPRESS)
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
    print(f"seed {seed}", flush=True)
    failed, rest = False, names
    while rest:
        done, died = _start(rest, names, seed, arguments)
        failed |= died or any(result.findings for result in done.values())
        # After the one in which the process died, the run continues with the next.
        rest = rest[len(done) + died :]
    raise SystemExit(1 if failed else 0)


def _start(
    names: list[str], every: list[str], seed: int, arguments: argparse.Namespace
) -> tuple[dict[str, Result], bool]:
    """Runs targets in another process; returns the results of those that ended, and True if one of them killed it."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        command = [sys.executable, "-m", "tests.fuzz", *names, "--seed", str(seed), "--seconds", str(arguments.seconds)]
        command += ["--count", str(arguments.count)] if arguments.count else []
        command += ["--keep", str(arguments.keep), "--worker", folder, "--total", str(_total(every))]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, env=environment)
        code = _wait(process, Path(folder))
        done = {path.stem: Result(**json.loads(path.read_text())) for path in Path(folder).glob("*.json")}
        if code == 0:
            return done, False
        number = Path(folder, "number")
        print(f"FINDING {number.read_text() if number.is_file() else names[0]}: the process ended with code {code}")
        return done, True


def _wait(process: subprocess.Popen[bytes], folder: Path) -> int:
    """Returns the exit code; kills a process that stays with one input, blocked or in native code, for too long."""
    number, seen, since = folder / "number", "", time.monotonic()
    while process.poll() is None:
        time.sleep(0.2)
        current = number.read_text() if number.is_file() else ""
        if current != seen:
            seen, since = current, time.monotonic()
        elif time.monotonic() - since > _GRACE:
            process.kill()
    return process.returncode


def _total(names: Iterable[str]) -> float:
    from tests.fuzz.targets import TARGETS

    return sum(TARGETS[name].share for name in names)


def _work(arguments: argparse.Namespace) -> None:
    from tests.fuzz.targets import TARGETS

    logging.disable(logging.CRITICAL)
    folder = arguments.worker
    for name in arguments.targets:
        target = TARGETS[name]
        part = target.share / arguments.total
        numbers = range(max(1, round(arguments.count * part))) if arguments.count else until(arguments.seconds * part)
        began = time.monotonic()
        result = run(target, arguments.seed, numbers, folder / "work", folder / "number")
        for number in result.findings:
            kept = arguments.keep / f"{target.name}-{arguments.seed}-{number}"
            shutil.rmtree(kept, ignore_errors=True)
            write_files(kept, input_of(target, arguments.seed, number, folder / "work"))
        _report(name, result, time.monotonic() - began)
        (folder / f"{name}.json").write_text(json.dumps(asdict(result)))


def _report(name: str, result: Result, seconds: float) -> None:
    print(
        f"{name}: {result.inputs} inputs ({result.inputs / max(0.001, seconds):.0f} a second), {result.accepted} "
        f"accepted, slowest {result.slowest[0]:.1f} s (input {result.slowest[1]}), memory at most "
        f"{result.peak / 1e6:.0f} MB, {len(result.findings)} findings",
        flush=True,
    )
    for number, finding in result.findings.items():
        print(f"{name}: FINDING input {number}: {finding[:400]}", flush=True)


def _run_one(arguments: argparse.Namespace, name: str, seed: int) -> None:
    from tests.fuzz.guided import run_guided
    from tests.fuzz.target import try_input
    from tests.fuzz.targets import TARGETS

    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        work = Path(folder)
        if arguments.guided:
            run_guided(TARGETS[name], work, arguments.seconds, arguments.keep)
        else:
            files = input_of(TARGETS[name], seed, arguments.only, work)
            write_files(arguments.keep / f"{name}-{seed}-{arguments.only}", files)
            print(try_input(TARGETS[name], files, work) or "accepted")


if __name__ == "__main__":
    main()

"""Runs all fault campaigns: `python -m tests.faults [--kills 300] [--races 200] [--out FILE.json]`.

Runs all fault points first, then random trials. The exit code is 1 if any invariant was violated.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from tests.faults.campaigns import Result, change_bytes, fail_at_each_point, kill_at_random, race
from tests.faults.queued import kill_queued
from tests.faults.training import import_all
from tests.faults.work import WORKS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300, help="Number of random kills, shared by the pieces of work.")
    parser.add_argument("--mlflow", type=int, default=30, help="Number of random kills of a registration with MLflow.")
    parser.add_argument("--races", type=int, default=200)
    parser.add_argument("--changes", type=int, default=200, help="Number of flipped, truncated and deleted files.")
    parser.add_argument("--queued", type=int, default=0, help="Number of retrainings to queue; 0 leaves this out.")
    parser.add_argument("--queue-kills", type=int, default=60, help="Most kills of workers and runs meanwhile.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results: dict[str, Result] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        import_all(folder / "imported")

        def run(title: str, result: Result) -> None:
            results[title] = result
            elapsed = time.monotonic() - began
            counts = f"{result.trials} trials, {result.hits} hit, {len(result.violations)} violations"
            print(f"{elapsed:6.0f} s  {title}: {counts}")

        began = time.monotonic()
        for mode in ("kill", "full-once", "full"):
            for work in WORKS:
                run(f"{mode} at every point of {work}", fail_at_each_point(folder / f"{mode}-{work}", work, mode))
        for work in WORKS:
            kills = -(-arguments.kills // len(WORKS))
            run(f"random kills of {work}", kill_at_random(folder / f"random-{work}", work, kills, arguments.seed))
        with_mlflow = kill_at_random(folder / "mlflow", "register", arguments.mlflow, arguments.seed, with_mlflow=True)
        run("random kills of register with MLflow", with_mlflow)
        run("races of three promotions", race(folder / "race", arguments.races))
        run("changed files", change_bytes(folder / "bytes", arguments.changes, arguments.seed))
        if arguments.queued:
            (folder / "queued").mkdir()
            queued = kill_queued(folder / "queued", arguments.queued, arguments.queue_kills, arguments.seed)
            hits = queued.run_kills + queued.worker_kills
            run("kills of queued retrainings", Result(queued.queued, hits, queued.violations))
    violations = [entry for result in results.values() for entry in result.violations]
    if arguments.out:
        counts = {title: {**vars(result), "violations": len(result.violations)} for title, result in results.items()}
        arguments.out.write_text(json.dumps(counts, indent=2) + "\n")
    for entry in violations[:20]:
        print(f"VIOLATED {entry}")
    raise SystemExit(1 if violations else 0)


if __name__ == "__main__":
    main()

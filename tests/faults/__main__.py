"""All campaigns in one command: `python -m tests.faults [--kills 300] [--races 200] [--out FILE.json]`.

The fault points are gone through first, then come the random trials. It ends with 1 where anything was violated.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from tests.faults.campaigns import Result, change_bytes, go_through, kill_at_random, race
from tests.faults.work import WORKS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300, help="random kills, shared by put, register and promote")
    parser.add_argument("--mlflow", type=int, default=30, help="random kills of a registration with MLflow")
    parser.add_argument("--races", type=int, default=200)
    parser.add_argument("--changes", type=int, default=200, help="flipped, cut and deleted files")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    results: dict[str, Result] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def run(title: str, result: Result) -> None:
            results[title] = result
            took = time.monotonic() - began
            print(f"{took:6.0f} s  {title}: {result.trials} trials, {result.hits} hit, {len(result.found)} violations")

        began = time.monotonic()
        for mode in ("kill", "full-once", "full"):
            for work in WORKS:
                run(f"{mode} at every point of {work}", go_through(folder / f"{mode}-{work}", work, mode))
        for work in WORKS:
            each = -(-chosen.kills // len(WORKS))
            run(f"random kills of {work}", kill_at_random(folder / f"random-{work}", work, each, chosen.seed))
        with_mlflow = kill_at_random(folder / "mlflow", "register", chosen.mlflow, chosen.seed, with_mlflow=True)
        run("random kills of register with MLflow", with_mlflow)
        run("races of three promotions", race(folder / "race", chosen.races))
        run("changed files", change_bytes(folder / "bytes", chosen.changes, chosen.seed))
    found = [entry for result in results.values() for entry in result.found]
    if chosen.out:
        counts = {title: {**vars(result), "found": len(result.found)} for title, result in results.items()}
        chosen.out.write_text(json.dumps(counts, indent=2) + "\n")
    for entry in found[:20]:
        print(f"VIOLATED {entry}")
    raise SystemExit(1 if found else 0)


if __name__ == "__main__":
    main()

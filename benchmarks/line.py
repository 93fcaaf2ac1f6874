"""Measures the demo: in a fresh home, fully cached, in a second home, and compared with Prefect's own start.

Prints wall times and the peak memory of the largest process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "examples" / "zorb" / "pipeline.yaml"
EMPTY_FLOW = "from prefect import flow, task\n@task\ndef t(): return 1\n@flow\ndef f(): return t.submit().result()\nf()"


def timed(command: list[str], environment: dict[str, str]) -> float:
    """Returns the wall seconds of a command that must succeed."""
    start = time.perf_counter()
    subprocess.run(command, env=os.environ | environment, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def loraline(*arguments: str) -> list[str]:
    """Returns the command that runs `loraline` in this interpreter."""
    return [sys.executable, "-c", "from flows.cli import start; start()", *arguments]


def main() -> None:
    """Prints one line per figure."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as name:
        homes = [Path(name) / home for home in ("one", "two")]
        first = timed(loraline("run", str(DEMO)), {"LORALINE_HOME": str(homes[0])})
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        again = timed(loraline("run", str(DEMO)), {"LORALINE_HOME": str(homes[0])})
        prefect = {
            "PREFECT_HOME": str(homes[0] / "prefect"),
            "PREFECT_LOGGING_LEVEL": "CRITICAL",
            "DO_NOT_TRACK": "true",
        }
        prefect |= {"PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120"}
        start = timed([sys.executable, "-c", EMPTY_FLOW], prefect)
        timed(loraline("run", str(DEMO)), {"LORALINE_HOME": str(homes[1])})
        digests = []
        for home in homes:
            environment = os.environ | {"LORALINE_HOME": str(home)}
            listed = subprocess.run(loraline("list", "--json"), env=environment, check=True, capture_output=True)
            digests.append(json.loads(listed.stdout)[0]["sha256"])
        help_seconds = min(timed(loraline("--help"), {}) for _ in range(5))
    print(f"demo, fresh home:            {first:6.1f} s   (at most 180)")
    print(f"demo, largest process:       {peak:6.0f} MiB (at most 2500)")
    print(f"demo again, all cached:      {again:6.1f} s   (at most 3 more than Prefect's own start)")
    print(f"Prefect's own start:         {start:6.1f} s   (an empty flow in the same home)")
    print(f"loraline --help, best of 5:  {help_seconds:6.2f} s   (at most 0.5)")
    print(f"adapter digests, two homes:  {'equal' if len(set(digests)) == 1 else 'DIFFERENT'}   {digests[0][:16]}")


if __name__ == "__main__":
    main()

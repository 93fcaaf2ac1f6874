"""Runs every benchmark of this folder in turn: `python -m benchmarks`."""

from __future__ import annotations

import subprocess
import sys

BENCHMARKS = (
    "benchmarks.line",
    "benchmarks.loading",
    "benchmarks.loop_overhead",
    "benchmarks.training_step",
    "benchmarks.composing",
    "benchmarks.serving",
    "benchmarks.parameter_counts",
    "benchmarks.caching",
    "benchmarks.prior",
    "benchmarks.methods",
    "benchmarks.resize",
    "benchmarks.extraction",
    "benchmarks.fuse",
    "benchmarks.convert",
    "benchmarks.walk",
    "benchmarks.reading",
)

if __name__ == "__main__":
    for name in BENCHMARKS:
        print(f"== {name}", flush=True)
        subprocess.run([sys.executable, "-m", name], check=True)

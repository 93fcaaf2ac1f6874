"""Lets atheris, where it is installed, choose the mutations of one target by the branches that they reach."""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random

from tests.fuzz.files import Files
from tests.fuzz.mutate import mutate
from tests.fuzz.target import Target, seeds_of, try_input


def run_guided(target: Target, work: Path, seconds: float) -> None:
    """Runs a target until the time is over or there is a finding; does not return.

    atheris knows bytes, and a target files. Its bytes are a number that chooses the seed and starts the generator of
    the mutations, so that an input can be repeated, as without atheris.

    Raises:
        SystemExit: atheris is not installed.
    """
    try:
        import atheris
    except ImportError:
        raise SystemExit("atheris is not installed. Fix: pip install atheris; or leave out --guided.") from None
    seeds = seeds_of(target, work)

    def try_bytes(data: bytes) -> None:
        try_input(target, files_of(data, seeds), work)

    atheris.instrument_all()
    atheris.Setup([sys.argv[0], f"-max_total_time={int(seconds)}", "-max_len=64"], try_bytes)
    atheris.Fuzz()


def files_of(data: bytes, seeds: tuple[Files, ...]) -> Files:
    """Returns the input of bytes: each group of four bytes is the generator of one more mutation."""
    random = Random(data[:4])
    files = random.choice(seeds)
    for place in range(0, max(1, len(data)), 4):
        files = mutate(files, seeds, Random(data[place : place + 4]))
    return files

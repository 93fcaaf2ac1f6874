"""Lets atheris, where it is installed, choose the mutations of one target by the branches that they reach."""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random

from tests.fuzz.files import Files, write_files
from tests.fuzz.mutate import mutate
from tests.fuzz.target import Finding, Target, seeds_of, try_input


def run_guided(target: Target, work: Path, seconds: float, keep: Path) -> None:
    """Runs a target until the time is over or there is a finding, whose input it keeps; does not return.

    atheris changes bytes, and a target reads files. The bytes choose the seed and start the generators of the
    mutations.

    Args:
        target: The target.
        work: A folder for seeds and inputs.
        seconds: Seconds to run.
        keep: Folder for the input of a finding.

    Raises:
        SystemExit: atheris is not installed.
    """
    try:
        import atheris
    except ImportError:
        raise SystemExit("atheris is not installed. Fix: pip install atheris; or leave out --guided.") from None
    seeds = seeds_of(target, work)

    def try_bytes(data: bytes) -> None:
        files = files_of(data, seeds)
        try:
            try_input(target, files, work)
        except Finding:
            write_files(keep / f"{target.name}-guided", files)
            raise

    atheris.instrument_all()
    atheris.Setup(
        [sys.argv[0], f"-max_total_time={int(seconds)}", "-max_len=64", f"-artifact_prefix={work}/"], try_bytes
    )
    atheris.Fuzz()


def files_of(data: bytes, seeds: tuple[Files, ...]) -> Files:
    """Returns the input of bytes: each group of four bytes is the generator of one more mutation."""
    random = Random(data[:4])
    files = random.choice(seeds)
    for place in range(0, max(1, len(data)), 4):
        files = mutate(files, seeds, Random(data[place : place + 4]))
    return files

"""Runs many inputs of a target in one process and collects what went wrong."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz.files import Files
from tests.fuzz.guards import peak_memory, reset_peak
from tests.fuzz.target import Finding, Target, input_of, seeds_of, try_input

_KEPT = 20
"""Findings of a run after which it ends: the first ones are to be fixed first."""


@dataclass
class Result:
    """What a run of one target did.

    Attributes:
        inputs: Number of inputs.
        accepted: Number of inputs that were not refused.
        slowest: Processor seconds of the slowest input, and its number.
        peak: Most resident memory of the process, in bytes, with torch and what the target imports.
        findings: Number of the input -> what went wrong.
    """

    inputs: int = 0
    accepted: int = 0
    slowest: tuple[float, int] = (0.0, 0)
    peak: int = 0
    findings: dict[int, str] = field(default_factory=dict)


def run(target: Target, seed: int, numbers: Iterable[int], work: Path, progress: Path | None = None) -> Result:
    """Tries the inputs with these numbers.

    Args:
        target: The target.
        seed: The seed of the run.
        numbers: Numbers of inputs.
        work: A folder for seeds and inputs.
        progress: A file that holds target and number of the current input, for the case that the process dies.
    """
    result = Result()
    seeds_of(target, work)
    reset_peak()
    for number in numbers:
        if progress is not None:
            progress.write_text(f"{target.name} {number}")
        files = input_of(target, seed, number, work)
        began = time.process_time()
        try:
            result.accepted += not try_input(target, files, work)
        except Finding as finding:
            result.findings[number] = str(finding)
        result.inputs += 1
        result.slowest = max(result.slowest, (time.process_time() - began, number))
        if len(result.findings) >= _KEPT:
            break
    result.peak = peak_memory()
    return result


def until(seconds: float, first: int = 0) -> Iterator[int]:
    """Yields numbers from the first on, for that many seconds."""
    end = time.monotonic() + seconds
    return itertools.takewhile(lambda _: time.monotonic() < end, itertools.count(first))


def minimize(target: Target, files: Files, work: Path) -> Files:
    """Returns a smaller input with the same finding: with fewer files, and with shorter ones by halving."""
    wanted = _finding(target, files, work)
    for name in sorted(files):
        smaller = {other: content for other, content in files.items() if other != name}
        if smaller and _finding(target, smaller, work) == wanted:
            files = smaller
    for name in sorted(files):
        size = len(files[name]) // 2
        while size:
            for start in range(0, len(files[name]), size):
                content = files[name][:start] + files[name][start + size :]
                if _finding(target, files | {name: content}, work) == wanted:
                    files = files | {name: content}
                    break
            else:
                size //= 2
    return files


def _finding(target: Target, files: Files, work: Path) -> str:
    try:
        try_input(target, files, work)
    except Finding as finding:
        return type(finding.__cause__).__name__ + str(finding)[:40]
    return ""

"""Benchmarks are run by hand, so a name that was moved would not be noticed."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from benchmarks.reading import READERS
from tests.fuzz.targets import TARGETS

FILES = sorted((Path(__file__).parents[1] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_benchmark_can_be_imported(file: Path) -> None:
    module = importlib.import_module("benchmarks" if file.stem == "__init__" else f"benchmarks.{file.stem}")
    assert module.__doc__


BOUNDED = {
    "pickles": "the child process that reads them has limits of its own",
    "keys": "a key has a fixed size",
    "refs": "a name has at most 63 characters",
    "file-names": "a name has at most 255 bytes",
    "conditions": "a condition has at most 256 characters",
    "backups": "folders with the same content as archives",
}
"""Fuzzed targets whose inputs do not grow -> why."""


def test_the_time_of_every_fuzzed_reader_is_measured_against_its_size() -> None:
    measured = {target for target, _, _ in READERS.values()}
    assert measured | BOUNDED.keys() == TARGETS.keys()
    assert not measured & BOUNDED.keys()

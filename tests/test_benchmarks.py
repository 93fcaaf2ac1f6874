"""Benchmarks are run by hand, so a name that was moved would not be noticed."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parents[1] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_benchmark_can_be_imported(file: Path) -> None:
    module = importlib.import_module("benchmarks" if file.stem == "__init__" else f"benchmarks.{file.stem}")
    assert module.__doc__

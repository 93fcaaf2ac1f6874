"""What all tests share: programs that only some machines have, and an empty home."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

import lora_engine  # noqa: F401  (it sets how torch's threads wait, which must come before torch)

PROGRAMS = {"chromium": ("chromium", "chromium-browser", "google-chrome")}
FOLDERS = ("/usr/lib/postgresql/*/bin",)
"""Where programs lie that distributions keep out of the path."""


def find_program(program: str) -> str | None:
    """The path of a program under any of its names, or None."""
    names = PROGRAMS.get(program, (program,))
    beside = (
        str(path) for folder in FOLDERS for name in names for path in sorted(Path("/").glob(f"{folder[1:]}/{name}"))
    )
    return next(filter(None, map(shutil.which, names)), None) or next(beside, None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips, visibly, a test whose program is missing; where LORALINE_CI is set, that is a failure instead."""
    for marker in item.iter_markers("needs"):
        program = marker.args[0]
        if find_program(program):
            continue
        if os.environ.get("LORALINE_CI"):
            pytest.fail(f"{program} is not installed, and this test may not be skipped here")
        pytest.skip(f"{program} is not installed")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty LORALINE_HOME of this test alone."""
    path = tmp_path / "home"
    monkeypatch.setenv("LORALINE_HOME", str(path))
    return path

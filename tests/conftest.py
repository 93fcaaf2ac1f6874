"""What all tests share: programs that only some machines have, and an empty home."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

import lora_engine  # noqa: F401  (it sets how torch's threads wait, which must come before torch)

PROGRAMS = {"chromium": ("chromium", "chromium-browser", "google-chrome")}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips, visibly, a test whose program is missing; where LORALINE_CI is set, that is a failure instead."""
    for marker in item.iter_markers("needs"):
        program = marker.args[0]
        if any(shutil.which(name) for name in PROGRAMS.get(program, (program,))):
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

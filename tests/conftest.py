"""Shared fixtures and hooks: optional programs, an empty home, hypothesis profiles."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Generator
from pathlib import Path

import hypothesis
import pytest

import lora_engine  # noqa: F401  (sets OpenMP variables, which must precede torch)
from lora_engine.lean import collection_paused

pytest_plugins = ["tests.measured"]

PROGRAMS = {"chromium": ("chromium", "chromium-browser", "google-chrome")}
FOLDERS = ("/usr/lib/postgresql/*/bin",)
"""Folders of programs that are not in PATH."""

# `make test` draws the same examples each time; `make nightly` draws new ones (`--hypothesis-profile=nightly`).
hypothesis.settings.register_profile("suite", derandomize=True, deadline=None)
hypothesis.settings.register_profile("nightly", deadline=None, print_blob=True)
hypothesis.settings.load_profile("suite")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Exempts what the imports of all tests made from garbage collection during the tests, and makes it rarer.

    Collections of the oldest objects took a tenth of a run: after the exemption, few imports are a quarter more.
    """
    try:
        with collection_paused():
            return (yield)
    finally:
        gc.set_threshold(700, 20, 50)


def find_program(program: str) -> str | None:
    """Returns the path of a program under any of its names; None if it is not installed."""
    names = PROGRAMS.get(program, (program,))
    unlisted = (
        str(path) for folder in FOLDERS for name in names for path in sorted(Path("/").glob(f"{folder[1:]}/{name}"))
    )
    return next(filter(None, map(shutil.which, names)), None) or next(unlisted, None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips a test whose program is missing; fails it if LORALINE_CI is set."""
    for marker in item.iter_markers("needs"):
        program = marker.args[0]
        if find_program(program):
            continue
        if os.environ.get("LORALINE_CI"):
            pytest.fail(f"{program} is not installed, and LORALINE_CI forbids skipping")
        pytest.skip(f"{program} is not installed")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns an empty LORALINE_HOME for this test."""
    path = tmp_path / "home"
    monkeypatch.setenv("LORALINE_HOME", str(path))
    return path


@pytest.fixture(autouse=True)
def own_device_locks(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps tests that run at the same time from waiting for each other's devices."""
    monkeypatch.setenv("LORALINE_DEVICE_LOCKS", str(tmp_path_factory.mktemp("device-locks")))

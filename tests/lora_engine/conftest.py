"""Shared fixtures of the engine's tests: untrained bases, each written once per run."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from lora_engine.checkpoints import convert_checkpoint
from tests.support.untrained import write_untrained_base


@pytest.fixture(scope="session")
def untrained_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns the folder of an untrained base by its shape. All workers share it: copy it before changing it."""
    root = tmp_path_factory.getbasetemp()
    root = (root.parent if os.environ.get("PYTEST_XDIST_WORKER") else root) / "untrained"
    root.mkdir(exist_ok=True)

    @functools.cache
    def folder_of(shape: str) -> Path:
        folder, partial = root / shape, root / f"{shape}.partial"
        with FileLock(root / f"{shape}.lock"), warnings.catch_warnings():
            # Saving a pipeline without a safety checker makes diffusers warn.
            warnings.simplefilter("ignore")
            if not folder.exists():
                write_untrained_base(partial, shape).rename(folder)
        return folder

    return folder_of


@pytest.fixture(scope="session")
def untrained_file(untrained_base: Callable[[str], Path]) -> Callable[[str], Path]:
    """Returns the single file of an untrained base by its shape."""

    @functools.cache
    def file_of(shape: str) -> Path:
        folder = untrained_base(shape)
        file = folder.with_name(f"{shape}.safetensors")
        with FileLock(folder.with_name(f"{file.name}.lock")):
            # The file gets its name only when it is complete.
            return file if file.exists() else convert_checkpoint(folder, file, to="ldm")[0]

    return file_of

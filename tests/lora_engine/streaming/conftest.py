from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "laws")]
from stored_models import cast_model  # noqa: E402 (the path is set above)

DTYPES = ("float32", "float16", "bfloat16")


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Yields a folder on disk; file systems in memory have no direct I/O before Linux 6.6."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def bases(untrained_base: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One narrow base as a diffusers folder in each dtype."""
    root = tmp_path_factory.mktemp("bases")
    made = {"float32": untrained_base("small-sd")}
    return made | {dtype: cast_model(made["float32"], root / dtype, dtype) for dtype in DTYPES[1:]}

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest

from lora_engine.bases.untrained import write_untrained_base

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "laws")]
from stored_models import cast_model  # noqa: E402 (the path is set above)

DTYPES = ("float32", "float16", "bfloat16")


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One narrow base as a diffusers folder in each dtype, and one of another family."""
    root = tmp_path_factory.mktemp("bases")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # saving without a safety checker makes diffusers say so
        made = {"float32": write_untrained_base(root / "float32", "small-sd")}
        made["sdxl"] = write_untrained_base(root / "sdxl", "small-sdxl")
    return made | {dtype: cast_model(made["float32"], root / dtype, dtype) for dtype in DTYPES[1:]}

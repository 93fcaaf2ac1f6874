"""What a step ran on: recorded in lineage, never part of an artifact."""

from __future__ import annotations

import os
import platform
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

_PACKAGES = ("loraline", "torch", "diffusers", "transformers", "safetensors", "numpy", "pillow", "mlflow", "prefect")


@lru_cache(maxsize=1)
def describe_environment() -> dict[str, Any]:
    """Versions of the packages that can change a result, the interpreter, the machine's kind and its threads."""
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    return {
        "packages": packages,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
    }

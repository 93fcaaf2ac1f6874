"""What this process computes with: device, threads, build of torch. It changes the last bits of a result, never more.

Told to lineage, never written into an artifact; and the one place that sets the number of threads.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_engine.bases.source import BaseSource

THREADS = "OMP_NUM_THREADS"
_SMALL = 64 * 2**20


def describe_compute(device: str | None = None) -> dict[str, Any]:
    """Device, its name, threads, torch's build and the processor's vector instructions; nothing without torch loaded.

    Args:
        device: Where the work was done; None takes the device that `load_base` takes.
    """
    if "torch" not in sys.modules:
        return {}
    import torch

    from lora_engine.bases.base import default_device

    used = device or default_device()
    return {
        "device": used,
        "device_name": torch.cuda.get_device_name() if used.startswith("cuda") else "",
        "threads": torch.get_num_threads(),
        "torch": f"{torch.__version__} ({str(torch.version.git_version)[:12]})",
        "vectors": torch.backends.cpu.get_cpu_capability(),
    }


def fitting_threads(bases: Collection[BaseSource]) -> int | None:
    """One, where the bases are so small that threads wait for each other longer than they compute; else None.

    Training on the embedded base (13 MB) took 126 s with two threads and 52 s with one, on two cores. What the
    environment says (`OMP_NUM_THREADS`) wins.

    Args:
        bases: All that will compute.
    """
    small = bool(bases) and all(base.size < _SMALL for base in bases)
    return 1 if small and THREADS not in os.environ else None


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Has torch compute with so many threads, here and in the processes started meanwhile; None leaves all as it is.

    Does not import torch: if that happens within the block, it reads the environment.
    """
    if count is None:
        yield
        return
    before, variable = _set_threads(count), os.environ.get(THREADS)
    os.environ[THREADS] = str(count)
    try:
        yield
    finally:
        if variable is None:
            del os.environ[THREADS]
        else:
            os.environ[THREADS] = variable
        told = variable if variable and variable.isdecimal() else os.cpu_count()
        _set_threads(before or int(told or 1))


def _set_threads(count: int) -> int | None:
    """How many there were before; None as long as torch is not loaded."""
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    before: int = torch.get_num_threads()
    torch.set_num_threads(count)
    return before

"""What this process computes with: device, threads, build of torch. It changes the last bits of a result, never more.

Told to lineage, never written into an artifact; and the one place that sets the number of threads.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

THREADS = "OMP_NUM_THREADS"


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


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Has torch compute with so many threads, here and in the processes started meanwhile; None leaves all as it is."""
    if count is None:
        yield
        return
    import torch

    before, variable = torch.get_num_threads(), os.environ.get(THREADS)
    os.environ[THREADS] = str(count)
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if variable is None:
            del os.environ[THREADS]
        else:
            os.environ[THREADS] = variable

"""What this process computes with: device, threads, build of torch. It changes the last bits of a result, never more.

Told to lineage, never written into an artifact; and the one place that sets the number of threads.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_engine.bases.source import BaseSource

THREADS = "OMP_NUM_THREADS"
_SMALL = 64 * 2**20
_CORES = 2
_PROCESS = 2**30
_GROUP = Path("/sys/fs/cgroup/memory.max")


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


def fitting_trainings(device: str, *, cores: int, memory: int, threads: int, processes: int, base: int) -> int:
    """Returns how many trainings one device takes at the same time unless a user says otherwise; at least 1.

    A GPU takes one. On a CPU a training counts for as many cores as it has threads, and for two where it has one: the
    run that started it, Prefect's server and evaluations compute beside it. A process of it is assumed to need 1 GiB
    and four times the size of the base: twice for weights in float32 that are float16 in the files, and as much for
    activations.

    Args:
        device: `cpu`, or the name of anything else.
        cores: Of this machine.
        memory: Of this machine, in bytes.
        threads: That each process of a training computes with.
        processes: Of one training.
        base: Size of the base's files in bytes.
    """
    if device != "cpu":
        return 1
    busy = max(_CORES, min(cores, threads * processes))
    return max(1, min(cores // busy, memory // (processes * (_PROCESS + 4 * base))))


def count_cores() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count_threads() -> int:
    """Returns how many threads a process that is started now computes with: `OMP_NUM_THREADS`, or one a core."""
    limit = os.environ.get(THREADS, "")
    return int(limit) if limit.isdecimal() and int(limit) else count_cores()


def measure_memory() -> int:
    """Returns the memory of this machine in bytes, or of this process' control group where that may use less."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        allowed = _GROUP.read_text().strip()
    except OSError:
        return memory
    return min(memory, int(allowed)) if allowed.isdecimal() else memory


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

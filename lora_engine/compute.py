"""Describes the device, threads and torch build of this process, and sets the number of threads.

They change only the last bits of a result. Lineage records them; artifacts do not.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_engine.parallel import count_cores

if TYPE_CHECKING:
    from lora_engine.bases.source import BaseSource

THREADS = "OMP_NUM_THREADS"
_SMALL = 64 * 2**20
_CORES = 2
_PROCESS = 2**30
_GROUP = Path("/sys/fs/cgroup/memory.max")
_USED = Path("/sys/fs/cgroup/memory.current")
_MEMORY = Path("/proc/meminfo")


def describe_compute(device: str | None = None) -> dict[str, Any]:
    """Returns device, device name, threads, torch build and vector instructions; empty if torch is not loaded.

    Args:
        device: The device of the work; None takes the device that `load_base` takes.
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
    """Returns 1 if all bases are so small that threads wait longer than they compute; else None.

    Training on the embedded base (13 MB) took 126 s with two threads and 52 s with one, on two cores.
    `OMP_NUM_THREADS` overrides this.

    Args:
        bases: All bases that the process uses.
    """
    small = bool(bases) and all(base.size < _SMALL for base in bases)
    return 1 if small and THREADS not in os.environ else None


def fitting_trainings(device: str, *, cores: int, memory: int, threads: int, processes: int, base: int) -> int:
    """Returns the default number of concurrent trainings on one device; at least 1.

    A GPU takes one. On a CPU a training uses as many cores as it has threads, and at least two: the run that started
    it, Prefect's server and evaluations compute beside it. Each process is assumed to need 1 GiB plus four times the
    size of the base: two for float32 weights that are float16 in the files, two for activations.

    Args:
        device: `cpu`, or the name of any other device.
        cores: Cores of this machine.
        memory: Memory of this machine in bytes.
        threads: Threads per training process.
        processes: Processes per training.
        base: Size of the base's files in bytes.
    """
    if device != "cpu":
        return 1
    busy = max(_CORES, min(cores, threads * processes))
    return max(1, min(cores // busy, memory // (processes * (_PROCESS + 4 * base))))


def count_threads() -> int:
    """Returns the number of threads of a new process: `OMP_NUM_THREADS`, or one per core."""
    limit = os.environ.get(THREADS, "")
    return int(limit) if limit.isdecimal() and int(limit) else count_cores()


def measure_memory() -> int:
    """Returns the memory of this machine in bytes, or the limit of the control group if that is lower."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        allowed = _GROUP.read_text().strip()
    except OSError:
        return memory
    return min(memory, int(allowed)) if allowed.isdecimal() else memory


def measure_free(device: str) -> tuple[int, int]:
    """Returns the free and the whole memory of a device in bytes: of a GPU, or of this machine.

    Args:
        device: `cpu`, `mps`, `cuda` for the current GPU, or a numbered GPU such as `cuda:1`.
    """
    if device.startswith("cuda"):
        import torch

        free, whole = torch.cuda.mem_get_info(torch.device(device))
        return free, whole
    whole = measure_memory()
    with suppress(OSError, ValueError):
        left = whole - int(_USED.read_text())
        return max(0, min(left, _available())), whole
    return min(_available(), whole), whole


def _available() -> int:
    """Returns the memory of this machine in bytes that new processes can use without swapping."""
    with suppress(OSError, ValueError, IndexError):
        (line,) = (line for line in _MEMORY.read_text().splitlines() if line.startswith("MemAvailable:"))
        return int(line.split()[1]) << 10
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Sets the threads of torch in this process and in those started within the block; None changes nothing.

    Does not import torch. If the block imports it, torch reads the environment variable.
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
        default = variable if variable and variable.isdecimal() else os.cpu_count()
        _set_threads(before or int(default or 1))


def _set_threads(count: int) -> int | None:
    """Sets the threads and returns the previous number; does nothing and returns None if torch is not loaded."""
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    before: int = torch.get_num_threads()
    torch.set_num_threads(count)
    return before

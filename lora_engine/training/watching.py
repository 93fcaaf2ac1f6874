"""Measures throughput and memory of a training for its progress."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping

import torch

from lora_engine.progress import Progress
from lora_engine.training.loop import SECONDS

_MIB = 1 << 20


def with_measurements(progress: Progress, images: int) -> Progress:
    """Returns a progress callback for `fit` that reports throughput and memory beside the values of each step.

    Args:
        progress: Receives `images_per_second` (the user's images, class images not counted) and `peak_memory_mib` (of
            the GPU if there is one, else of this process) instead of the seconds of a step.
        images: Images per step, over all batches and processes.
    """

    def report(done: int, total: int, values: Mapping[str, float]) -> None:
        measured = dict(values)
        seconds = measured.pop(SECONDS, 0.0)
        if seconds > 0:
            measured |= {"images_per_second": images / seconds, "peak_memory_mib": _peak_memory() / _MIB}
        progress(done, total, measured)

    return report


def _peak_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

"""Trains one network in two processes that average their gradients over the loopback interface.

On two cores, two processes with one thread each are faster than one with two threads, because the networks are small.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

PROCESSES = 2
RANK = "RANK"
"""The environment variable with the rank of a process: 0 or 1."""
MEETING = "meeting.partial"


@contextmanager
def join(work: Path) -> Iterator[int]:
    """Joins the process group and yields the rank of this process; at the end waits for the other process.

    Args:
        work: The folder of the rendezvous file, which must not exist beforehand.
    """
    rank = int(os.environ[RANK])
    path = (work / MEETING).resolve()
    timeout = timedelta(minutes=10)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=PROCESSES, timeout=timeout)
    try:
        yield rank
        dist.barrier()
    finally:
        dist.destroy_process_group()


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replaces the gradients by their means over the processes, in place; a missing one counts as zeros."""
    # One message for all gradients: the cost is per message, not per byte.
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    dist.all_reduce(flat)
    flat /= PROCESSES
    start = 0
    for parameter in parameters:
        parameter.grad = flat[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()

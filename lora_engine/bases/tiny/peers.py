"""Two processes that train one network: they meet over a file and average their gradients over the loopback interface.

Two processes with one thread each are faster on two cores than one with two, since the networks are small.
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
"""The environment variable that tells a process which of the two it is: 0 or 1."""
MEETING = "meeting.partial"


@contextmanager
def join(work: Path) -> Iterator[int]:
    """Waits for the other process, and gives the rank of this one; at the end waits for the other one again.

    Args:
        work: The folder in which they meet, over a file that must not be there from an earlier meeting.
    """
    rank = int(os.environ[RANK])
    place = (work / MEETING).resolve()
    patience = timedelta(minutes=10)
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=PROCESSES, timeout=patience)
    try:
        yield rank
        dist.barrier()
    finally:
        dist.destroy_process_group()


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replaces the gradients by their means over the processes, in place; a missing one counts as zeros."""
    # One message for all of them: the time goes into messages, not into bytes.
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    dist.all_reduce(flat)
    flat /= PROCESSES
    start = 0
    for parameter in parameters:
        parameter.grad = flat[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()

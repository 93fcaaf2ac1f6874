"""The loop that trains each part of the embedded base: AdamW on a cosine, alone or averaged over processes.

Made for the recipe alone: adapters are trained by `lora_engine.training`. What is minimised is said by the caller.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Peers:
    """The processes that train one network together; by default this one alone."""

    rank: int = 0
    count: int = 1

    def average(self, parameters: list[nn.Parameter]) -> None:
        """Replaces every gradient by its mean over the processes, in place."""
        if self.count == 1:
            return
        flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in parameters])
        dist.all_reduce(flat)
        flat /= self.count
        for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad = part.view_as(p)

    def wait(self) -> None:
        """Returns when all processes have come here."""
        if self.count > 1:
            dist.barrier()


def join_peers(rank: int, count: int, meeting: Path) -> Peers:
    """Joins `count` processes of this machine that all name the same, at first missing, file `meeting`."""
    if count > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting.resolve()}", rank=rank, world_size=count)
    return Peers(rank, count)


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: `rate` is reached after `warmup` steps and falls to 2 % of itself on a cosine."""

    steps: int
    rate: float
    warmup: int = 30
    weight_decay: float = 1e-3
    clip: float = 1.0

    def rate_at(self, step: int) -> float:
        """The learning rate of a step that counts from 0."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.rate * min(1.0, (step + 1) / self.warmup) * (0.98 * cosine + 0.02)


def fit(
    name: str,
    parameters: Iterable[nn.Parameter],
    loss: Callable[[int], Tensor],
    schedule: Schedule,
    *,
    peers: Peers | None = None,
    after: Callable[[int], None] | None = None,
    report_every: int = 50,
) -> None:
    """Minimises `loss(step)` over `parameters`, in place, and logs loss, rate and remaining time.

    Args:
        name: What the log calls it.
        parameters: What moves.
        loss: Gives the scalar loss of a step, with its own data and generator.
        schedule: Steps and learning rate.
        peers: The processes to average gradients with; all must take the same steps.
        after: Called after each update, with the step.
        report_every: Steps between two lines of the log.
    """
    peers = peers or Peers()
    moving = list(parameters)
    optimiser = torch.optim.AdamW(moving, lr=0.0, betas=(0.9, 0.99), weight_decay=schedule.weight_decay, fused=True)
    start = time.monotonic()
    for step in range(schedule.steps):
        for group in optimiser.param_groups:
            group["lr"] = schedule.rate_at(step)
        value = loss(step)
        optimiser.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]
        peers.average(moving)
        nn.utils.clip_grad_norm_(moving, schedule.clip)
        optimiser.step()
        if after is not None:
            after(step)
        if peers.rank == 0 and (step % report_every == 0 or step == schedule.steps - 1):
            spent = time.monotonic() - start
            left = spent / (step + 1) * (schedule.steps - step - 1)
            log.info("%s: step %d of %d, loss %.4f, %.0f s left", name, step + 1, schedule.steps, value.item(), left)

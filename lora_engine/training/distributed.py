"""Several processes on one run: who takes which rows of a batch, and how gradients are averaged.

Every process makes every batch, a pure function of its number, and takes every n-th row of it; so together they see
what one process would. `spawn` starts them; accelerate joins them (gloo on a CPU, NCCL on GPUs).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_engine.bases.conditioning import Conditioning
from lora_engine.errors import SettingsError, TrainingError
from lora_engine.training.batches import Batch
from lora_engine.training.checkpoint import Checkpoint, Checkpoints
from lora_engine.training.phases import Phase
from lora_engine.training.spawn import LOST, RENDEZVOUS

# The leader draws class pictures and samples while the others wait; a process that died is noticed by the caller.
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of a run, as one of them sees them; alone by default, and then nothing here does anything.

    Attributes:
        rank: This process, from 0 on.
        size: How many there are.
        device: Where this one computes; None leaves the choice to `load_base`.
    """

    rank: int = 0
    size: int = 1
    device: str | None = None

    @property
    def is_main_process(self) -> bool:
        """Whether this process is the one that writes and tells."""
        return self.rank == 0

    def share(self, batch: Batch) -> Batch:
        """This process' rows of a batch: every n-th. Groups of rows that are multiples of n stay in proportion."""
        if self.size == 1:
            return batch
        count = len(batch.latents)
        if batch.instances % self.size or count % self.size:
            raise SettingsError(
                f"a batch of {batch.instances} pictures and {count - batch.instances} others cannot be shared among "
                f"{self.size} processes",
                remedy="make batch a multiple of running.processes",
            )
        fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
        changed = {name: self._rows(value, count) for name, value in fields.items() if name != "instances"}
        changed["examples"] = batch.examples[self.rank :: self.size]
        return dataclasses.replace(batch, **changed, instances=batch.instances // self.size)

    def _rows(self, value: Any, count: int) -> Any:
        # What a teacher says is of some rows alone; these are as many times n as all rows are.
        if isinstance(value, Conditioning):
            return value.index(range(self.rank, len(value), self.size))
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == count:
            return value[self.rank :: self.size]
        return value

    def phase(self, phase: Phase) -> Phase:
        """The phase on this process' share of each batch, with randomness of its own around it."""
        if self.size == 1:
            return phase
        make, around = phase.batch, phase.around
        return dataclasses.replace(
            phase,
            batch=lambda number: self.share(make(number)),
            around=lambda number: around(number * self.size + self.rank),
        )

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Puts the mean over all processes into tensors that every one of them has; in place, in one exchange."""
        if self.size == 1 or not tensors:
            return
        from accelerate.utils import reduce

        flat = torch.cat([value.detach().reshape(-1).float() for value in tensors])
        means = _exchange(lambda: reduce(flat, reduction="mean")).split([value.numel() for value in tensors])
        with torch.no_grad():
            for value, mean in zip(tensors, means, strict=True):
                value.copy_(mean.view_as(value))

    def any(self, said: bool) -> bool:
        """Whether any process said so; all get the same answer."""
        if self.size == 1:
            return said
        from accelerate import PartialState
        from accelerate.utils import reduce

        mine = torch.tensor([float(said)], device=PartialState().device)
        return bool(_exchange(lambda: reduce(mine, reduction="sum")).item() > 0)

    def wait(self) -> None:
        """Returns when every process has come here."""
        self.any(False)

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """The leader first, then all the others: what it has written, they find."""
        if not self.is_main_process:
            self.wait()
        yield
        if self.is_main_process:
            self.wait()


class ReadOnlyCheckpoints(Checkpoints):
    """The checkpoints as those see them who do not lead: read, never written."""

    def save(self, step: int, checkpoint: Checkpoint) -> None:
        """Does nothing; the leader saves."""


@contextlib.contextmanager
def process_group(processes: int, device: str | None) -> Iterator[ProcessGroup]:
    """Joins the processes of a run until the block ends.

    Args:
        processes: How many the settings ask for; 1 joins nobody.
        device: `cpu`, `cuda` or None for the fastest.

    Raises:
        SettingsError: This process was not started as one of so many, or there are not enough GPUs.
        TrainingError: The others cannot be reached.
    """
    if processes == 1:
        yield ProcessGroup(device=device)
        return
    rank, meeting = int(os.environ.get("RANK", "-1")), os.environ.get(RENDEZVOUS)
    if int(os.environ.get("WORLD_SIZE", "1")) != processes or rank < 0 or not meeting:
        raise SettingsError(
            f"running.processes is {processes}, and this is a single process",
            remedy="start the training by a pipeline or by train_in_child, which start all of them",
        )
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    if not on_cpu and torch.cuda.device_count() < processes:
        raise SettingsError(
            f"running.processes is {processes}, and there are {torch.cuda.device_count()} GPUs",
            remedy="lower running.processes, or set running.device to cpu",
        )
    from accelerate import PartialState

    where = Path(meeting).resolve().as_uri()
    _exchange(lambda: PartialState(cpu=on_cpu, init_method=where, rank=rank, world_size=processes, timeout=_PATIENCE))
    try:
        yield ProcessGroup(rank, processes, "cpu" if on_cpu else f"cuda:{rank}")
    finally:
        torch.distributed.destroy_process_group()
        PartialState._reset_state()


def _exchange(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except (RuntimeError, ConnectionError) as error:
        raise TrainingError(f"{LOST} ({str(error).strip().splitlines()[0][:200]})") from error

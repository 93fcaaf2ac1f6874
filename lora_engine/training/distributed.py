"""Data-parallel training: splits batches among processes and averages gradients.

Every process builds every batch, a pure function of its number, and takes every n-th row. Together they process the
same rows as a single process. `spawn` starts the processes; accelerate connects them (gloo on a CPU, NCCL on GPUs).
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

# Other ranks wait while the main process draws class images and samples. `spawn` detects dead processes.
_TIMEOUT = timedelta(days=7)


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of a run, seen from one of them; by default a single process, for which all methods are no-ops.

    Attributes:
        rank: Rank of this process, from 0.
        size: Number of processes.
        device: Device of this process; None leaves the choice to `load_base`.
    """

    rank: int = 0
    size: int = 1
    device: str | None = None

    @property
    def is_main_process(self) -> bool:
        """True for the process that writes files and reports progress."""
        return self.rank == 0

    def shard(self, batch: Batch) -> Batch:
        """Returns this process' rows of a batch, every n-th; keeps the proportion of instances and others."""
        if self.size == 1:
            return batch
        count = len(batch.latents)
        if batch.instances % self.size or count % self.size:
            raise SettingsError(
                f"a batch of {batch.instances} images and {count - batch.instances} other rows cannot be split among "
                f"{self.size} processes",
                remedy="set batch to a multiple of running.processes",
            )
        fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
        changed = {name: self._rows(value, count) for name, value in fields.items() if name != "instances"}
        changed["examples"] = batch.examples[self.rank :: self.size]
        return dataclasses.replace(batch, **changed, instances=batch.instances // self.size)

    def _rows(self, value: Any, count: int) -> Any:
        # A teacher's conditioning has fewer rows than the batch, but also a multiple of n.
        if isinstance(value, Conditioning):
            return value.index(range(self.rank, len(value), self.size))
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == count:
            return value[self.rank :: self.size]
        return value

    def phase(self, phase: Phase) -> Phase:
        """Returns the phase on this process' shard of each batch, with its own dropout seeds."""
        if self.size == 1:
            return phase
        make_batch, batch_context = phase.batch, phase.batch_context
        return dataclasses.replace(
            phase,
            batch=lambda number: self.shard(make_batch(number)),
            batch_context=lambda number: batch_context(number * self.size + self.rank),
        )

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Averages tensors over all processes, in place, in one collective call."""
        if self.size == 1 or not tensors:
            return
        from accelerate.utils import reduce

        flat = torch.cat([value.detach().reshape(-1).float() for value in tensors])
        means = _collective(lambda: reduce(flat, reduction="mean")).split([value.numel() for value in tensors])
        with torch.no_grad():
            for value, mean in zip(tensors, means, strict=True):
                value.copy_(mean.view_as(value))

    def any(self, flag: bool) -> bool:
        """Returns True on all processes if the flag is True on any."""
        if self.size == 1:
            return flag
        from accelerate import PartialState
        from accelerate.utils import reduce

        tensor = torch.tensor([float(flag)], device=PartialState().device)
        return bool(_collective(lambda: reduce(tensor, reduction="sum")).item() > 0)

    def barrier(self) -> None:
        """Returns when every process has called it."""
        self.any(False)

    @contextlib.contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Runs the block in the main process first, then in all others, which find the files it wrote."""
        if not self.is_main_process:
            self.barrier()
        yield
        if self.is_main_process:
            self.barrier()


class ReadOnlyCheckpoints(Checkpoints):
    """The checkpoints of a non-main process: read, never written."""

    def save(self, step: int, checkpoint: Checkpoint) -> None:
        """Does nothing; the main process saves."""


@contextlib.contextmanager
def process_group(processes: int, device: str | None) -> Iterator[ProcessGroup]:
    """Connects the processes of a run until the block ends.

    Args:
        processes: Number of processes of the settings; 1 connects none.
        device: `cpu`, `cuda` or None for the fastest.

    Raises:
        SettingsError: This process was not started as one of so many, or there are not enough GPUs.
        TrainingError: Another process is unreachable.
    """
    if processes == 1:
        yield ProcessGroup(device=device)
        return
    rank, rendezvous = int(os.environ.get("RANK", "-1")), os.environ.get(RENDEZVOUS)
    if int(os.environ.get("WORLD_SIZE", "1")) != processes or rank < 0 or not rendezvous:
        raise SettingsError(
            f"running.processes is {processes}, but this is a single process",
            remedy="train with a pipeline or train_in_child, which start all processes",
        )
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    if not on_cpu and torch.cuda.device_count() < processes:
        raise SettingsError(
            f"running.processes is {processes}, but there are {torch.cuda.device_count()} GPUs",
            remedy="lower running.processes, or set running.device to cpu",
        )
    from accelerate import PartialState

    method = Path(rendezvous).resolve().as_uri()
    _collective(lambda: PartialState(cpu=on_cpu, init_method=method, rank=rank, world_size=processes, timeout=_TIMEOUT))
    try:
        yield ProcessGroup(rank, processes, "cpu" if on_cpu else f"cuda:{rank}")
        _wait_for_all(f"{rendezvous}.ends", rank, processes)
    finally:
        torch.distributed.destroy_process_group()
        PartialState._reset_state()


def _wait_for_all(path: str, rank: int, processes: int) -> None:
    # Gloo fails a process that has received its last message but not taken it yet when the sender disconnects.
    store = torch.distributed.FileStore(path, processes)  # type: ignore[attr-defined]
    store.set(str(rank), "")
    store.wait([str(other) for other in range(processes)], _TIMEOUT)


def _collective(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except (RuntimeError, ConnectionError) as error:
        raise TrainingError(f"{LOST} ({str(error).strip().splitlines()[0][:200]})") from error

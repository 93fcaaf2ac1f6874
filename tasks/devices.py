"""Limits how many steps use one device at the same time, over all processes of a home and of a user on this machine.

A slot is a lock on a file of the home and on one of the machine. Child processes that compute inherit the locks, and
the system releases them when the last of them ends. A killed run therefore occupies its device until its children end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING

from lora_engine.compute import measure_free
from lora_engine.errors import InterruptedRun
from registry.home import Home
from tasks.device_locks import close_locks, machine_locks, take_slot
from tasks.errors import SpecError
from tasks.progress import StepEvent, publish, stop_requested
from tasks.resources import NO_RESOURCES, Resources, device_type, gpu_number

if TYPE_CHECKING:
    from tasks.job import Job
    from tasks.step import Context

POLL = 0.2
"""Seconds between two attempts to take a slot."""
_MEMORY_POLL = 2.0
_MANY = 1024
_GIB = 1 << 30


@contextmanager
def device_slots(
    home: Home, limits: Mapping[str, int], step: str, resources: Resources = NO_RESOURCES
) -> Iterator[tuple[int, ...]]:
    """Holds one slot of each device inside a `with` block; waits for devices without a free slot, then for memory.

    Publishes the wait as an event of the step. Takes devices in the order of their names, which prevents deadlocks of
    steps that need several.

    Args:
        home: The home whose processes share the slots.
        limits: Device name -> maximum number of holders, this one included.
        step: Name of the step that waits.
        resources: What the step declares; `exclusive` takes the whole device, whatever the limits are.

    Yields:
        The file descriptors of the locks, for `subprocess.Popen(pass_fds=...)`.

    Raises:
        InterruptedRun: A stop was requested while it waited.
        SpecError: The device has less memory than the step needs.
    """
    with ExitStack() as stack:
        descriptors: list[int] = []
        for device in sorted(limits):
            on_wait = partial(_publish_wait, step, device)
            slot = device_slot(home, device, limits[device], exclusive=resources.exclusive, on_wait=on_wait, where=step)
            descriptors += stack.enter_context(slot)
        if resources.memory is not None:
            _await_memory(resources, sorted(limits), step)
        yield tuple(descriptors)


@contextmanager
def gpu_slot(
    home: Home, device: str, limit: int | None, step: str, resources: Resources = NO_RESOURCES
) -> Iterator[None]:
    """Holds a slot of the GPU on which a step of this process runs a model; waits for one as a training does.

    Nothing waits for a CPU, where such steps and trainings slow each other down but do not exhaust the memory; but a
    step that declares `resources` shares it with trainings, and waits for one that has it alone.

    Args:
        home: The home whose processes share the slots.
        device: `auto` for the fastest device, or the type of a device.
        limit: Maximum number of holders; None means 1, as for trainings.
        step: Name of the step that waits.
        resources: What the step declares; its device, if not `auto`, is the default device of this thread meanwhile.

    Raises:
        InterruptedRun: A stop was requested while it waited.
        SpecError: The device has less memory than the step needs.
    """
    name = _slot_name(device if resources.device == "auto" else resources.device)
    names = () if name == "cpu" and resources == NO_RESOURCES else (name,)
    limits = dict.fromkeys(names, limit or (_MANY if name == "cpu" else 1))
    with device_slots(home, limits, step, resources), _default_device(resources.device):
        yield


def work_on_device(job: Job, context: Context) -> None:
    """Does a step's work; takes the device for a step that declares `resources` and does not take it by itself."""
    if context.resources == NO_RESOURCES or job.kind.takes_device:
        job.kind.work(job.spec, context)
        return
    with gpu_slot(context.home, "cpu", context.concurrency, context.name, context.resources):
        job.kind.work(job.spec, context)


@contextmanager
def device_slot(
    home: Home,
    device: str,
    limit: int,
    *,
    exclusive: bool = False,
    on_wait: Callable[[], None] = lambda: None,
    where: str = "",
) -> Iterator[tuple[int, ...]]:
    """Holds one slot of a device inside a `with` block, in the home and on this machine.

    Args:
        home: The home whose processes share the slots.
        device: Any name; equal names mean the same device.
        limit: Maximum number of holders, this one included; at least 1.
        exclusive: True waits until nothing else holds the device, and lets nothing else take it.
        on_wait: Called once if it must wait.
        where: Name of the step that waits, for the error.

    Yields:
        The file descriptors of the locks; a process that inherits all of them holds the slot too.

    Raises:
        InterruptedRun: A stop was requested while it waited.
        HomeError: The folder of this machine's locks cannot be used.
    """
    held: list[int] = []
    has_waited = False
    try:
        for folder in (home.locks, machine_locks()):  # always in this order, which prevents deadlocks
            while (taken := take_slot(folder, device, limit, exclusive=exclusive)) is None:
                if not has_waited:
                    has_waited = True
                    on_wait()
                _refuse_if_stopped(f"device {device!r}", where)
                time.sleep(POLL)
            held += taken
        yield tuple(held)
    finally:
        # Close, do not unlock: a running process that inherited the descriptors keeps the slot.
        close_locks(held)


def gpu_name(number: int) -> str:
    """Returns the name of a GPU for `CUDA_VISIBLE_DEVICES`, by its number among the visible ones."""
    from lora_engine.bases.base import visible_gpus

    return visible_gpus(number + 1)[number].removeprefix("cuda-")


def _slot_name(device: str) -> str:
    """Returns the name that processes share for a device: `cpu`, `mps` or `cuda-N`."""
    if device == "auto":
        from lora_engine.bases.base import default_device

        device = default_device()
    return f"cuda-{gpu_name(gpu_number(device) or 0)}" if device_type(device) == "cuda" else device


@contextmanager
def _default_device(device: str) -> Iterator[None]:
    if device == "auto":
        yield
        return
    from lora_engine.bases.base import device_chosen

    with device_chosen(device):
        yield


def _await_memory(resources: Resources, names: Iterable[str], step: str) -> None:
    """Waits until the device has the free memory that a step needs."""
    needed, name = resources.memory or 0.0, next(iter(names))
    device = "cuda" if resources.device == "auto" and name.startswith("cuda") else resources.device
    device = name if device == "auto" else device
    free, whole = measure_free(device)
    if needed * _GIB > whole:
        raise SpecError(
            f"resources.memory is {needed:g} GiB, but {device} has {whole / _GIB:.1f} GiB in all",
            where=f"step {step!r}",
            remedy="lower it, or run the step on another machine",
        )
    while needed * _GIB > free:
        text = f"waiting for {needed:g} GiB of free memory on {device}, which has {free / _GIB:.1f} GiB"
        publish(StepEvent(step, "waiting", text=text))
        _refuse_if_stopped(f"{needed:g} GiB of {device}", step)
        time.sleep(_MEMORY_POLL)
        free, _ = measure_free(device)


def _refuse_if_stopped(awaited: str, where: str) -> None:
    if stop_requested():
        raise InterruptedRun(
            f"stopped while waiting for {awaited}",
            where=f"step {where!r}" if where else "",
            remedy="run the same command to continue",
        )


def _publish_wait(step: str, device: str) -> None:
    publish(StepEvent(step, "waiting", text=f"waiting for device {device}"))
